// Passes over rows of logits for sampling. Part of kernels.inl. The definition of every number is in kernels/sampling.py.
//
// Every float is made by separate IEEE operations, none of them fused, and sums are of integers: so the results are the same
// bits with every instruction set. The loops over integers are plain, for the compiler to vectorize.

// Peaks and largest magnitudes of blocks, as keys (kernels.h: logit_key).
int32_t logit_peaks(const float* logits, int64_t count, int32_t* peaks) {
  int32_t worst = 0;
  for (int64_t begin = 0; begin < count; begin += kSampleBlock) {
    const int64_t n = lesser<int64_t>(kSampleBlock, count - begin);
    int32_t bits[kSampleBlock];
    std::memcpy(bits, logits + begin, n * sizeof(float));
    int32_t peak = INT32_MIN;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t magnitude = bits[i] & 0x7fffffff, sign = bits[i] >> 31;
      const int32_t key = (magnitude ^ sign) - sign;
      peak = peak < key ? key : peak;
      worst = worst < magnitude ? magnitude : worst;
    }
    *peaks++ = peak;
  }
  return worst;
}

void mask_logits(float* logits, int64_t count, const uint32_t* mask) {
  for (int64_t begin = 0; begin < count; begin += 32, ++mask) {
    if (*mask == 0xffffffffu) continue;
    const int64_t n = lesser<int64_t>(32, count - begin);
    for (int64_t i = 0; i < n; ++i)
      logits[begin + i] = *mask >> i & 1 ? logits[begin + i] : -std::numeric_limits<float>::infinity();
  }
}

// One block of at most kSampleBlock tokens; weights beyond `count` are 0.
void token_weights(const float* logits, int64_t count, float greatest, float inverse_temperature, int32_t* weights) {
  const V rounding = Simd::set1(12582912.0f);  // 1.5 x 2^23: adding and subtracting it rounds to a whole number
  for (int64_t i = 0; i < count; i += kW) {
    V x = count - i >= kW ? Simd::load(logits + i) : Simd::load_part(logits + i, static_cast<int>(count - i));
    x = Simd::mul(Simd::sub(x, Simd::set1(greatest)), Simd::set1(inverse_temperature));
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
    Simd::store_whole(weights + i, Simd::add(p, Simd::set1(0.5f)));
  }
  for (int64_t i = count; i < kSampleBlock; ++i) weights[i] = 0;
}

void weight_blocks(const float* logits, int64_t count, float greatest, float inverse_temperature, int64_t* sums,
                   int32_t* peaks) {
  for (int64_t begin = 0; begin < count; begin += kSampleBlock) {
    int32_t weights[kSampleBlock];
    token_weights(logits + begin, lesser<int64_t>(kSampleBlock, count - begin), greatest, inverse_temperature, weights);
    uint64_t sum = 0;
    for (const int32_t weight : weights) sum += static_cast<uint32_t>(weight);
    int32_t peak = 0;
    for (const int32_t weight : weights) peak = peak < weight ? weight : peak;
    *sums++ = static_cast<int64_t>(sum);
    *peaks++ = peak;
  }
}
