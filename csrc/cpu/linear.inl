// y = W x for float and int8 weights, and the epilogue that stores a result. Part of kernels.inl.

constexpr int64_t kPrefetchDistance = 8192;  // bytes; the best of 4 to 32 KiB, into the second-level cache

// With one row of x the memory is the limit, and hardware prefetchers do not follow such short streams across blocks.
// So the kernel prefetches the bytes that it reads some microseconds later. A prefetch past the end of memory does
// nothing.
inline const char* place_ahead(const char* at, const Ahead& ahead) {
  const char* from = at + kPrefetchDistance;
  return from < ahead.limit ? from : ahead.next + (from - ahead.limit);
}
inline void fetch_ahead(const char* at, int64_t bytes, const Ahead& ahead) {
  const char* from = place_ahead(at, ahead);
  for (int64_t line = 0; line < bytes; line += 64) Simd::prefetch(from + line);
}

// Multiplies MT rows of x with a block of four weight rows, into dot[m * 4 + r]. For one row of x, four sums hide enough of
// the multiply-add's latency to keep up with memory, and one stream of weights is read faster than two.
template <class T, int MT, bool kFetch>
inline void tile(const float* x, int64_t ldx, const T* w, int64_t cols, const Ahead& ahead, float* dot) {
  V acc[MT][4];
  for (int m = 0; m < MT; ++m)
    for (int r = 0; r < 4; ++r) acc[m][r] = Simd::zero();
  const int64_t whole = cols / kBlockCols * kBlockCols;
  for (int64_t k = 0; k < whole; k += kBlockCols) {
    for (int v = 0; v < kBlockCols; v += kW) {
      V xv[MT];
      for (int m = 0; m < MT; ++m) {
        xv[m] = Simd::load(x + m * ldx + k + v);
        Simd::hold(xv[m]);
      }
      const T* wk = w + k * kBlockRows + v;
      for (int r = 0; r < 4; ++r) {
        const V wv = Simd::load(wk + r * kBlockCols);
        for (int m = 0; m < MT; ++m) acc[m][r] = Simd::fma(xv[m], wv, acc[m][r]);
      }
    }
    if constexpr (kFetch) {
      fetch_ahead(reinterpret_cast<const char*>(w + k * kBlockRows), kBlockRows * kBlockCols * sizeof(T), ahead);
    }
  }
  // The last columns: x is read under a mask, the packed weights are padded with zeros.
  for (int64_t v = 0; whole + v < cols; v += kW) {
    const int n = static_cast<int>(cols - whole - v);
    V xv[MT];
    for (int m = 0; m < MT; ++m) xv[m] = Simd::load_part(x + m * ldx + whole + v, n);
    const T* wk = w + whole * kBlockRows + v;
    for (int r = 0; r < 4; ++r) {
      const V wv = Simd::load(wk + r * kBlockCols);
      for (int m = 0; m < MT; ++m) acc[m][r] = Simd::fma(xv[m], wv, acc[m][r]);
    }
  }
  for (int m = 0; m < MT; ++m) Simd::sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3], dot + m * 4);
}

// Stores the dot products of mt rows of x with a block of four weight rows where the epilogue says. scale: per row of
// the block, or null.
inline void write_whole_block(const float* scale, const Epilogue& e, int64_t row0, int64_t m0, int mt, const float* dot) {
  float factor[4] = {1, 1, 1, 1}, bias[4];
  if (scale) std::memcpy(factor, scale, sizeof factor);
  int64_t to[4];
  for (int r = 0; r < 4; ++r) to[r] = e.index ? e.index[row0 + r] : row0 + r;
  if (e.bias)
    for (int r = 0; r < 4; ++r) bias[r] = e.bias[to[r]];
  float* copy = e.copy ? e.copy + m0 * e.ld_copy + row0 : nullptr;
  float* out = e.out ? e.out + m0 * e.ld_out : nullptr;
  const float* residual = e.out && e.residual ? e.residual + m0 * e.ld_residual : nullptr;
  for (int m = 0; m < mt; ++m) {
    float y[4];
    for (int r = 0; r < 4; ++r) y[r] = dot[m * 4 + r] * factor[r];
    if (copy) {
      std::memcpy(copy, y, sizeof y);
      copy += e.ld_copy;
    }
    if (!out) continue;
    if (e.bias)
      for (int r = 0; r < 4; ++r) y[r] += bias[r];
    if (residual) {
      for (int r = 0; r < 4; ++r) y[r] += residual[to[r]];
      residual += e.ld_residual;
    }
    if (e.index) {
      for (int r = 0; r < 4; ++r) out[to[r]] = y[r];
    } else {
      std::memcpy(out + row0, y, sizeof y);
    }
    out += e.ld_out;
  }
}

inline void write_block(const PackedMatrix& w, const Epilogue& e, int64_t block, int64_t m0, int mt, const float* dot) {
  const int64_t row0 = block * kBlockRows, n = w.rows - row0;
  // The dot products of int4 weights include the scales.
  const float* scale = w.store == Store::kInt8 ? static_cast<const float*>(w.scale) + row0 : nullptr;
  if (n >= 4) {
    write_whole_block(scale, e, row0, m0, mt, dot);
    return;
  }
  for (int m = 0; m < mt; ++m) {  // the last block, in part
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = row0 + r;
      float y = dot[m * 4 + r];
      if (scale) y *= scale[r];
      if (e.copy) e.copy[(m0 + m) * e.ld_copy + row] = y;
      if (!e.out) continue;
      const int64_t feature = e.index ? e.index[row] : row;
      if (e.bias) y += e.bias[feature];
      if (e.residual) y += e.residual[(m0 + m) * e.ld_residual + feature];
      e.out[(m0 + m) * e.ld_out + feature] = y;
    }
  }
}

template <class T, int MT, bool kFetch>
inline void tile_and_write(const float* x, int64_t ldx, const PackedMatrix& w, const T* data, int64_t block, int64_t m0,
                           const Epilogue& e, const Ahead& ahead) {
  float dot[MT * 4];
  tile<T, MT, kFetch>(x + m0 * ldx, ldx, data, w.cols, ahead, dot);
  write_block(w, e, block, m0, MT, dot);
}

// A tile of `rows` rows of x, at most MT.
template <class T, int MT, bool kFetch>
inline void tile_of(int64_t rows, const float* x, int64_t ldx, const PackedMatrix& w, const T* data, int64_t block,
                    int64_t m0, const Epilogue& e, const Ahead& ahead) {
  if constexpr (MT > 0) {
    if (rows == MT) {
      tile_and_write<T, MT, kFetch>(x, ldx, w, data, block, m0, e, ahead);
    } else {
      tile_of<T, MT - 1, kFetch>(rows, x, ldx, w, data, block, m0, e, ahead);
    }
  }
}

// Rows [m0, m1) of x against one block, in tiles of equal size where possible: 8 rows are 4 and 4, not 6 and 2. Only
// the first tile prefetches: the tiles after it find the block in the cache.
template <class T>
inline void rows_of_block(const float* x, int64_t ldx, const PackedMatrix& w, const T* data, int64_t block, int64_t m0,
                          int64_t m1, const Epilogue& e, const Ahead& ahead) {
  constexpr int64_t MT = Simd::kTileM;
  const int64_t first = m0;
  for (int64_t tiles = (m1 - m0 + MT - 1) / MT; tiles > 0; --tiles) {
    const int64_t rows = (m1 - m0 + tiles - 1) / tiles;
    if (m0 == first) {
      tile_of<T, MT, true>(rows, x, ldx, w, data, block, m0, e, ahead);
    } else {
      tile_of<T, MT, false>(rows, x, ldx, w, data, block, m0, e, ahead);
    }
    m0 += rows;
  }
}

// Rows of x that stay in the second-level cache while the weights stream past.
inline int64_t panel_rows(int64_t cols) {
  return round_up(greater<int64_t>(Simd::kTileM, (512 << 10) / (4 * greater<int64_t>(cols, 1))), Simd::kTileM);
}

template <class T>
void linear_store(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                  const Epilogue& e, const Ahead& ahead) {
  const int64_t stride = round_up(w.cols, kBlockCols) * kBlockRows;
  const T* data = static_cast<const T*>(w.data);
  const int64_t panel = panel_rows(w.cols);
  for (int64_t p0 = 0; p0 < M; p0 += panel) {
    const int64_t p1 = lesser(p0 + panel, M);
    for (int64_t block = block0; block < block1; ++block)
      rows_of_block(x, ldx, w, data + block * stride, block, p0, p1, e, ahead);
  }
}

void linear(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
            const Epilogue& e, const Ahead& ahead) {
  switch (w.store) {
    case Store::kFp32: return linear_store<float>(x, M, ldx, w, block0, block1, e, ahead);
    case Store::kBf16: return linear_store<Simd::Bf16>(x, M, ldx, w, block0, block1, e, ahead);
    case Store::kFp16: return linear_store<Simd::Fp16>(x, M, ldx, w, block0, block1, e, ahead);
    case Store::kInt8: return linear_store<int8_t>(x, M, ldx, w, block0, block1, e, ahead);
    case Store::kInt4:
    case Store::kInt8Quads: return;  // linear_int4, linear_int8
  }
}
