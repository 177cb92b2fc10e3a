// Full attention over one window of an encoder. Part of kernels.inl.
//
// A window's keys and values are packed once per KV head, in blocks of kKeyBlock positions: keys [head_dim][kKeyBlock], so
// that one vector holds one dimension of many keys, then values [kKeyBlock][round_up(head_dim, 16)]. A block and
// kEncoderRows queries stay in the first-level cache. Scores of a block exist for one tile of queries at a time, to the
// base 2.
//
// Order of sums. A running softmax (Milakov and Gimelshein 2018) takes one block after the other. Each lane of the sum of
// weights is a chain of its own. No operation mixes queries, so a row's bits depend on its window alone.

constexpr int kEncoderQ = Simd::kTileM;  // queries of a tile
constexpr int kEncoderTiles = kEncoderRows / kEncoderQ;
static_assert(kEncoderRows % kEncoderQ == 0 && kKeyBlock % (4 * kW) == 0, "whole tiles, and whole groups of vectors");

// 2^x for x <= 0, error below 3 ulp on [-126, 0], clamped below. A third fewer instructions than exp_ps. The coefficients
// are a minimax fit of 2^r on [-1/2, 1/2] through 1 at 0.
inline V exp2_ps(V x) {
  x = Simd::max(Simd::set1(-126.0f), x);  // a NaN is kept as second operand
  const V rounding = Simd::set1(12582912.0f);  // 1.5 x 2^23: the whole number is in the low bits of the sum
  const V shifted = Simd::add(x, rounding), r = Simd::sub(x, Simd::sub(shifted, rounding));
  V p = Simd::set1(1.32647273e-3f);
  p = Simd::fma(p, r, Simd::set1(9.67151299e-3f));
  p = Simd::fma(p, r, Simd::set1(5.55073358e-2f));
  p = Simd::fma(p, r, Simd::set1(2.40222424e-1f));
  p = Simd::fma(p, r, Simd::set1(6.93147004e-1f));
  p = Simd::fma(p, r, Simd::set1(1.0f));
  // A product, since adding to the exponent could make a NaN a number.
  return Simd::mul(p, Simd::times_pow2(Simd::set1(1.0f), shifted));
}

// Rows of a window lie pages of memory apart, so the hardware does not predict them.
constexpr int64_t kRowsAhead = 12;
inline void fetch_row(const float* row, int64_t D) {
  for (int64_t d = 0; d < D; d += 16) Simd::prefetch(reinterpret_cast<const char*>(row + d));
}

void pack_window(const float* k, const float* v, int64_t ld, int64_t rows, int64_t head_dim, float* packed) {
  const int64_t D = head_dim, DV = round_up(D, 16);
  for (int64_t first = 0; first < rows; first += kKeyBlock) {
    const int64_t count = lesser(kKeyBlock, rows - first);
    float *keys = packed, *values = packed + D * kKeyBlock;
    for (int64_t j = 0; j < count; ++j) {
      const float *key = k + (first + j) * ld, *value = v + (first + j) * ld;
      const int64_t ahead = lesser(first + j + kRowsAhead, rows - 1) * ld;
      fetch_row(k + ahead, D);
      fetch_row(v + ahead, D);
      for (int64_t d = 0; d < D; ++d) keys[d * kKeyBlock + j] = key[d];
      std::memcpy(values + j * DV, value, D * sizeof(float));
      for (int64_t d = D; d < DV; ++d) values[j * DV + d] = 0.0f;
    }
    for (int64_t d = 0; d < D; ++d)
      for (int64_t j = count; j < kKeyBlock; ++j) keys[d * kKeyBlock + j] = 0.0f;
    packed += kKeyBlock * (D + DV);
  }
}

// Scores of NV vectors of keys for a tile of queries, q [head_dim][kEncoderQ].
template <int NV>
inline void encoder_scores(const float* q, const float* keys, int64_t D, float* score) {
  V sum[kEncoderQ][NV];
  for (int i = 0; i < kEncoderQ; ++i)
    for (int n = 0; n < NV; ++n) sum[i][n] = Simd::zero();
  for (int64_t d = 0; d < D; ++d, q += kEncoderQ, keys += kKeyBlock) {
    V key[NV];
    for (int n = 0; n < NV; ++n) key[n] = Simd::load(keys + n * kW);
    for (int i = 0; i < kEncoderQ; ++i) {
      const V one = Simd::set1(q[i]);
      for (int n = 0; n < NV; ++n) sum[i][n] = Simd::fma(one, key[n], sum[i][n]);
    }
  }
  for (int i = 0; i < kEncoderQ; ++i)
    for (int n = 0; n < NV; ++n) Simd::store(score + i * kKeyBlock + n * kW, sum[i][n]);
}

// Adds `count` weighted values, NV vectors of them, to a tile's sums.
template <int NV>
inline void encoder_values(const float* weight, const float* values, int64_t count, int64_t DV, float* sums) {
  V sum[kEncoderQ][NV];
  for (int i = 0; i < kEncoderQ; ++i)
    for (int n = 0; n < NV; ++n) sum[i][n] = Simd::load(sums + i * DV + n * kW);
  for (int64_t j = 0; j < count; ++j, values += DV) {
    V value[NV];
    for (int n = 0; n < NV; ++n) value[n] = Simd::load(values + n * kW);
    for (int i = 0; i < kEncoderQ; ++i) {
      const V p = Simd::set1(weight[i * kKeyBlock + j]);
      for (int n = 0; n < NV; ++n) sum[i][n] = Simd::fma(p, value[n], sum[i][n]);
    }
  }
  for (int i = 0; i < kEncoderQ; ++i)
    for (int n = 0; n < NV; ++n) Simd::store(sums + i * DV + n * kW, sum[i][n]);
}

// The running softmax of a tile of queries.
struct EncoderState {
  float maximum[kEncoderQ];
  V total[kEncoderQ];  // of the weights, by lane
};

// The scores of `count` keys become weights relative to 2^maximum. What was summed before is scaled to a new maximum.
// kWhole: count is kKeyBlock.
template <bool kWhole>
inline void encoder_softmax(EncoderState& s, float* score, int64_t count, int64_t DV, float* sums) {
  const int64_t padded = kWhole ? kKeyBlock : round_up(count, kW);
  V top[kEncoderQ];
  for (int i = 0; i < kEncoderQ; ++i) {
    float* p = score + i * kKeyBlock;
    for (int64_t j = count; j < padded; ++j) p[j] = kNothing;
    top[i] = Simd::load(p);
    for (int64_t j = kW; j < padded; j += kW) top[i] = Simd::max(top[i], Simd::load(p + j));
  }
  float found[(kEncoderQ + 3) / 4 * 4];
  for (int i = 0; i < kEncoderQ; i += 4) {
    const auto at = [&](int place) { return top[lesser(i + place, kEncoderQ - 1)]; };
    Simd::maximum4(at(0), at(1), at(2), at(3), found + i);
  }
  for (int i = 0; i < kEncoderQ; ++i) {
    const float maximum = greater(s.maximum[i], found[i]);
    if (maximum == s.maximum[i]) continue;
    const bool none = s.maximum[i] == kNothing;
    const V factor = none ? Simd::zero() : exp2_ps(Simd::set1(s.maximum[i] - maximum));
    float* sum = sums + i * DV;
    for (int64_t d = 0; d < DV; d += kW) Simd::store(sum + d, Simd::mul(factor, Simd::load(sum + d)));
    s.total[i] = Simd::mul(factor, s.total[i]);
    s.maximum[i] = maximum;
  }
  for (int i = 0; i < kEncoderQ; ++i) {
    float* p = score + i * kKeyBlock;
    const V maximum = Simd::set1(s.maximum[i]);
    for (int64_t j = 0; j < padded; j += kW) Simd::store(p + j, exp2_ps(Simd::sub(Simd::load(p + j), maximum)));
    for (int64_t j = count; j < padded; ++j) p[j] = 0.0f;
    V total = s.total[i];
    for (int64_t j = 0; j < padded; j += kW) total = Simd::add(total, Simd::load(p + j));
    s.total[i] = total;
  }
}

inline void encoder_block(EncoderState& s, const float* q, const float* block, int64_t count, int64_t D, int64_t DV,
                          float* sums) {
  alignas(64) float score[kEncoderQ * kKeyBlock];
  int64_t j = 0;
  for (; j + 4 * kW <= round_up(count, kW); j += 4 * kW) encoder_scores<4>(q, block + j, D, score + j);
  for (; j < count; j += kW) encoder_scores<1>(q, block + j, D, score + j);
  if (count == kKeyBlock) {
    encoder_softmax<true>(s, score, kKeyBlock, DV, sums);
  } else {
    encoder_softmax<false>(s, score, count, DV, sums);
  }
  const float* values = block + D * kKeyBlock;
  int64_t d = 0;
  for (; d + 4 * kW <= DV; d += 4 * kW) encoder_values<4>(score, values + d, count, DV, sums + d);
  for (; d < DV; d += kW) encoder_values<1>(score, values + d, count, DV, sums + d);
}

void encoder_attention(const float* q, int64_t ldq, int64_t count, const float* packed, int64_t rows, int64_t head_dim,
                       float scale, float* work, float* out, int64_t ldo) {
  const int64_t D = head_dim, DV = round_up(D, 16);
  float *sums = work, *scaled = work + kEncoderRows * DV;
  scale *= 1.44269504f;  // log2(e)
  for (int64_t first = 0; first < count; first += kEncoderRows) {
    const int64_t here = lesser(kEncoderRows, count - first);
    const int tiles = static_cast<int>((here + kEncoderQ - 1) / kEncoderQ);
    EncoderState state[kEncoderTiles];
    for (int t = 0; t < tiles; ++t) {
      for (int i = 0; i < kEncoderQ; ++i) {
        // An unused place repeats the last query.
        const float* from = q + lesser(first + t * kEncoderQ + i, count - 1) * ldq;
        for (int64_t d = 0; d < D; ++d) scaled[(t * D + d) * kEncoderQ + i] = from[d] * scale;
        state[t].maximum[i] = kNothing;
        state[t].total[i] = Simd::zero();
      }
    }
    std::memset(sums, 0, tiles * kEncoderQ * DV * sizeof(float));
    for (int64_t r = 0; r < kEncoderRows && first + kEncoderRows + r < count; ++r)
      fetch_row(q + (first + kEncoderRows + r) * ldq, D);
    const float* block = packed;
    for (int64_t key = 0; key < rows; key += kKeyBlock, block += kKeyBlock * (D + DV))
      for (int t = 0; t < tiles; ++t)
        encoder_block(state[t], scaled + t * D * kEncoderQ, block, lesser(kKeyBlock, rows - key), D, DV,
                      sums + t * kEncoderQ * DV);
    for (int64_t r = 0; r < here; ++r) {
      const float inverse = 1.0f / Simd::sum(state[r / kEncoderQ].total[r % kEncoderQ]);
      for (int64_t d = 0; d < D; ++d) out[(first + r) * ldo + d] = sums[r * DV + d] * inverse;
    }
  }
}
