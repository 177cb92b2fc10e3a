// int8 activations: x rounded to int8, with a scale for every group of 16 columns, meets int8 weights. Part of kernels.inl.
//
// The lanes of a vector are rows of the weights; four codes of x are broadcast to all lanes. The sum over a group is one of
// whole numbers, exact in any order; scaled, it is added to the sum of the groups before it. Every instruction set that has a
// fused multiply-add gives the same bits. See kernels/quantized_rows.py for the rounding.

// Groups whose greatest element is not above this are zero: 127 / peak and its products stay finite.
constexpr float kLeastPeak = 0x1p-100f;

// Sixteen elements to two codes each, the coarse ones first and the fine ones `apart` bytes behind; shares likewise. Neither code
// is below -127.
inline void quantize_group_finely(const float* x, float peak, int8_t* codes, CodeShare* shares, int64_t apart) {
  CodeShare& coarse_share = shares[0];
  CodeShare& fine_share = shares[apart / kCodeGroup];
  if (!(peak > kLeastPeak)) {
    std::memset(codes, 0, kCodeGroup);
    std::memset(codes + apart, 0, kCodeGroup);
    coarse_share = fine_share = {0.0f, 0};
    return;
  }
  constexpr float kMost = 127 * kFineCodes + 127;
  const V inverse = Simd::set1(kMost / peak), down = Simd::set1(1 / kFineCodes), up = Simd::set1(-kFineCodes);
  V coarse[kParts], fine[kParts];
  for (int p = 0; p < kParts; ++p) {
    const V whole = Simd::round(Simd::mul(Simd::load(x + p * kW), inverse));
    // The greatest lies half way to the coarse code beyond the last.
    const V near = Simd::round(Simd::mul(whole, down));
    coarse[p] = Simd::min(Simd::max(near, Simd::set1(-127.0f)), Simd::set1(127.0f));
    fine[p] = Simd::fma(coarse[p], up, whole);
  }
  const float scale = peak / kMost;
  coarse_share = {kFineCodes * scale, -128 * Simd::store_codes(codes, coarse)};
  fine_share = {scale, -128 * Simd::store_codes(codes + apart, fine)};
}

// Sixteen elements to codes of scale peak / 127.
inline CodeShare quantize_group(const float* x, float peak, int8_t* codes) {
  if (!(peak > kLeastPeak)) {
    std::memset(codes, 0, kCodeGroup);
    return {0.0f, 0};
  }
  V v[kParts];
  const V inverse = Simd::set1(127.0f / peak);
  for (int p = 0; p < kParts; ++p) v[p] = Simd::mul(Simd::load(x + p * kW), inverse);
  return {peak / 127.0f, -128 * Simd::store_codes(codes, v)};
}

// Four groups at x. `rows` of each tile. count: of the groups, at most 4.
inline void quantize_groups(const float* x, int count, int8_t* codes, CodeShare* shares, int64_t rows, int64_t parts) {
  const int64_t step = rows * parts * kCodeGroup;
  V top[4], odd[4];  // odd: not zero if an element is infinite or NaN
  for (int g = 0; g < 4; ++g) {
    top[g] = odd[g] = Simd::zero();
    for (int p = 0; p < kParts; ++p) {
      const V v = Simd::load(x + g * kCodeGroup + p * kW);
      top[g] = Simd::max(top[g], Simd::max(v, Simd::sub(Simd::zero(), v)));
      odd[g] = Simd::fma(v, Simd::zero(), odd[g]);
    }
  }
  float peak[4];
  Simd::maximum4(top[0], top[1], top[2], top[3], peak);
  const bool finite = Simd::sum(Simd::add(Simd::add(odd[0], odd[1]), Simd::add(odd[2], odd[3]))) == 0.0f;
  for (int g = 0; g < count; ++g) {
    const bool usable = finite || Simd::sum(odd[g]) == 0.0f;
    CodeShare* share = shares + g * step / kCodeGroup;
    if (parts == 2) {
      quantize_group_finely(x + g * kCodeGroup, usable ? peak[g] : 0.0f, codes + g * step, share, rows * kCodeGroup);
    } else {
      *share = quantize_group(x + g * kCodeGroup, usable ? peak[g] : 0.0f, codes + g * step);
    }
    if (!usable) share->scale = std::numeric_limits<float>::quiet_NaN();
  }
}

void quantize_rows(const float* x, int64_t ldx, int64_t K, int64_t row0, int64_t row1, const Int8Rows& to) {
  constexpr int64_t kFour = 4 * kCodeGroup;
  for (int64_t i = row0; i < row1; ++i) {
    const int64_t tile = i / kCodeTile, m = i % kCodeTile, rows = to.tile_rows(tile);
    const int64_t apart = rows * to.parts;
    int8_t* codes = to.tile_codes(tile) + m * kCodeGroup;
    CodeShare* shares = to.tile_shares(tile) + m;
    const float* from = x + i * ldx;
    int64_t k = 0;
    for (; k + kFour <= K; k += kFour)
      quantize_groups(from + k, 4, codes + k * apart, shares + k / kCodeGroup * apart, rows, to.parts);
    if (k < K) {
      float last[kFour] = {};
      std::memcpy(last, from + k, (K - k) * sizeof(float));
      quantize_groups(last, static_cast<int>((K - k + kCodeGroup - 1) / kCodeGroup), codes + k * apart,
                      shares + k / kCodeGroup * apart, rows, to.parts);
    }
  }
}

// Stores the dot products of mt rows of x with the sixteen weight rows of a block where the epilogue says, times the rows'
// scales; as write_block.
inline void write_lanes(const PackedMatrix& w, const Epilogue& e, int64_t block, int64_t m0, int mt, const float* dot) {
  const int64_t row0 = block * kLaneRows, n = lesser(kLaneRows, w.rows - row0);
  const float* scale = static_cast<const float*>(w.scale) + row0;
  if (n == kLaneRows && !e.index) {
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = row0 + p * kW;
      const V factor = Simd::load(scale + p * kW), bias = e.out && e.bias ? Simd::load(e.bias + at) : Simd::zero();
      for (int m = 0; m < mt; ++m) {
        V y = Simd::mul(Simd::load(dot + m * kLaneRows + p * kW), factor);
        if (e.copy) Simd::store(e.copy + (m0 + m) * e.ld_copy + at, y);
        if (!e.out) continue;
        if (e.bias) y = Simd::add(y, bias);
        if (e.residual) y = Simd::add(y, Simd::load(e.residual + (m0 + m) * e.ld_residual + at));
        Simd::store(e.out + (m0 + m) * e.ld_out + at, y);
      }
    }
    return;
  }
  // Scattered: scaled as vectors, then stored feature by feature.
  float scaled[kCodeTile * kLaneRows], factor[kLaneRows] = {};
  std::memcpy(factor, scale, n * sizeof(float));
  for (int p = 0; p < kParts; ++p) {
    const V by = Simd::load(factor + p * kW);
    for (int m = 0; m < mt; ++m) {
      const int64_t at = m * kLaneRows + p * kW;
      Simd::store(scaled + at, Simd::mul(Simd::load(dot + at), by));
    }
  }
  if (e.copy)
    for (int m = 0; m < mt; ++m)
      std::memcpy(e.copy + (m0 + m) * e.ld_copy + row0, scaled + m * kLaneRows, n * sizeof(float));
  if (!e.out) return;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t feature = e.index ? e.index[row0 + r] : row0 + r;
    const float* from = scaled + r;
    float* out = e.out + m0 * e.ld_out + feature;
    if (!e.bias && !e.residual) {
      for (int m = 0; m < mt; ++m) out[m * e.ld_out] = from[m * kLaneRows];
      continue;
    }
    const float bias = e.bias ? e.bias[feature] : 0.0f;
    const float* residual = e.residual ? e.residual + m0 * e.ld_residual + feature : nullptr;
    for (int m = 0; m < mt; ++m) {
      float y = from[m * kLaneRows];
      if (e.bias) y += bias;
      if (residual) y += residual[m * e.ld_residual];
      out[m * e.ld_out] = y;
    }
  }
}

// MT of the `rows` rows of a tile of x against one block. Without the pragmas GCC unrolls too late to keep the sums in
// registers.
template <int MT, bool kFetch>
inline void quads_tile(const int8_t* codes, const CodeShare* shares, int64_t rows, int64_t groups, int64_t parts, const uint8_t* w,
                       const Ahead& ahead, float* dot) {
  V total[MT][kParts];
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m)
    for (int p = 0; p < kParts; ++p) total[m][p] = Simd::zero();
  constexpr int64_t kBytes = kLaneRows * kCodeGroup;
  for (int64_t g = 0; g < groups; g += parts, w += kBytes) {
    for (int64_t p = 0; p < parts; ++p, codes += rows * kCodeGroup, shares += rows)
      Simd::add_group<MT>(total, w, codes, shares);
    if constexpr (kFetch) fetch_ahead(reinterpret_cast<const char*>(w), kBytes, ahead);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MT; ++m)
    for (int p = 0; p < kParts; ++p) Simd::store(dot + m * kLaneRows + p * kW, total[m][p]);
}

// The rows of a tile from `done` on, MT of them at a time.
template <int MT, bool kFetch>
inline void quads_tile_of(const int8_t* codes, const CodeShare* shares, int64_t rows, int64_t done, int64_t groups,
                          int64_t parts, const uint8_t* w, const Ahead& ahead, float* dot) {
  if constexpr (MT > 0) {
    if (rows - done < MT) return quads_tile_of<MT - 1, kFetch>(codes, shares, rows, done, groups, parts, w, ahead, dot);
    if (parts == 2) {
      quads_tile<MT, kFetch>(codes + done * kCodeGroup, shares + done, rows, groups, 2, w, ahead, dot + done * kLaneRows);
    } else {
      quads_tile<MT, kFetch>(codes + done * kCodeGroup, shares + done, rows, groups, 1, w, ahead, dot + done * kLaneRows);
    }
    if (done + MT < rows) quads_tile_of<MT, false>(codes, shares, rows, done + MT, groups, parts, w, ahead, dot);
  }
}

void linear_int8(const Int8Rows& x, int64_t row0, int64_t row1, const PackedMatrix& w, int64_t block0, int64_t block1,
                 const Epilogue& e, const Ahead& ahead) {
  const int64_t stride = block_bytes(w);
  for (int64_t block = block0; block < block1; ++block) {
    const uint8_t* weights = static_cast<const uint8_t*>(w.data) + block * stride;
    for (int64_t m = row0; m < row1; m += kCodeTile) {
      const int64_t tile = m / kCodeTile, rows = x.tile_rows(tile);
      float dot[kCodeTile * kLaneRows];
      if (m == row0) {  // the tiles after it find the block in the cache
        quads_tile_of<Simd::kQuadsTileM, true>(x.tile_codes(tile), x.tile_shares(tile), rows, 0, x.groups, x.parts, weights, ahead,
                                               dot);
      } else {
        quads_tile_of<Simd::kQuadsTileM, false>(x.tile_codes(tile), x.tile_shares(tile), rows, 0, x.groups, x.parts, weights, ahead,
                                                dot);
      }
      write_lanes(w, e, block, m, static_cast<int>(rows), dot);
    }
  }
}
