// int4: codes of four bits with a scale, and maybe a zero point, per group of columns. Part of kernels.inl.
//
// An element is code * scale - zero * scale. Both products are exact in fp32 (codes have 4 bits, bf16 scales 8), and so is
// their difference: the same number whether it is made on the way to a multiply-add or written to a panel first. So one row
// of x, which reads codes, and many rows, which share a panel of floats, have the same bits.

struct GroupScales {
  float scale[4], offset[4];  // of the four rows of a block; offset = -zero * scale
};

inline GroupScales group_scales(const PackedMatrix& w, int64_t block, int64_t group) {
  const int64_t at = (block * ((w.cols + w.group - 1) / w.group) + group) * kBlockRows;
  const uint16_t* bits = static_cast<const uint16_t*>(w.scale) + at;
  GroupScales g;
  uint32_t wide[4];
  for (int r = 0; r < 4; ++r) wide[r] = static_cast<uint32_t>(bits[r]) << 16;
  std::memcpy(g.scale, wide, sizeof wide);
  if (w.zero) {
    for (int r = 0; r < 4; ++r) g.offset[r] = -static_cast<float>(w.zero[at + r]) * g.scale[r];
  } else {
    for (int r = 0; r < 4; ++r) g.offset[r] = -8.0f * g.scale[r];
  }
  return g;
}

constexpr int kParts = 16 / kW;  // vectors in half a chunk of 32 columns

// The sixteen low and the sixteen high codes of 16 bytes, as elements.
inline void int4_elements(const uint8_t* codes, V scale, V offset, V (&low)[kParts], V (&high)[kParts]) {
  for (int p = 0; p < kParts; ++p) {
    Simd::int4(codes + p * kW, low[p], high[p]);
    low[p] = Simd::fma(low[p], scale, offset);
    high[p] = Simd::fma(high[p], scale, offset);
  }
}

// One row of x against NB blocks.
template <int NB>
inline void int4_tile(const float* x, const PackedMatrix& w, int64_t block, const Ahead& ahead, float* dot) {
  const int64_t stride = block_bytes(w);
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * stride;
  V acc[NB][4];
  for (int b = 0; b < NB; ++b)
    for (int r = 0; r < 4; ++r) acc[b][r] = Simd::zero();
  for (int64_t g0 = 0, group = 0; g0 < w.cols; g0 += w.group, ++group) {
    GroupScales s[NB];
    for (int b = 0; b < NB; ++b) s[b] = group_scales(w, block + b, group);
    const int64_t end = lesser(g0 + w.group, w.cols);
    for (int64_t k = g0; k < end; k += kInt4Cols) {
      V xv[2 * kParts];
      if (k + kInt4Cols <= end) {
        for (int p = 0; p < 2 * kParts; ++p) xv[p] = Simd::load(x + k + p * kW);
      } else {  // the last columns; codes there are padding, whose products with zeros change no sum
        for (int p = 0; p < 2 * kParts; ++p) {
          const int64_t n = end - k - p * kW;
          xv[p] = n > 0 ? Simd::load_part(x + k + p * kW, static_cast<int>(lesser<int64_t>(n, kW))) : Simd::zero();
        }
      }
      for (int b = 0; b < NB; ++b) {
        const uint8_t* codes = data + b * stride + k * 2;
        for (int r = 0; r < 4; ++r) {
          V low[kParts], high[kParts];
          int4_elements(codes + r * 16, Simd::set1(s[b].scale[r]), Simd::set1(s[b].offset[r]), low, high);
          for (int p = 0; p < kParts; ++p) acc[b][r] = Simd::fma(xv[p], low[p], acc[b][r]);
          for (int p = 0; p < kParts; ++p) acc[b][r] = Simd::fma(xv[kParts + p], high[p], acc[b][r]);
        }
        fetch_ahead(reinterpret_cast<const char*>(codes), 64, ahead);
      }
    }
  }
  for (int b = 0; b < NB; ++b) Simd::sum4(acc[b][0], acc[b][1], acc[b][2], acc[b][3], dot + b * 4);
}

// A block as floats in the layout of a float matrix: [cols / 16][4][16].
inline void int4_panel(const PackedMatrix& w, int64_t block, float* panel) {
  const uint8_t* data = static_cast<const uint8_t*>(w.data) + block * block_bytes(w);
  for (int64_t g0 = 0, group = 0; g0 < w.cols; g0 += w.group, ++group) {
    const GroupScales s = group_scales(w, block, group);
    const int64_t end = lesser(g0 + w.group, w.cols);
    for (int64_t k = g0; k < end; k += kInt4Cols) {
      for (int r = 0; r < 4; ++r) {
        V low[kParts], high[kParts];
        int4_elements(data + k * 2 + r * 16, Simd::set1(s.scale[r]), Simd::set1(s.offset[r]), low, high);
        float* to = panel + k * kBlockRows + r * kBlockCols;
        for (int p = 0; p < kParts; ++p) {
          Simd::store(to + p * kW, low[p]);
          Simd::store(to + kBlockRows * kBlockCols + p * kW, high[p]);
        }
      }
    }
  }
}

void linear_int4(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                 const Epilogue& e, const Ahead& ahead, float* panel) {
  if (M == 1) {
    float dot[8];
    for (int64_t block = block0; block < block1; ++block) {
      int4_tile<1>(x, w, block, ahead, dot);
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
  for (int64_t k = 0; k < w.cols; k += kInt4Cols) {
    const GroupScales s = group_scales(w, block, k / w.group);
    V low[kParts], high[kParts];
    int4_elements(codes + k * 2, Simd::set1(s.scale[r]), Simd::set1(s.offset[r]), low, high);
    float buffer[kInt4Cols];
    for (int p = 0; p < kParts; ++p) {
      Simd::store(buffer + p * kW, low[p]);
      Simd::store(buffer + 16 + p * kW, high[p]);
    }
    std::memcpy(out + k, buffer, lesser(kInt4Cols, w.cols - k) * sizeof(float));
  }
}
