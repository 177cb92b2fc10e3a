// int4: codes of four bits with a scale, and maybe a zero point, per group of columns. Part of kernels.inl.
//
// An element is code * scale - zero * scale. Both products are exact in fp32 (codes have 4 bits, bf16 scales 8), and so is
// their difference: the same number whether it is looked up in a table, made on the way to a multiply-add, or written to a
// panel first. So one row of x, which reads codes, and many rows, which share a panel of floats, have the same bits.

inline int64_t groups_of(const PackedMatrix& w) { return (w.cols + w.group - 1) / w.group; }

// The scales and offsets (-zero * scale) of NB blocks, spread to fp32: per group [NB][4] scales, then [NB][4] offsets. Done
// for all groups at once, so that the products find them one load away.
template <int NB>
inline void spread_scales(const PackedMatrix& w, int64_t block, float* to) {
  const int64_t groups = groups_of(w);
  for (int b = 0; b < NB; ++b) {
    const int64_t at = (block + b) * groups * kBlockRows;
    const auto* bits = reinterpret_cast<const Simd::Bf16*>(static_cast<const uint16_t*>(w.scale) + at);
    float* scale = to + b * groups * 2 * kBlockRows;
    float* offset = scale + groups * kBlockRows;
    int64_t i = 0;
    const int64_t n = groups * kBlockRows;
    if (w.zero == nullptr)
      for (; i + kW <= n; i += kW) {
        const V s = Simd::load(bits + i);
        Simd::store(scale + i, s);
        Simd::store(offset + i, Simd::mul(s, Simd::set1(-8.0f)));
      }
    for (; i < n; ++i) {
      scale[i] = generic::bf16_to_float(bits[i].bits);
      offset[i] = (w.zero ? -static_cast<float>(w.zero[at + i]) : -8.0f) * scale[i];
    }
  }
}

constexpr int kParts = 16 / kW;  // vectors in half a chunk of 32 columns

// The sixteen low and the sixteen high codes of 16 bytes, as elements.
inline void int4_elements(const uint8_t* codes, const Simd::Int4& row, V (&low)[kParts], V (&high)[kParts]) {
  for (int p = 0; p < kParts; ++p) row.elements(codes + p * kW, low[p], high[p]);
}

// One row of x against NB blocks: dot[b * 4 + r]. scales: room for 8 * NB * groups floats.
template <int NB>
inline void int4_tile(const float* x, const PackedMatrix& w, int64_t block, const Ahead& ahead, float* scales,
                      float* dot) {
  spread_scales<NB>(w, block, scales);
  // The scales of the blocks after the next, which no multiplication waits for yet.
  const char* later = static_cast<const char*>(w.scale) + (block + 2 * NB) * groups_of(w) * kBlockRows * 2;
  for (int64_t line = 0; line < NB * groups_of(w) * kBlockRows * 2; line += 64) Simd::prefetch(later + line);
  const int64_t stride = block_bytes(w), spread = groups_of(w) * kBlockRows;
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * stride;
  V acc[NB][4];
  for (int b = 0; b < NB; ++b)
    for (int r = 0; r < 4; ++r) acc[b][r] = Simd::zero();
  auto chunk = [&](int64_t k, const float* xk) {
    for (int b = 0; b < NB; ++b) {
      const uint8_t* codes = data + b * stride + k * 2;
      for (int r = 0; r < 4; ++r) {
        V low[kParts], high[kParts];
        Simd::Int4 row;
        row.set(scales + b * 2 * spread + r, scales + (b * 2 + 1) * spread + r);
        int4_elements(codes + r * 16, row, low, high);
        for (int p = 0; p < kParts; ++p) acc[b][r] = Simd::fma(Simd::load(xk + p * kW), low[p], acc[b][r]);
        for (int p = 0; p < kParts; ++p) acc[b][r] = Simd::fma(Simd::load(xk + 16 + p * kW), high[p], acc[b][r]);
      }
      fetch_ahead(reinterpret_cast<const char*>(codes), 64, ahead);
    }
  };
  for (int64_t g0 = 0; g0 < w.cols; g0 += w.group, scales += kBlockRows) {
    const int64_t end = lesser(g0 + w.group, w.cols);
    int64_t k = g0;
    for (; k + kInt4Cols <= end; k += kInt4Cols) chunk(k, x + k);
    if (k < end) {  // the last columns; codes there are padding, whose products with zeros change no sum
      float rest[kInt4Cols] = {};
      std::memcpy(rest, x + k, (end - k) * sizeof(float));
      chunk(k, rest);
    }
  }
  for (int b = 0; b < NB; ++b) Simd::sum4(acc[b][0], acc[b][1], acc[b][2], acc[b][3], dot + b * 4);
}

// The elements of one row's group, whose scale and zero point lie at `at`.
inline Simd::Int4 int4_group(const PackedMatrix& w, int64_t at) {
  const float scale = generic::bf16_to_float(static_cast<const uint16_t*>(w.scale)[at]);
  const float offset = (w.zero ? -static_cast<float>(w.zero[at]) : -8.0f) * scale;
  Simd::Int4 elements;
  elements.set(&scale, &offset);
  return elements;
}

// A block as floats in the layout of a float matrix: [cols / 16][4][16].
inline void int4_panel(const PackedMatrix& w, int64_t block, float* panel) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * block_bytes(w);
  const int64_t at = block * groups_of(w) * kBlockRows;
  for (int64_t g0 = 0, group = 0; g0 < w.cols; g0 += w.group, ++group) {
    const int64_t end = lesser(g0 + w.group, w.cols);
    for (int r = 0; r < 4; ++r) {
      const Simd::Int4 row = int4_group(w, at + group * kBlockRows + r);
      for (int64_t k = g0; k < end; k += kInt4Cols) {
        V low[kParts], high[kParts];
        int4_elements(data + k * 2 + r * 16, row, low, high);
        float* to = panel + k * kBlockRows + r * kBlockCols;
        for (int p = 0; p < kParts; ++p) {
          Simd::store(to + p * kW, low[p]);
          Simd::store(to + kBlockRows * kBlockCols + p * kW, high[p]);
        }
      }
    }
  }
}

// panel: 4 * round_up(cols, 32) floats.
void linear_int4(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                 const Epilogue& e, const Ahead& ahead, float* panel) {
  if (M == 1) {
    constexpr int NB = Simd::kInt4Blocks;
    float dot[NB * 4];
    int64_t block = block0;
    for (; block + NB <= block1; block += NB) {
      int4_tile<NB>(x, w, block, ahead, panel, dot);
      for (int b = 0; b < NB; ++b) write_block(w, e, block + b, 0, 1, dot + b * 4);
    }
    for (; block < block1; ++block) {
      int4_tile<1>(x, w, block, ahead, panel, dot);
      write_block(w, e, block, 0, 1, dot);
    }
    return;
  }
  const int64_t rows = panel_rows(w.cols);
  for (int64_t p0 = 0; p0 < M; p0 += rows) {
    const int64_t p1 = lesser(p0 + rows, M);
    for (int64_t block = block0; block < block1; ++block) {
      int4_panel(w, block, panel);
      rows_of_block<float>(x, ldx, w, panel, block, p0, p1, e);
    }
  }
}

// Row `row` into out [cols].
void int4_row(const PackedMatrix& w, int64_t row, float* out) {
  const int64_t block = row / kBlockRows, r = row % kBlockRows;
  const uint8_t* codes = static_cast<const uint8_t*>(w.data) + block * block_bytes(w) + r * 16;
  const int64_t at = block * groups_of(w) * kBlockRows + r;
  for (int64_t k = 0; k < w.cols; k += kInt4Cols) {
    V low[kParts], high[kParts];
    int4_elements(codes + k * 2, int4_group(w, at + k / w.group * kBlockRows), low, high);
    float buffer[kInt4Cols];
    for (int p = 0; p < kParts; ++p) {
      Simd::store(buffer + p * kW, low[p]);
      Simd::store(buffer + 16 + p * kW, high[p]);
    }
    std::memcpy(out + k, buffer, lesser(kInt4Cols, w.cols - k) * sizeof(float));
  }
}
