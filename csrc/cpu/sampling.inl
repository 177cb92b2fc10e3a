// Passes over rows of logits for sampling. Part of kernels.inl. The definition of every number is in kernels/sampling.py.
//
// Floats are computed by separate IEEE operations, or by a fused one whose product is exact, and sums are of integers. So the
// results have the same bits with every instruction set.

bool logit_peaks(const float* logits, int64_t count, float* peaks) {
  constexpr int kChains = kSampleBlock / kW;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  // A row's sums are NaN if a logit is NaN or infinities meet. Only then does the loop look for NaN logit by logit.
  V sums[kChains];
  for (V& sum : sums) sum = Simd::zero();
  const auto peak_of = [&](const float* block) {
    V peak = Simd::set1(kLowest);
    for (int i = 0; i < kChains; ++i) {
      const V v = Simd::load(block + i * kW);
      sums[i] = Simd::add(sums[i], v);
      peak = Simd::max(v, peak);
    }
    return peak;
  };
  int64_t begin = 0;
  for (; begin + 4 * kSampleBlock <= count; begin += 4 * kSampleBlock, peaks += 4) {
    V four[4];  // reduced together, which takes half as many instructions
    for (int b = 0; b < 4; ++b) four[b] = peak_of(logits + begin + b * kSampleBlock);
    Simd::maximum4(four[0], four[1], four[2], four[3], peaks);
  }
  for (; begin + kSampleBlock <= count; begin += kSampleBlock) *peaks++ = Simd::maximum(peak_of(logits + begin));
  float rest = 0, peak = kLowest;
  for (int64_t i = begin; i < count; ++i) {
    rest += logits[i];
    peak = peak < logits[i] ? logits[i] : peak;
  }
  if (begin < count) *peaks = peak;
  for (const V& sum : sums) rest += Simd::sum(sum);
  if (rest == rest) return false;
  for (int64_t i = 0; i < count; ++i)
    if (logits[i] != logits[i]) return true;
  return false;
}

void mask_logits(float* logits, int64_t count, const uint32_t* mask) {
  for (int64_t begin = 0; begin < count; begin += 32, ++mask) {
    if (*mask == 0xffffffffu) continue;
    const int64_t n = lesser<int64_t>(32, count - begin);
    for (int64_t i = 0; i < n; ++i)
      logits[begin + i] = *mask >> i & 1 ? logits[begin + i] : -std::numeric_limits<float>::infinity();
  }
}

// Weights of N vectors, one step for all vectors after the other. A single vector is a chain of thirty dependent
// instructions, and the processor does not look far enough ahead to overlap the next chains by itself.
template <int N>
inline void weights_of(const V (&logits)[N], V greatest, V inverse_temperature, Simd::Whole* weights) {
  // Adding 1.5 x 2^23 rounds to a whole number n and leaves n in the lowest bits. Adding 30 as well (a weight's unit is
  // 2^-30) does not change the rounding, since 30 is even.
  const V rounding = Simd::set1(12582912.0f + 30.0f);
  const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  V r[N], n[N], p[N];
  for (int i = 0; i < N; ++i) r[i] = Simd::mul(Simd::sub(logits[i], greatest), inverse_temperature);
  for (int i = 0; i < N; ++i) r[i] = Simd::max(r[i], Simd::set1(-22.0f));
  for (int i = 0; i < N; ++i) n[i] = Simd::add(Simd::mul(r[i], Simd::set1(1.44269504f)), rounding);
  for (int i = 0; i < N; ++i) p[i] = Simd::sub(n[i], rounding);
  // The product is exact, fused or not: n has five bits and the factor nine.
  for (int i = 0; i < N; ++i) r[i] = Simd::fma(p[i], Simd::set1(-0.693359375f), r[i]);
  for (int i = 0; i < N; ++i) r[i] = Simd::add(r[i], Simd::mul(p[i], Simd::set1(2.12194440e-4f)));
  for (int i = 0; i < N; ++i) p[i] = Simd::set1(1.9875691500e-4f);
  for (const float factor : factors)
    for (int i = 0; i < N; ++i) p[i] = Simd::add(Simd::mul(p[i], r[i]), Simd::set1(factor));
  for (int i = 0; i < N; ++i) p[i] = Simd::add(Simd::mul(Simd::mul(r[i], r[i]), p[i]), Simd::add(r[i], Simd::set1(1.0f)));
  for (int i = 0; i < N; ++i) weights[i] = Simd::whole(Simd::add(Simd::times_pow2(p[i], n[i]), Simd::set1(0.5f)));
}

void token_weights(const float* logits, int64_t count, float greatest, float inverse_temperature, int32_t* weights) {
  const V peak = Simd::set1(greatest), scale = Simd::set1(inverse_temperature);
  for (int64_t i = 0; i < count; i += kW) {
    const V x[] = {count - i >= kW ? Simd::load(logits + i) : Simd::load_part(logits + i, static_cast<int>(count - i))};
    Simd::Whole w;
    weights_of(x, peak, scale, &w);
    Simd::store_whole(weights + i, w);
  }
  for (int64_t i = count; i < kSampleBlock; ++i) weights[i] = 0;
}

inline Simd::Whole lane_numbers() {
  constexpr int32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Simd::load_whole(numbers);
}

template <bool kCollect>
inline int64_t weigh(const float* logits, int64_t count, const float* peaks, float greatest, float inverse_temperature,
                     int64_t* sums, int32_t lowest, int32_t first_id, int32_t* ids, int32_t* kept) {
  constexpr int kVectors = kSampleBlock / kW, kTogether = kW == 16 ? 8 : 4;  // by the number of registers
  const V peak = Simd::set1(greatest), scale = Simd::set1(inverse_temperature);
  const Simd::Whole least = Simd::whole1(lowest), lanes = lane_numbers();
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kSampleBlock, ++peaks, ++sums) {
    if ((*peaks - greatest) * inverse_temperature <= -22.0f) {  // all weights are 0
      *sums = 0;
      continue;
    }
    Simd::Whole weights[kVectors];
    if (count - begin >= kSampleBlock) {
      for (int i = 0; i < kVectors; i += kTogether) {
        V x[kTogether];
        for (int k = 0; k < kTogether; ++k) x[k] = Simd::load(logits + begin + (i + k) * kW);
        weights_of(x, peak, scale, weights + i);
      }
    } else {
      alignas(64) int32_t last[kSampleBlock];
      token_weights(logits + begin, count - begin, greatest, inverse_temperature, last);
      for (int i = 0; i < kVectors; ++i) weights[i] = Simd::load_whole(last + i * kW);
    }
    Simd::Sums sum = Simd::sums_zero();
    for (int i = 0; i < kVectors; i += 2) sum = Simd::sums_add(sum, Simd::add(weights[i], weights[i + 1]));  // up to 2^31
    *sums = Simd::sums_total(sum);
    if constexpr (kCollect) {
      Simd::Whole heaviest = weights[0];
      for (int i = 1; i < kVectors; ++i) heaviest = Simd::max(heaviest, weights[i]);
      if (!Simd::any_from(heaviest, least)) continue;
      Simd::Whole id = Simd::add(lanes, Simd::whole1(first_id + static_cast<int32_t>(begin)));
      for (int i = 0; i < kVectors; ++i) {
        found += Simd::keep_from(weights[i], least, id, ids + found, kept + found);
        id = Simd::add(id, Simd::whole1(kW));
      }
    }
  }
  return found;
}

int64_t weight_blocks(const float* logits, int64_t count, const float* peaks, float greatest, float inverse_temperature,
                      int64_t* sums, int32_t lowest, int32_t first_id, int32_t* ids, int32_t* kept) {
  return (ids ? weigh<true> : weigh<false>)(logits, count, peaks, greatest, inverse_temperature, sums, lowest, first_id,
                                            ids, kept);
}

int64_t sum_from(const int32_t* weights, int64_t count, int32_t lowest) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights[i] >= lowest ? static_cast<uint32_t>(weights[i]) : 0;
  return static_cast<int64_t>(sum);
}

int64_t collect(const int32_t* values, const int32_t* numbers, int64_t count, int32_t lowest, int32_t* ids, int32_t* kept) {
  const Simd::Whole least = Simd::whole1(lowest);
  int64_t found = 0, i = 0;
  for (; i + kW <= count; i += kW) {
    const Simd::Whole w = Simd::load_whole(values + i);
    if (Simd::any_from(w, least)) found += Simd::keep_from(w, least, Simd::load_whole(numbers + i), ids + found, kept + found);
  }
  for (; i < count; ++i) {  // without a branch, which would be mispredicted
    const int32_t id = numbers[i], value = values[i];
    ids[found] = id;
    kept[found] = value;
    found += value >= lowest;
  }
  return found;
}
