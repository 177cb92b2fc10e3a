// The kernels, written once over a Simd type. Included by one translation unit per instruction set, inside its namespace.
// See kernels.h for the contracts and the order of reduction.

constexpr int kW = Simd::kWidth;
using V = Simd::V;

// Not std::min and std::max: an inline function shared between translation units could be kept in the copy that was
// compiled for the newest instruction set.
template <class A>
inline A lesser(A a, A b) {
  return b < a ? b : a;
}
template <class A>
inline A greater(A a, A b) {
  return a < b ? b : a;
}
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x in single precision, error below 2 ulp on [-87, 87], clamped outside (Cephes expf).
inline V exp_ps(V x) {
  x = Simd::min(Simd::max(x, Simd::set1(-87.0f)), Simd::set1(87.0f));
  V n = Simd::round(Simd::mul(x, Simd::set1(1.44269504f)));
  V r = Simd::fma(n, Simd::set1(-0.693359375f), x);
  r = Simd::fma(n, Simd::set1(2.12194440e-4f), r);
  V p = Simd::set1(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set1(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set1(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set1(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set1(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set1(5.0000001201e-1f));
  p = Simd::fma(Simd::mul(r, r), p, Simd::add(r, Simd::set1(1.0f)));
  return Simd::mul(p, Simd::pow2i(n));
}

// ---------------------------------------------------------------------------------------------------------- linear

constexpr int64_t kPrefetchDistance = 8192;  // bytes; the best of 4 to 32 KiB, into the second-level cache

// MT rows of x against NB consecutive blocks of four weight rows. dot[(b * MT + m) * 4 + r].
template <class T, int MT, int NB>
inline void tile(const float* x, int64_t ldx, const T* w, int64_t block_stride, int64_t cols, float* dot) {
  V acc[NB][MT][4];
  for (int b = 0; b < NB; ++b)
    for (int m = 0; m < MT; ++m)
      for (int r = 0; r < 4; ++r) acc[b][m][r] = Simd::zero();
  const int64_t whole = cols / kBlockCols * kBlockCols;
  for (int64_t k = 0; k < whole; k += kBlockCols) {
    for (int v = 0; v < kBlockCols; v += kW) {
      V xv[MT];
      for (int m = 0; m < MT; ++m) xv[m] = Simd::load(x + m * ldx + k + v);
      for (int b = 0; b < NB; ++b) {
        const T* wk = w + b * block_stride + k * kBlockRows + v;
        for (int r = 0; r < 4; ++r) {
          const V wv = Simd::load(wk + r * kBlockCols);
          for (int m = 0; m < MT; ++m) acc[b][m][r] = Simd::fma(xv[m], wv, acc[b][m][r]);
        }
      }
    }
    if constexpr (NB > 1) {
      // One row of x is bound by memory, and the hardware does not follow streams this short across blocks: fetch what is
      // read some microseconds later. Past the end of the matrix this does nothing.
      for (int b = 0; b < NB; ++b) {
        const char* at = reinterpret_cast<const char*>(w + b * block_stride + k * kBlockRows);
        for (size_t line = 0; line < kBlockRows * kBlockCols * sizeof(T); line += 64)
          Simd::prefetch(at + kPrefetchDistance + line);
      }
    }
  }
  // The last columns: x is read under a mask, the packed weights are padded with zeros.
  for (int64_t v = 0; whole + v < cols; v += kW) {
    const int n = static_cast<int>(cols - whole - v);
    V xv[MT];
    for (int m = 0; m < MT; ++m) xv[m] = Simd::load_part(x + m * ldx + whole + v, n);
    for (int b = 0; b < NB; ++b) {
      const T* wk = w + b * block_stride + whole * kBlockRows + v;
      for (int r = 0; r < 4; ++r) {
        const V wv = Simd::load(wk + r * kBlockCols);
        for (int m = 0; m < MT; ++m) acc[b][m][r] = Simd::fma(xv[m], wv, acc[b][m][r]);
      }
    }
  }
  for (int b = 0; b < NB; ++b)
    for (int m = 0; m < MT; ++m)
      Simd::sum4(acc[b][m][0], acc[b][m][1], acc[b][m][2], acc[b][m][3], dot + (b * MT + m) * 4);
}

// The sums of one row of x over a block of four weight rows, to where they belong.
inline void write_whole_block(const PackedMatrix& w, const Epilogue& e, int64_t row0, int64_t m, const float* dot) {
  float y[4];
  std::memcpy(y, dot, sizeof y);
  if (w.scale)
    for (int r = 0; r < 4; ++r) y[r] *= w.scale[row0 + r];
  if (e.copy) std::memcpy(e.copy + m * e.ld_copy + row0, y, sizeof y);
  if (!e.out) return;
  float* out = e.out + m * e.ld_out;
  const float* residual = e.residual ? e.residual + m * e.ld_residual : nullptr;
  if (!e.index) {
    if (e.bias)
      for (int r = 0; r < 4; ++r) y[r] += e.bias[row0 + r];
    if (residual)
      for (int r = 0; r < 4; ++r) y[r] += residual[row0 + r];
    std::memcpy(out + row0, y, sizeof y);
    return;
  }
  const int32_t* to = e.index + row0;
  if (e.bias)
    for (int r = 0; r < 4; ++r) y[r] += e.bias[to[r]];
  if (residual)
    for (int r = 0; r < 4; ++r) y[r] += residual[to[r]];
  for (int r = 0; r < 4; ++r) out[to[r]] = y[r];
}

inline void write_block(const PackedMatrix& w, const Epilogue& e, int64_t block, int64_t m0, int mt, const float* dot) {
  const int64_t row0 = block * kBlockRows, n = w.rows - row0;
  if (n >= 4) {
    for (int m = 0; m < mt; ++m) write_whole_block(w, e, row0, m0 + m, dot + m * 4);
    return;
  }
  for (int m = 0; m < mt; ++m) {  // the last block, in part
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = row0 + r;
      float y = dot[m * 4 + r];
      if (w.scale) y *= w.scale[row];
      if (e.copy) e.copy[(m0 + m) * e.ld_copy + row] = y;
      if (!e.out) continue;
      const int64_t feature = e.index ? e.index[row] : row;
      if (e.bias) y += e.bias[feature];
      if (e.residual) y += e.residual[(m0 + m) * e.ld_residual + feature];
      e.out[(m0 + m) * e.ld_out + feature] = y;
    }
  }
}

template <class T, int MT, int NB>
inline void tile_and_write(const float* x, int64_t ldx, const PackedMatrix& w, int64_t block, int64_t m0,
                           const Epilogue& e) {
  const int64_t stride = round_up(w.cols, kBlockCols) * kBlockRows;
  float dot[NB * MT * 4];
  tile<T, MT, NB>(x + m0 * ldx, ldx, static_cast<const T*>(w.data) + block * stride, stride, w.cols, dot);
  for (int b = 0; b < NB; ++b) write_block(w, e, block + b, m0, MT, dot + b * MT * 4);
}

template <class T, int MT>
inline void remaining_rows(const float* x, int64_t rest, int64_t ldx, const PackedMatrix& w, int64_t block, int64_t m0,
                           const Epilogue& e) {
  if constexpr (MT > 0) {
    if (rest == MT) {
      tile_and_write<T, MT, 1>(x, ldx, w, block, m0, e);
    } else {
      remaining_rows<T, MT - 1>(x, rest, ldx, w, block, m0, e);
    }
  }
}

template <class T>
void linear_store(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                  const Epilogue& e) {
  if (M == 1) {
    // One row: two blocks at once, for enough independent accumulators to hide the latency of the multiply-add.
    int64_t block = block0;
    for (; block + 2 <= block1; block += 2) tile_and_write<T, 1, 2>(x, ldx, w, block, 0, e);
    if (block < block1) tile_and_write<T, 1, 1>(x, ldx, w, block, 0, e);
    return;
  }
  constexpr int MT = Simd::kTileM;
  // Panels of x that stay in the second-level cache while the weights stream past.
  const int64_t panel = round_up(greater<int64_t>(MT, (512 << 10) / (4 * greater<int64_t>(w.cols, 1))), MT);
  for (int64_t p0 = 0; p0 < M; p0 += panel) {
    const int64_t p1 = p0 + panel < M ? p0 + panel : M;
    for (int64_t block = block0; block < block1; ++block) {
      int64_t m = p0;
      for (; m + MT <= p1; m += MT) tile_and_write<T, MT, 1>(x, ldx, w, block, m, e);
      remaining_rows<T, MT - 1>(x, p1 - m, ldx, w, block, m, e);
    }
  }
}

void linear(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
            const Epilogue& e) {
  switch (w.store) {
    case Store::kFp32: return linear_store<float>(x, M, ldx, w, block0, block1, e);
    case Store::kBf16: return linear_store<Simd::Bf16>(x, M, ldx, w, block0, block1, e);
    case Store::kFp16: return linear_store<Simd::Fp16>(x, M, ldx, w, block0, block1, e);
    case Store::kInt8: return linear_store<int8_t>(x, M, ldx, w, block0, block1, e);
  }
}

template <class T>
void gather_store(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  const int64_t padded = round_up(w.cols, kBlockCols);
  for (int64_t i = row0; i < row1; ++i) {
    const int64_t row = ids[i];
    const T* from = static_cast<const T*>(w.data) + row / 4 * padded * kBlockRows + row % 4 * kBlockCols;
    const V scale = Simd::set1(w.scale ? w.scale[row] : 1.0f);
    float buffer[kBlockCols];
    for (int64_t k = 0; k < w.cols; k += kBlockCols) {
      for (int v = 0; v < kBlockCols; v += kW)
        Simd::store(buffer + v, Simd::mul(scale, Simd::load(from + k * kBlockRows + v)));
      const int64_t n = w.cols - k < kBlockCols ? w.cols - k : kBlockCols;
      std::memcpy(out + i * w.cols + k, buffer, n * sizeof(float));
    }
  }
}

void gather(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  switch (w.store) {
    case Store::kFp32: return gather_store<float>(w, ids, row0, row1, out);
    case Store::kBf16: return gather_store<Simd::Bf16>(w, ids, row0, row1, out);
    case Store::kFp16: return gather_store<Simd::Fp16>(w, ids, row0, row1, out);
    case Store::kInt8: return gather_store<int8_t>(w, ids, row0, row1, out);
  }
}

// ------------------------------------------------------------------------------------------- norm and activation

void rms_norm(const float* x, const float* residual, const float* weight, float eps, int64_t H, int64_t row0,
              int64_t row1, float* residual_out, float* out) {
  const int64_t whole = H / kW * kW;
  const int tail = static_cast<int>(H - whole);
  for (int64_t i = row0; i < row1; ++i) {
    const float* from = x + i * H;
    if (residual_out) {
      float* sum = residual_out + i * H;
      for (int64_t k = 0; k < H; ++k) sum[k] = from[k] + residual[i * H + k];
      from = sum;
    }
    V acc = Simd::zero();
    for (int64_t k = 0; k < whole; k += kW) {
      const V v = Simd::load(from + k);
      acc = Simd::fma(v, v, acc);
    }
    if (tail) {
      const V v = Simd::load_part(from + whole, tail);
      acc = Simd::fma(v, v, acc);
    }
    const float inverse = 1.0f / std::sqrt(Simd::sum(acc) / static_cast<float>(H) + eps);
    for (int64_t k = 0; k < H; ++k) out[i * H + k] = weight[k] * (from[k] * inverse);
  }
}

void swiglu(const float* gate_up, int64_t I, int64_t row0, int64_t row1, float* out) {
  const V one = Simd::set1(1.0f);
  for (int64_t i = row0; i < row1; ++i) {
    const float* gate = gate_up + i * 2 * I;
    const float* up = gate + I;
    float* to = out + i * I;
    for (int64_t k = 0; k < I; k += kW) {
      const int n = static_cast<int>(lesser<int64_t>(kW, I - k));
      const V g = Simd::load_part(gate + k, n), u = Simd::load_part(up + k, n);
      const V silu = Simd::div(g, Simd::add(one, exp_ps(Simd::sub(Simd::zero(), g))));
      if (n == kW) {
        Simd::store(to + k, Simd::mul(silu, u));
      } else {
        float buffer[kW];
        Simd::store(buffer, Simd::mul(silu, u));
        std::memcpy(to + k, buffer, n * sizeof(float));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ attention
// Cache layouts, per page and KV head: keys [head_dim][page_size], so that one vector holds one dimension of many keys
// and scores need no sum across lanes; values [page_size][round_up(head_dim, 16)], padded with zeros.

inline void put(float* p, float x) { *p = x; }
inline void put(Simd::Bf16* p, float x) { p->bits = generic::float_to_bf16(x); }
inline void put(Simd::Fp16* p, float x) { p->bits = generic::float_to_fp16(x); }

template <class T>
void rope_kv_write_store(float* qkv, const int32_t* positions, const int32_t* slots, const float* cos_sin,
                         int64_t rotary_dim, const AttentionShape& s, T* k_cache, T* v_cache, int64_t row0,
                         int64_t row1) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), half = rotary_dim / 2;
  const int64_t ld = (s.query_heads + 2 * s.kv_heads) * D;
  for (int64_t i = row0; i < row1; ++i) {
    float* row = qkv + i * ld;
    const float* cs = cos_sin + static_cast<int64_t>(positions[i]) * rotary_dim;
    for (int64_t h = 0; h < s.query_heads + s.kv_heads; ++h) {
      float* x = row + h * D;
      for (int64_t d = 0; d < half; ++d) {
        const float a = x[d], b = x[d + half], c = cs[d], sn = cs[d + half];
        x[d] = a * c - b * sn;
        x[d + half] = b * c + a * sn;
      }
    }
    const int64_t page = slots[i] / s.page_size, offset = slots[i] % s.page_size;
    for (int64_t h = 0; h < s.kv_heads; ++h) {
      const float* k = row + (s.query_heads + h) * D;
      const float* v = row + (s.query_heads + s.kv_heads + h) * D;
      T* kc = k_cache + ((page * s.kv_heads + h) * D) * s.page_size + offset;
      T* vc = v_cache + ((page * s.kv_heads + h) * s.page_size + offset) * DV;
      for (int64_t d = 0; d < D; ++d) put(kc + d * s.page_size, k[d]);
      for (int64_t d = 0; d < D; ++d) put(vc + d, v[d]);
      for (int64_t d = D; d < DV; ++d) put(vc + d, 0.0f);
    }
  }
}

void rope_kv_write(float* qkv, const int32_t* positions, const int32_t* slots, const float* cos_sin,
                   int64_t rotary_dim, const AttentionShape& s, void* k_cache, void* v_cache, int64_t row0,
                   int64_t row1) {
  switch (s.store) {
    case Store::kFp32:
      return rope_kv_write_store(qkv, positions, slots, cos_sin, rotary_dim, s, static_cast<float*>(k_cache),
                                 static_cast<float*>(v_cache), row0, row1);
    case Store::kBf16:
      return rope_kv_write_store(qkv, positions, slots, cos_sin, rotary_dim, s, static_cast<Simd::Bf16*>(k_cache),
                                 static_cast<Simd::Bf16*>(v_cache), row0, row1);
    case Store::kFp16:
      return rope_kv_write_store(qkv, positions, slots, cos_sin, rotary_dim, s, static_cast<Simd::Fp16*>(k_cache),
                                 static_cast<Simd::Fp16*>(v_cache), row0, row1);
    case Store::kInt8: return;  // refused before
  }
}

constexpr int kTileQ = 4;         // query vectors that share one pass over a page
constexpr int64_t kMaxDim = 512;  // largest head_dim; checked in ops.cpp
constexpr int64_t kMaxPage = 64;  // largest page_size; likewise

struct QueryTile {
  int count;
  const float* q[kTileQ];
  int64_t keys[kTileQ];  // how many keys each may see
  float maximum[kTileQ];
  float sum[kTileQ];
  float acc[kTileQ][kMaxDim];
};

// One page of keys and values into the running softmax (Milakov and Gimelshein 2018) of each query of the tile. Pages come
// in order of position, so a query's sums have one order whatever else is in the tile.
template <class T>
inline void attend_page(QueryTile& t, int64_t first_key, const T* k, const T* v, const AttentionShape& s) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), P = s.page_size;
  float weight[kTileQ][kMaxPage];
  for (int64_t j = 0; j < P; j += kW) {
    V score[kTileQ];
    for (int i = 0; i < kTileQ; ++i) score[i] = Simd::zero();
    for (int64_t d = 0; d < D; ++d) {
      const V key = Simd::load(k + d * P + j);
      for (int i = 0; i < kTileQ; ++i) score[i] = Simd::fma(Simd::set1(t.q[i][d]), key, score[i]);
    }
    for (int i = 0; i < kTileQ; ++i) Simd::store(weight[i] + j, Simd::mul(score[i], Simd::set1(s.scale)));
  }
  for (int i = 0; i < t.count; ++i) {
    const int64_t n = lesser(P, t.keys[i] - first_key);
    if (n <= 0) continue;
    float* p = weight[i];
    for (int64_t j = n; j < P; ++j) p[j] = -std::numeric_limits<float>::infinity();
    V top = Simd::load(p);
    for (int64_t j = kW; j < P; j += kW) top = Simd::max(top, Simd::load(p + j));
    const float maximum = greater(t.maximum[i], Simd::maximum(top));
    V total = Simd::zero();
    for (int64_t j = 0; j < P; j += kW) Simd::store(p + j, exp_ps(Simd::sub(Simd::load(p + j), Simd::set1(maximum))));
    for (int64_t j = n; j < P; ++j) p[j] = 0.0f;
    for (int64_t j = 0; j < P; j += kW) total = Simd::add(total, Simd::load(p + j));
    if (maximum != t.maximum[i]) {
      float lanes[kW];
      Simd::store(lanes, exp_ps(Simd::set1(t.maximum[i] - maximum)));
      const float shrink = first_key == 0 ? 0.0f : lanes[0];
      t.sum[i] *= shrink;
      const V by = Simd::set1(shrink);
      for (int64_t d = 0; d < DV; d += kW) Simd::store(t.acc[i] + d, Simd::mul(by, Simd::load(t.acc[i] + d)));
      t.maximum[i] = maximum;
    }
    t.sum[i] += Simd::sum(total);
    constexpr int kGroup = 4;  // accumulators held in registers while the values of a page stream past
    int64_t d = 0;
    for (; d + kGroup * kW <= DV; d += kGroup * kW) {
      V acc[kGroup];
      for (int g = 0; g < kGroup; ++g) acc[g] = Simd::load(t.acc[i] + d + g * kW);
      for (int64_t j = 0; j < n; ++j) {
        const V pj = Simd::set1(p[j]);
        for (int g = 0; g < kGroup; ++g) acc[g] = Simd::fma(pj, Simd::load(v + j * DV + d + g * kW), acc[g]);
      }
      for (int g = 0; g < kGroup; ++g) Simd::store(t.acc[i] + d + g * kW, acc[g]);
    }
    for (; d < DV; d += kW) {
      V acc = Simd::load(t.acc[i] + d);
      for (int64_t j = 0; j < n; ++j) acc = Simd::fma(Simd::set1(p[j]), Simd::load(v + j * DV + d), acc);
      Simd::store(t.acc[i] + d, acc);
    }
  }
}

template <class T>
void attention_store(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head,
                     const int32_t* pages, const T* k_cache, const T* v_cache, const AttentionShape& s, float* out,
                     int64_t ldo) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), P = s.page_size, group = s.query_heads / s.kv_heads;
  const int64_t total = count * group;
  for (int64_t t0 = 0; t0 < total; t0 += kTileQ) {
    QueryTile t;
    t.count = static_cast<int>(lesser<int64_t>(kTileQ, total - t0));
    int64_t most = 0;
    for (int i = 0; i < kTileQ; ++i) {
      const int64_t n = t0 + lesser<int64_t>(i, t.count - 1);  // an unused place repeats the last query
      const int64_t row = n / group, head = kv_head * group + n % group;
      t.q[i] = q + row * ldq + head * D;
      t.keys[i] = position + row + 1;
      t.maximum[i] = -std::numeric_limits<float>::infinity();
      t.sum[i] = 0.0f;
      std::memset(t.acc[i], 0, DV * sizeof(float));
      most = greater(most, t.keys[i]);
    }
    for (int64_t page = 0; page * P < most; ++page) {
      const int64_t base = static_cast<int64_t>(pages[page]) * s.kv_heads + kv_head;
      attend_page(t, page * P, k_cache + base * D * P, v_cache + base * P * DV, s);
    }
    for (int i = 0; i < t.count; ++i) {
      const int64_t n = t0 + i, row = n / group, head = kv_head * group + n % group;
      const float inverse = 1.0f / t.sum[i];
      for (int64_t d = 0; d < D; ++d) out[row * ldo + head * D + d] = t.acc[i][d] * inverse;
    }
  }
}

void attention(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head, const int32_t* pages,
               const void* k_cache, const void* v_cache, const AttentionShape& s, float* out, int64_t ldo) {
  switch (s.store) {
    case Store::kFp32:
      return attention_store(q, ldq, position, count, kv_head, pages, static_cast<const float*>(k_cache),
                             static_cast<const float*>(v_cache), s, out, ldo);
    case Store::kBf16:
      return attention_store(q, ldq, position, count, kv_head, pages, static_cast<const Simd::Bf16*>(k_cache),
                             static_cast<const Simd::Bf16*>(v_cache), s, out, ldo);
    case Store::kFp16:
      return attention_store(q, ldq, position, count, kv_head, pages, static_cast<const Simd::Fp16*>(k_cache),
                             static_cast<const Simd::Fp16*>(v_cache), s, out, ldo);
    case Store::kInt8: return;  // refused before
  }
}

const KernelTable kTable = {Simd::kName, linear, rms_norm, swiglu, gather, rope_kv_write, attention};
