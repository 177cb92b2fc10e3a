// y = W x for many rows of x. Part of kernels.inl.
//
// The weights are a panel of fp32 blocks that stays in the second-level cache (weights of other stores are converted to it
// once, see widen). A tile of x stays in the first-level cache while the panel streams past, in steps of kStepBlocks blocks.
// Every dot product is the one of linear.inl: one accumulator, filled from column 0 upwards, then the same tree of sums. Where
// a tile of x is too wide for the first-level cache, it is taken in spans of columns, and the accumulators wait in memory.

constexpr int kStepBlocks = 4;
constexpr int kStepRows = kStepBlocks * kBlockRows;  // results of one row of x that are written together
constexpr int64_t kSpanBytes = 20 << 10;             // of a tile of x, at most

template <class T>
void widen_store(const PackedMatrix& w, int64_t block0, int64_t block1, float* panel) {
  const int64_t count = round_up(w.cols, kBlockCols) * kBlockRows;
  const T* from = static_cast<const T*>(w.data) + block0 * count;
  for (int64_t i = 0; i < (block1 - block0) * count; i += kW) Simd::store(panel + i, Simd::load(from + i));
}

void widen(const PackedMatrix& w, int64_t block0, int64_t block1, float* panel) {
  switch (w.store) {
    case Store::kBf16: return widen_store<Simd::Bf16>(w, block0, block1, panel);
    case Store::kFp16: return widen_store<Simd::Fp16>(w, block0, block1, panel);
    case Store::kInt8: return widen_store<int8_t>(w, block0, block1, panel);
    case Store::kFp32:
    case Store::kInt4:
    case Store::kInt8Quads: return;  // fp32 is a panel as it is; others: linear_int4, linear_int8
  }
}

// A span of columns of a tile of x against one block. kBegin, kEnd: the span is the first, the last; otherwise the
// accumulators come from and go to `saved`. dot[m * kStepRows + r].
template <int MT, bool kBegin, bool kEnd>
inline void span_tile(const float* x, int64_t ldx, const float* w, int64_t cols, float* saved, float* dot) {
  V acc[MT][4];
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) acc[m][r] = kBegin ? Simd::zero() : Simd::load(saved + (m * 4 + r) * kW);
  const int64_t whole = cols / kBlockCols * kBlockCols;
  for (int64_t k = 0; k < whole; k += kBlockCols) {
    for (int v = 0; v < kBlockCols; v += kW) {
      V xv[MT];
#pragma GCC unroll 8
      for (int m = 0; m < MT; ++m) {
        xv[m] = Simd::load(x + m * ldx + k + v);
        Simd::hold(xv[m]);
      }
      const float* wk = w + k * kBlockRows + v;
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const V wv = Simd::load(wk + r * kBlockCols);
#pragma GCC unroll 8
        for (int m = 0; m < MT; ++m) acc[m][r] = Simd::fma(xv[m], wv, acc[m][r]);
      }
    }
  }
  if constexpr (kEnd) {
    for (int64_t v = 0; whole + v < cols; v += kW) {  // x is read under a mask, the packed weights are padded with zeros
      const int n = static_cast<int>(cols - whole - v);
      V xv[MT];
      for (int m = 0; m < MT; ++m) xv[m] = Simd::load_part(x + m * ldx + whole + v, n);
      const float* wk = w + whole * kBlockRows + v;
      for (int r = 0; r < 4; ++r) {
        const V wv = Simd::load(wk + r * kBlockCols);
        for (int m = 0; m < MT; ++m) acc[m][r] = Simd::fma(xv[m], wv, acc[m][r]);
      }
    }
    if constexpr (MT % 2 == 0) {
#pragma GCC unroll 8
      for (int m = 0; m < MT; m += 2) Simd::sum8(acc[m], acc[m + 1], dot + m * kStepRows, dot + (m + 1) * kStepRows);
    } else {
      for (int m = 0; m < MT; ++m) Simd::sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3], dot + m * kStepRows);
    }
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < MT; ++m)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) Simd::store(saved + (m * 4 + r) * kW, acc[m][r]);
  }
}

// Stores the dot products of mt rows of x with up to kStepRows weight rows from row0 on; as write_block.
inline void write_step(const PackedMatrix& w, const Epilogue& e, int64_t row0, int64_t m0, int mt, const float* dot) {
  const int64_t n = lesser<int64_t>(kStepRows, w.rows - row0);
  if (n < kStepRows || e.index) {
    for (int64_t r = 0; r < n; r += kBlockRows) {
      float block[Simd::kTileM * kBlockRows];
      for (int m = 0; m < mt; ++m) std::memcpy(block + m * kBlockRows, dot + m * kStepRows + r, kBlockRows * sizeof(float));
      write_block(w, e, (row0 + r) / kBlockRows, m0, mt, block);
    }
    return;
  }
  const float* scale = w.store == Store::kInt8 ? static_cast<const float*>(w.scale) + row0 : nullptr;
  for (int v = 0; v < kStepRows; v += kW) {
    const V factor = scale ? Simd::load(scale + v) : Simd::set1(1.0f);
    const V bias = e.out && e.bias ? Simd::load(e.bias + row0 + v) : Simd::zero();
    for (int m = 0; m < mt; ++m) {
      V y = Simd::load(dot + m * kStepRows + v);
      if (scale) y = Simd::mul(y, factor);
      if (e.copy) Simd::store(e.copy + (m0 + m) * e.ld_copy + row0 + v, y);
      if (!e.out) continue;
      if (e.bias) y = Simd::add(y, bias);
      if (e.residual) y = Simd::add(y, Simd::load(e.residual + (m0 + m) * e.ld_residual + row0 + v));
      Simd::store(e.out + (m0 + m) * e.ld_out + row0 + v, y);
    }
  }
}

void linear_many(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, const float* panel, int64_t block0,
                 int64_t block1, const Epilogue& e) {
  constexpr int MT = Simd::kTileM;
  const int64_t K = w.cols, block_floats = round_up(K, kBlockCols) * kBlockRows;
  const int64_t spans = (K * MT * int64_t(sizeof(float)) + kSpanBytes - 1) / kSpanBytes;
  const int64_t span = round_up((K + spans - 1) / greater<int64_t>(spans, 1), kBlockCols);
  float dot[MT * kStepRows];
  alignas(64) float saved[kStepBlocks][MT * 4 * kW];
  int64_t m0 = 0;
  for (; m0 + MT <= M; m0 += MT) {
    const float* rows = x + m0 * ldx;
    for (int64_t step = block0; step < block1; step += kStepBlocks) {
      const int blocks = static_cast<int>(lesser<int64_t>(kStepBlocks, block1 - step));
      const float* weights = panel + (step - block0) * block_floats;
      if (K <= span) {
        for (int b = 0; b < blocks; ++b)
          span_tile<MT, true, true>(rows, ldx, weights + b * block_floats, K, nullptr, dot + b * kBlockRows);
      } else {
        for (int64_t k = 0; k < K; k += span) {
          for (int b = 0; b < blocks; ++b) {
            const float* at = weights + b * block_floats + k * kBlockRows;
            if (k == 0) {
              span_tile<MT, true, false>(rows, ldx, at, span, saved[b], nullptr);
            } else if (k + span < K) {
              span_tile<MT, false, false>(rows + k, ldx, at, span, saved[b], nullptr);
            } else {
              span_tile<MT, false, true>(rows + k, ldx, at, K - k, saved[b], dot + b * kBlockRows);
            }
          }
        }
      }
      write_step(w, e, step * kBlockRows, m0, MT, dot);
    }
  }
  if (m0 == M) return;
  const Ahead none{reinterpret_cast<const char*>(UINTPTR_MAX), nullptr};
  for (int64_t block = block0; block < block1; ++block)
    rows_of_block(x, ldx, w, panel + (block - block0) * block_floats, block, m0, M, e, none);
}
