// Passes over rows of logits for sampling. Part of kernels.inl. The definition of every number is in kernels/sampling.py.
//
// Every float is made by separate IEEE operations, none of them fused, and sums are of integers: so the results are the same
// bits with every instruction set. The loops over integers are plain, for the compiler to vectorize.

bool logit_peaks(const float* logits, int64_t count, float* peaks) {
  constexpr int kChains = kSampleBlock / kW;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  // The sums of a row are NaN where a logit is, or where infinities meet: only then are the logits looked at one by one.
  V sums[kChains];
  for (V& sum : sums) sum = Simd::zero();
  int64_t begin = 0;
  for (; begin + kSampleBlock <= count; begin += kSampleBlock) {
    V peak = Simd::set1(kLowest);
    for (int i = 0; i < kChains; ++i) {
      const V v = Simd::load(logits + begin + i * kW);
      sums[i] = Simd::add(sums[i], v);
      peak = Simd::max(v, peak);
    }
    *peaks++ = Simd::maximum(peak);
  }
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

inline V weights_of(V logits, V greatest, V inverse_temperature) {  // whole once their fractions are cut off
  const V rounding = Simd::set1(12582912.0f);  // 1.5 x 2^23: adding and subtracting it rounds to a whole number
  V x = Simd::mul(Simd::sub(logits, greatest), inverse_temperature);
  x = Simd::max(x, Simd::set1(-22.0f));
  const V n = Simd::sub(Simd::add(Simd::mul(x, Simd::set1(1.44269504f)), rounding), rounding);
  V r = Simd::sub(x, Simd::mul(n, Simd::set1(0.693359375f)));
  r = Simd::add(r, Simd::mul(n, Simd::set1(2.12194440e-4f)));
  V p = Simd::set1(1.9875691500e-4f);
  p = Simd::add(Simd::mul(p, r), Simd::set1(1.3981999507e-3f));
  p = Simd::add(Simd::mul(p, r), Simd::set1(8.3334519073e-3f));
  p = Simd::add(Simd::mul(p, r), Simd::set1(4.1665795894e-2f));
  p = Simd::add(Simd::mul(p, r), Simd::set1(1.6666665459e-1f));
  p = Simd::add(Simd::mul(p, r), Simd::set1(5.0000001201e-1f));
  p = Simd::add(Simd::mul(Simd::mul(r, r), p), Simd::add(r, Simd::set1(1.0f)));
  p = Simd::mul(p, Simd::pow2i(Simd::add(n, Simd::set1(30.0f))));
  return Simd::add(p, Simd::set1(0.5f));
}

void token_weights(const float* logits, int64_t count, float greatest, float inverse_temperature, int32_t* weights) {
  const V peak = Simd::set1(greatest), scale = Simd::set1(inverse_temperature);
  for (int64_t i = 0; i < count; i += kW) {
    const V x = count - i >= kW ? Simd::load(logits + i) : Simd::load_part(logits + i, static_cast<int>(count - i));
    Simd::store_whole(weights + i, weights_of(x, peak, scale));
  }
  for (int64_t i = count; i < kSampleBlock; ++i) weights[i] = 0;
}

void weight_blocks(const float* logits, int64_t count, const float* peaks, float greatest, float inverse_temperature,
                   int64_t* sums, int32_t* heaviest, int32_t* weights) {
  const V peak = Simd::set1(greatest), scale = Simd::set1(inverse_temperature);
  alignas(64) int32_t here[kSampleBlock];
  for (int64_t begin = 0; begin < count; begin += kSampleBlock, ++peaks, ++sums, ++heaviest) {
    if ((*peaks - greatest) * inverse_temperature <= -22.0f) {  // all weights are 0
      *sums = *heaviest = 0;
      if (weights) std::memset(weights + begin, 0, sizeof here);
      continue;
    }
    int32_t* to = weights ? weights + begin : here;
    if (count - begin >= kSampleBlock) {
      for (int64_t i = 0; i < kSampleBlock; i += kW)
        Simd::store_whole(to + i, weights_of(Simd::load(logits + begin + i), peak, scale));
    } else {
      token_weights(logits + begin, count - begin, greatest, inverse_temperature, to);
    }
    uint64_t sum = 0;
    for (int64_t i = 0; i < kSampleBlock; ++i) sum += static_cast<uint32_t>(to[i]);
    int32_t heavy = 0;
    for (int64_t i = 0; i < kSampleBlock; ++i) heavy = heavy < to[i] ? to[i] : heavy;
    *sums = static_cast<int64_t>(sum);
    *heaviest = heavy;
  }
}

int64_t sum_from(const int32_t* weights, int64_t count, int32_t lowest) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights[i] >= lowest ? static_cast<uint32_t>(weights[i]) : 0;
  return static_cast<int64_t>(sum);
}

int64_t collect(const int32_t* values, int64_t count, int32_t lowest, int32_t first_id, int32_t* ids, int32_t* kept) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += 16) {
    const int64_t n = lesser<int64_t>(16, count - begin);
    int32_t peak = values[begin];
    for (int64_t i = 0; i < n; ++i) peak = peak < values[begin + i] ? values[begin + i] : peak;
    if (peak < lowest) continue;
    for (int64_t i = begin; i < begin + n; ++i) {  // without a branch: which ones are kept is not foreseeable
      ids[found] = first_id + static_cast<int32_t>(i);
      kept[found] = values[i];
      found += values[i] >= lowest;
    }
  }
  return found;
}
