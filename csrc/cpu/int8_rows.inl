// int8 activations: rows of x rounded to int8 meet int8 weights, and the sums are exact. Part of kernels.inl.
// See kernels/quantized_rows.py for the rounding. Where the instruction needs unsigned codes of x (kInt8Shifted), they are
// kept 128 too high, and the sums of the weights' codes are taken off. Simd::store_codes writes codes so.

constexpr int8_t kZeroCode = Simd::kInt8Shifted ? -128 : 0;

void quantize_rows(const float* x, int64_t ldx, int64_t K, int64_t row0, int64_t row1, int8_t* codes, int64_t ld,
                   float* scale) {
  for (int64_t i = row0; i < row1; ++i) {
    const float* from = x + i * ldx;
    int8_t* to = codes + i * ld;
    // In four chains, which hide each other's latency. odd: not zero if an element is infinite or NaN.
    V top[4], odd[4];
    for (int c = 0; c < 4; ++c) top[c] = odd[c] = Simd::zero();
    const auto look = [&](V v, int c) {
      top[c] = Simd::max(top[c], Simd::max(v, Simd::sub(Simd::zero(), v)));
      odd[c] = Simd::fma(v, Simd::zero(), odd[c]);
    };
    int64_t at = 0;
    for (; at + 4 * kW <= K; at += 4 * kW)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) look(Simd::load(from + at + c * kW), c);
    for (; at < K; at += kW) look(Simd::load_part(from + at, static_cast<int>(lesser<int64_t>(kW, K - at))), 0);
    const bool finite = Simd::sum(Simd::add(Simd::add(odd[0], odd[1]), Simd::add(odd[2], odd[3]))) == 0.0f;
    const V greatest = Simd::max(Simd::max(top[0], top[1]), Simd::max(top[2], top[3]));
    const float peak = finite ? Simd::maximum(greatest) : 0.0f;
    const V inverse = Simd::set1(peak > 0.0f ? 127.0f / peak : 0.0f);
    scale[i] = finite ? peak / 127.0f : std::numeric_limits<float>::quiet_NaN();
    std::memset(to + K / 16 * 16, kZeroCode, ld - K / 16 * 16);
    const auto code = [&](V v) {
      return Simd::min(Simd::max(Simd::round(Simd::mul(v, inverse)), Simd::set1(-127.0f)), Simd::set1(127.0f));
    };
    const int64_t whole = K / kW * kW;
    for (int64_t k = 0; k < whole; k += kW) Simd::store_codes(to + k, code(Simd::load(from + k)));
    if (whole < K) {
      int8_t last[kW];
      Simd::store_codes(last, code(Simd::load_part(from + whole, static_cast<int>(K - whole))));
      std::memcpy(to + whole, last, K - whole);
    }
  }
}

// MT rows of x against NB blocks of four weight rows: sums[(b * MT + m) * 4 + r]. Without the pragmas GCC unrolls too late to
// keep the sums in registers.
template <int MT, int NB, bool kFetch>
inline void int8_tile(const int8_t* x, int64_t ldx, const int8_t* w, int64_t block_stride, int64_t cols,
                      const Ahead& ahead, int32_t* sums) {
  using Sums = typename Simd::Int8Sums;
  Sums acc[NB][MT];
#pragma GCC unroll 8
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) acc[b][m] = Simd::int8_zero();
  for (int64_t k = 0; k < cols; k += kBlockCols) {
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) {
      const int8_t* wk = w + b * block_stride + k * kBlockRows;
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) acc[b][m] = Simd::int8_add(acc[b][m], x + m * ldx + k, wk);
      if constexpr (kFetch) fetch_ahead(reinterpret_cast<const char*>(wk), 64, ahead);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m) Simd::int8_sums(acc[b][m], sums + (b * MT + m) * 4);
}

template <int MT, int NB, bool kFetch>
inline void int8_tile_and_write(const Int8Rows& x, const PackedMatrix& w, int64_t block, int64_t m0, const Epilogue& e,
                                const Ahead& ahead) {
  const int64_t stride = round_up(w.cols, kBlockCols) * kBlockRows;
  int32_t sums[NB * MT * 4];
  int8_tile<MT, NB, kFetch>(x.codes + m0 * x.ld, x.ld, static_cast<const int8_t*>(w.data) + block * stride, stride,
                            w.cols, ahead, sums);
  typedef int32_t I4 __attribute__((vector_size(16)));
  typedef float F4 __attribute__((vector_size(16)));
  float dot[NB * MT * 4];
  for (int b = 0; b < NB; ++b) {
    const int64_t row0 = (block + b) * kBlockRows, rows = lesser(kBlockRows, w.rows - row0);
    I4 correction = {};
    if (Simd::kInt8Shifted) std::memcpy(&correction, w.row_sum + row0, rows * sizeof(int32_t));
    correction *= 128;
    for (int m = 0; m < MT; ++m) {
      I4 sum;
      std::memcpy(&sum, sums + (b * MT + m) * 4, sizeof sum);
      const F4 value = __builtin_convertvector(sum - correction, F4) * x.scale[m0 + m];
      std::memcpy(dot + (b * MT + m) * 4, &value, sizeof value);
    }
    write_block(w, e, block + b, m0, MT, dot + b * MT * 4);
  }
}

template <int MT, int NB, bool kFetch>
inline void int8_tile_of(int64_t rows, const Int8Rows& x, const PackedMatrix& w, int64_t block, int64_t m0,
                         const Epilogue& e, const Ahead& ahead) {
  if constexpr (MT > 0) {
    if (rows == MT) {
      int8_tile_and_write<MT, NB, kFetch>(x, w, block, m0, e, ahead);
    } else {
      int8_tile_of<MT - 1, NB, kFetch>(rows, x, w, block, m0, e, ahead);
    }
  }
}

// Rows [m0, m1) of x against NB blocks. Only the first tile prefetches: the tiles after it find the blocks in the
// cache.
template <int NB>
inline void int8_rows_of_blocks(const Int8Rows& x, const PackedMatrix& w, int64_t block, int64_t m0, int64_t m1,
                                const Epilogue& e, const Ahead& ahead) {
  constexpr int MT = Simd::kInt8TileM;
  if (m1 - m0 < MT) return int8_tile_of<MT - 1, NB, true>(m1 - m0, x, w, block, m0, e, ahead);
  int8_tile_and_write<MT, NB, true>(x, w, block, m0, e, ahead);
  for (m0 += MT; m0 + MT <= m1; m0 += MT) int8_tile_and_write<MT, NB, false>(x, w, block, m0, e, ahead);
  int8_tile_of<MT - 1, NB, false>(m1 - m0, x, w, block, m0, e, ahead);
}

// Rows [m0, m1) of x against the blocks [block, block1), a multiple of four, in tiles whose sums are finished as vectors.
// Simd without int8_dots: none of them. Returns the first row that is left.
template <class S>
int64_t int8_many(const Int8Rows& x, const PackedMatrix& w, int64_t block, int64_t block1, int64_t m0, int64_t m1,
                  const Epilogue& e) {
  if constexpr (S::kInt8ManyM > 0) {
    constexpr int MT = S::kInt8ManyM;
    using Sums = typename S::Int8Sums;
    const int64_t K = round_up(w.cols, kBlockCols), stride = K * kBlockRows;
    float dot[MT * kStepRows];
    for (; m0 + MT <= m1; m0 += MT) {
      const int8_t* rows = x.codes + m0 * x.ld;
      for (int64_t step = block; step < block1; step += 4) {
        const int8_t* weights = static_cast<const int8_t*>(w.data) + step * stride;
        Sums acc[MT][4];
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) acc[m][b] = S::int8_zero();
        for (int64_t k = 0; k < K; k += kBlockCols) {
#pragma GCC unroll 4
          for (int b = 0; b < 4; ++b) {
#pragma GCC unroll 8
            for (int m = 0; m < MT; ++m)
              acc[m][b] = S::int8_add(acc[m][b], rows + m * x.ld + k, weights + b * stride + k * kBlockRows);
          }
        }
        const int64_t row0 = step * kBlockRows;
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m) {
          const V sums = S::int8_dots(acc[m], w.row_sum + row0);
          S::store(dot + m * kStepRows, S::mul(sums, S::set1(x.scale[m0 + m])));
        }
        write_step(w, e, row0, m0, MT, dot);
      }
    }
  }
  return m0;
}

void linear_int8(const Int8Rows& x, int64_t M, const PackedMatrix& w, int64_t block0, int64_t block1, const Epilogue& e,
                 const Ahead& ahead) {
  constexpr int MT = Simd::kInt8TileM, NB = Simd::kInt8Blocks;
  if (M == 1) {  // one stream of weights
    for (int64_t block = block0; block < block1; ++block) int8_tile_and_write<1, 1, true>(x, w, block, 0, e, ahead);
    return;
  }
  if constexpr (Simd::kInt8ManyM > 0) {
    const int64_t whole = block0 + lesser(block1 - block0, w.rows / kBlockRows - block0) / 4 * 4;
    if (M >= 2 * Simd::kInt8ManyM && whole > block0) {
      const int64_t left = int8_many<Simd>(x, w, block0, whole, 0, M, e);
      for (int64_t block = block0; left < M && block < whole; block += NB)
        int8_rows_of_blocks<NB>(x, w, block, left, M, e, ahead);
      for (int64_t block = whole; block < block1; ++block) int8_rows_of_blocks<1>(x, w, block, 0, M, e, ahead);
      return;
    }
  }
  const int64_t panel = greater<int64_t>(MT, (512 << 10) / greater<int64_t>(x.ld, 1) / MT * MT);
  for (int64_t p0 = 0; p0 < M; p0 += panel) {
    const int64_t p1 = lesser(p0 + panel, M);
    int64_t block = block0;
    for (; block + NB <= block1; block += NB) int8_rows_of_blocks<NB>(x, w, block, p0, p1, e, ahead);
    for (; block < block1; ++block) int8_rows_of_blocks<1>(x, w, block, p0, p1, e, ahead);
  }
}
