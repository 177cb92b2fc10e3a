// int4: codes of four bits with a scale, and maybe a zero point, per group of columns. Part of kernels.inl.
//
// The lanes of a vector are rows of the weights; an element of x is broadcast to all lanes. Over a unit of 32 columns the
// kernel sums products with the codes themselves, then applies the unit's scale once:
//   y += scale * (sum of code * x  -  zero * sum of x)
// The sums of x are computed once for all rows of weights. So a weight takes one multiply-add, where (code - zero) * scale
// would take a second one. Many rows of x are processed a few at a time, and each time the codes are extracted from their
// words again: that costs less than reading a panel of floats.

constexpr int kParts = kLaneRows / kW;  // vectors across a block

inline int64_t units_of(int64_t cols) { return (cols + kInt4Cols - 1) / kInt4Cols; }

// Scales and zero points of a block's rows, by unit.
class Int4Groups {
 public:
  Int4Groups(const PackedMatrix& w, int64_t block) : shift_(static_cast<int>(w.group / 64)) {  // 32, 64, 128: 0, 1, 2
    const int64_t at = block * groups_of(w) * kLaneRows;
    scale_ = static_cast<const Simd::Bf16*>(w.scale) + at;
    if (w.zero) zero_ = reinterpret_cast<const int8_t*>(w.zero) + at;
  }
  // The next block's scales follow this block's in memory, so one distance serves both.
  void fetch_ahead(int64_t unit) const { Simd::prefetch(reinterpret_cast<const char*>(scale_ + place(unit, 0)) + 1024); }
  V scale(int64_t unit, int part) const { return Simd::load(scale_ + place(unit, part)); }
  // zero / 8. The symmetric correction (zero point 8) times this is the correction of this group.
  V eighths(int64_t unit, int part) const { return Simd::mul(Simd::load(zero_ + place(unit, part)), Simd::set1(0.125f)); }
  bool symmetric() const { return zero_ == nullptr; }

 private:
  int64_t place(int64_t unit, int part) const { return (unit >> shift_) * kLaneRows + part * kW; }
  const Simd::Bf16* scale_;
  const int8_t* zero_ = nullptr;
  int shift_;
};

// The symmetric correction (zero point 8): -8 times the sum of x over each unit. Writes round_up(units, 4) values;
// those past the last unit are 0.
inline void int4_shares(const float* x, int64_t cols, float* shares) {
  for (int64_t k0 = 0; k0 < cols; k0 += 4 * kInt4Cols, shares += 4) {
    V part[4];
    for (int u = 0; u < 4; ++u) {
      part[u] = Simd::zero();
      const int64_t begin = k0 + u * kInt4Cols, end = lesser(begin + kInt4Cols, cols);
      int64_t k = begin;
      for (; k + kW <= end; k += kW) part[u] = Simd::sub(part[u], Simd::load(x + k));
      if (k < end) part[u] = Simd::sub(part[u], Simd::load_part(x + k, static_cast<int>(end - k)));
    }
    Simd::sum4(part[0], part[1], part[2], part[3], shares);
    for (int u = 0; u < 4; ++u) shares[u] *= 8.0f;
  }
}

// Half bytes 0 to 6 are masked but not shifted, so a code comes out multiplied by a power of two. x is divided by it
// once, for all rows of weights. Half byte 7 holds the word's sign bit and is shifted.
constexpr float kHalfByteUnit[16] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1,
                                     1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
constexpr float kMinusInverse[16] = {-1, -0x1p4f, -0x1p8f, -0x1p12f, -0x1p16f, -0x1p20f, -0x1p24f, -1,
                                     -1, -0x1p4f, -0x1p8f, -0x1p12f, -0x1p16f, -0x1p20f, -0x1p24f, -1};

// Rows of x, prepared for int4 weights.
struct Int4Rows {
  float* x;       // [M, ld]: column k times kHalfByteUnit[k % 8], zeros up to a whole unit
  float* shares;  // [M, ld_shares]
  int64_t ld, ld_shares;

  // The 16 extra floats avoid a stride of a power of two: such rows would share one set of the cache.
  Int4Rows(float* memory, int64_t M, int64_t cols)
      : x(memory), ld(round_up(cols, kInt4Cols) + 16), ld_shares(round_up(units_of(cols), 4)) {
    shares = x + M * ld;
  }
  Int4Rows row(int64_t m) const {
    Int4Rows one = *this;
    one.x += m * ld;
    one.shares += m * ld_shares;
    return one;
  }
};

// Multiplies the rows by the powers of two and returns true. Copies them unscaled and returns false where the scaling
// would round an element (underflow).
inline bool prepare_int4(const float* x, int64_t M, int64_t ldx, int64_t cols, const Int4Rows& to) {
  bool exact = true;
  for (int64_t m = 0; m < M; ++m) {
    const float* from = x + m * ldx;
    float* row = to.x + m * to.ld;
    V most = Simd::zero(), least = Simd::zero();  // rounding errors of the scaling, to see whether it was exact
    auto scale = [&](int64_t k, V v) {
      const V scaled = Simd::mul(v, Simd::load(kHalfByteUnit + k % 8));
      const V change = Simd::fma(scaled, Simd::load(kMinusInverse + k % 8), v);
      most = Simd::max(most, change);
      least = Simd::min(least, change);
      Simd::store(row + k, scaled);
    };
    int64_t k = 0;
    for (; k + kW <= cols; k += kW) scale(k, Simd::load(from + k));
    for (; k < round_up(cols, kInt4Cols); k += kW)
      scale(k, k < cols ? Simd::load_part(from + k, static_cast<int>(cols - k)) : Simd::zero());
    exact &= !(Simd::maximum(Simd::sub(most, least)) > 0.0f);  // NaN compares false and stays NaN either way
    int4_shares(from, cols, to.shares + m * to.ld_shares);
  }
  if (!exact)
    for (int64_t m = 0; m < M; ++m) std::memcpy(to.x + m * to.ld, x + m * ldx, cols * sizeof(float));
  return exact;
}

// kScaled: x is already multiplied by kHalfByteUnit.
template <int J, bool kScaled>
inline V int4_code(Simd::Words words) {
  const V code = Simd::template half_byte<J>(words);
  if constexpr (kScaled) return code;
  return Simd::mul(code, Simd::set1(kHalfByteUnit[J]));
}

// Half bytes J to 7 of U words for each vector of rows, against the same columns of M rows of x. The smaller of the two
// operand sets (codes, columns of x) stays in registers.
template <int J, int M, int U, bool kScaled>
inline void int4_columns(const float* x, int64_t ldx, const Simd::Words (&words)[U][kParts], V (&acc)[M][U][kParts]) {
  for (int u = 0; u < U; ++u) {
    if constexpr (M <= kParts) {
      V column[M];
      for (int m = 0; m < M; ++m) column[m] = Simd::set1(x[m * ldx + u * kInt4Cols + J]);
      for (int p = 0; p < kParts; ++p) {
        const V code = int4_code<J, kScaled>(words[u][p]);
        for (int m = 0; m < M; ++m) acc[m][u][p] = Simd::fma(code, column[m], acc[m][u][p]);
      }
    } else {
      V code[kParts];
      for (int p = 0; p < kParts; ++p) code[p] = int4_code<J, kScaled>(words[u][p]);
      for (int m = 0; m < M; ++m) {
        const V column = Simd::set1(x[m * ldx + u * kInt4Cols + J]);
        for (int p = 0; p < kParts; ++p) acc[m][u][p] = Simd::fma(code[p], column, acc[m][u][p]);
      }
    }
  }
  if constexpr (J < 7) int4_columns<J + 1, M, U, kScaled>(x, ldx, words, acc);
}

// The units [unit, end) of one block, U at a time, added to y: each has a chain of multiply-adds of its own. Not inlined,
// so that the registers hold the sums.
template <int M, int U, bool kScaled>
__attribute__((noinline)) void int4_units(const Int4Rows& x, int64_t unit, int64_t end, const uint32_t* codes,
                                          const Int4Groups groups, const Ahead ahead, float (*y)[kLaneRows]) {
  constexpr int64_t kUnitWords = kLaneRows * kInt4Cols / 8;
  V sum[M][kParts];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < kParts; ++p) sum[m][p] = Simd::load(y[m] + p * kW);
  for (; unit + U <= end; unit += U) {
    V acc[M][U][kParts];
    for (int u = 0; u < U; ++u)
      for (int m = 0; m < M; ++m) {
        const V share = Simd::set1(x.shares[m * x.ld_shares + unit + u]);
        for (int p = 0; p < kParts; ++p)
          acc[m][u][p] = groups.symmetric() ? share : Simd::mul(share, groups.eighths(unit + u, p));
      }
    const uint32_t* at = codes + unit * kUnitWords;
    const float* column = x.x + unit * kInt4Cols;
    groups.fetch_ahead(unit);
    const char* fetch = place_ahead(reinterpret_cast<const char*>(at), ahead);
    for (int q = 0; q < 4; ++q, at += kLaneRows, column += 8, fetch += 64) {
      Simd::Words words[U][kParts];
      for (int u = 0; u < U; ++u)
        for (int p = 0; p < kParts; ++p) words[u][p] = Simd::load_words(at + u * kUnitWords + p * kW);
      int4_columns<0, M, U, kScaled>(column, x.ld, words, acc);
      for (int u = 0; u < U; ++u) Simd::prefetch(fetch + u * kUnitWords * 4);
    }
    for (int u = 0; u < U; ++u)
      for (int p = 0; p < kParts; ++p) {
        const V scale = groups.scale(unit + u, p);
        for (int m = 0; m < M; ++m) sum[m][p] = Simd::fma(acc[m][u][p], scale, sum[m][p]);
      }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < kParts; ++p) Simd::store(y[m] + p * kW, sum[m][p]);
  if constexpr (U > 1)
    if (unit < end) int4_units<M, U / 2, kScaled>(x, unit, end, codes, groups, ahead, y);
}

// Units processed together: enough independent chains to hide the latency of a multiply-add.
constexpr int int4_units_at_once(int M) {
  return lesser(Simd::kInt4Units, M * kParts < Simd::kInt4Chains ? Simd::kInt4Chains / (M * kParts) : 1);
}

// Stores the dot products of a block's sixteen rows where the epilogue says.
inline void write_int4(const PackedMatrix& w, const Epilogue& e, int64_t block, int64_t m, const float* dot) {
  for (int64_t i = 0; i < kLaneRows && block * kLaneRows + i < w.rows; i += kBlockRows)
    write_block(w, e, (block * kLaneRows + i) / kBlockRows, m, 1, dot + i);
}

// M prepared rows of x. The first of them is row m0 of the result.
template <int M, bool kScaled>
inline void int4_blocks(const Int4Rows& x, const PackedMatrix& w, int64_t block0, int64_t block1, int64_t m0,
                        const Epilogue& e, const Ahead& ahead) {
  for (int64_t block = block0; block < block1; ++block) {
    const auto* codes = reinterpret_cast<const uint32_t*>(static_cast<const char*>(w.data) + block * block_bytes(w));
    float y[M][kLaneRows] = {};
    int4_units<M, int4_units_at_once(M), kScaled>(x, 0, units_of(w.cols), codes, Int4Groups(w, block), ahead, y);
    for (int m = 0; m < M; ++m) write_int4(w, e, block, m0 + m, y[m]);
  }
}

template <int M>
inline void int4_blocks_of(int64_t rows, const Int4Rows& x, const PackedMatrix& w, int64_t block0, int64_t block1,
                           int64_t m0, const Epilogue& e, const Ahead& ahead) {
  if constexpr (M > 0) {
    if (rows == M) return int4_blocks<M, true>(x, w, block0, block1, m0, e, ahead);
    int4_blocks_of<M - 1>(rows, x, w, block0, block1, m0, e, ahead);
  }
}

void linear_int4(Int4Input& x, int64_t M, const PackedMatrix& w, int64_t block0, int64_t block1, const Epilogue& e,
                 const Ahead& ahead) {
  constexpr int64_t MT = Simd::kInt4TileM;
  const Int4Rows prepared(x.memory, M, w.cols);
  if (!x.prepared) x.scaled = prepare_int4(x.x, M, x.ldx, w.cols, prepared);
  x.prepared = true;
  if (!x.scaled) {
    for (int64_t m = 0; m < M; ++m) int4_blocks<1, false>(prepared.row(m), w, block0, block1, m, e, ahead);
    return;
  }
  int64_t m0 = 0;
  for (int64_t tiles = (M + MT - 1) / MT; tiles > 0; --tiles) {  // of nearly equal size
    const int64_t rows = (M - m0 + tiles - 1) / tiles;
    int4_blocks_of<MT>(rows, prepared.row(m0), w, block0, block1, m0, e, ahead);
    m0 += rows;
  }
}

// Row `row` into out [cols]. An element is exact in fp32: codes have 4 bits, bf16 scales 8.
void int4_row(const PackedMatrix& w, int64_t row, float* out) {
  const int64_t block = row / kLaneRows, r = row % kLaneRows, at = block * groups_of(w) * kLaneRows + r;
  const auto* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(w.data) + block * block_bytes(w)) + r;
  for (int64_t k = 0; k < w.cols; k += 8, words += kLaneRows) {
    const int64_t group = at + k / w.group * kLaneRows;
    const float scale = generic::bf16_to_float(static_cast<const uint16_t*>(w.scale)[group]);
    const int zero = w.zero ? w.zero[group] : 8;
    float elements[8];
    for (int j = 0; j < 8; ++j) elements[j] = static_cast<float>(static_cast<int>(*words >> 4 * j & 15) - zero) * scale;
    std::memcpy(out + k, elements, lesser<int64_t>(8, w.cols - k) * sizeof(float));
  }
}
