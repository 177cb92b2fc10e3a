// Rotary embedding, the KV cache and attention over it. Part of kernels.inl.
//
// Cache layouts, per page and KV head: keys [head_dim][page_size], so that one vector holds one dimension of many keys and
// scores need no sum across lanes; values [page_size][round_up(head_dim, 16)], padded with zeros. An int8 cache has codes
// there, and behind them fp32 scales [page_size]: a key's scale multiplies its score, a value's its weight.
//
// Order of sums. The keys of a sequence are cut at fixed positions into splits (kernels.h: split_pages). Within a split a
// running softmax (Milakov and Gimelshein 2018) takes one page after the other; the states of the splits are merged in order
// (flash decoding, Dao et al. 2023). So a query's result has the same bits with any number of threads and in any batch.

inline void put(float* p, float x) { *p = x; }
inline void put(Simd::Bf16* p, float x) { p->bits = generic::float_to_bf16(x); }
inline void put(Simd::Fp16* p, float x) { p->bits = generic::float_to_fp16(x); }

void rotate(const float* x, int64_t heads, int64_t head_dim, const float* cos_sin, int64_t rotary_dim, float* out) {
  const int64_t half = rotary_dim / 2;
  for (int64_t h = 0; h < heads; ++h, x += head_dim, out += head_dim) {
    for (int64_t d = 0; d < half; ++d) {
      const float a = x[d], b = x[d + half], c = cos_sin[d], sn = cos_sin[d + half];
      out[d] = a * c - b * sn;
      out[d + half] = b * c + a * sn;
    }
    if (out != x) std::memcpy(out + rotary_dim, x + rotary_dim, (head_dim - rotary_dim) * sizeof(float));
  }
}

constexpr int64_t kMaxDim = 512;  // largest head_dim; checked in attention_ops.cpp
constexpr int64_t kMaxPage = 64;  // largest page_size; likewise

template <class T>
constexpr bool kHasScales = std::is_same_v<T, int8_t>;

// Elements of one head's keys or values in a page, `width` of each position, with the scales behind them.
template <class T>
constexpr int64_t page_elements(int64_t width, int64_t page_size) {
  return page_size * (width + (kHasScales<T> ? static_cast<int64_t>(sizeof(float)) : 0));
}

// The scales behind one head's codes in a page.
template <class T>
inline auto scales_of(T* codes, int64_t width, int64_t page_size) {
  using Float = std::conditional_t<std::is_const_v<T>, const float, float>;
  return reinterpret_cast<Float*>(codes + width * page_size);
}

// x [D] as codes, up to whole sixteens of them; returns the one scale. A NaN or an infinity makes the scale NaN.
inline float codes_of(const float* x, int64_t D, int8_t* codes) {
  float padded[kMaxDim + kCodeGroup];
  const int64_t end = round_up(D, kCodeGroup);
  std::memcpy(padded, x, D * sizeof(float));
  std::memset(padded + D, 0, (end - D) * sizeof(float));
  V top = Simd::zero(), odd = Simd::zero();
  for (int64_t d = 0; d < end; d += kW) {
    const V v = Simd::load(padded + d);
    top = Simd::max(top, Simd::max(v, Simd::sub(Simd::zero(), v)));
    odd = Simd::fma(v, Simd::zero(), odd);
  }
  const bool finite = Simd::sum(odd) == 0.0f;
  const float peak = finite ? Simd::maximum(top) : 0.0f;
  CodeShare share{};
  for (int64_t d = 0; d < end; d += kCodeGroup) share = quantize_group(padded + d, peak, codes + d);
  return finite ? share.scale : std::numeric_limits<float>::quiet_NaN();
}

template <class T>
void write_kv_store(const float* k, const float* v, int64_t slot, int64_t kv_head, const AttentionShape& s, T* k_cache,
                    T* v_cache) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), P = s.page_size, page = slot / P, offset = slot % P;
  const int64_t block = page * s.kv_heads + kv_head;
  T *keys = k_cache + block * page_elements<T>(D, P), *values = v_cache + block * page_elements<T>(DV, P);
  T *kc = keys + offset, *vc = values + offset * DV;
  if constexpr (kHasScales<T>) {
    int8_t codes[kMaxDim + kCodeGroup];
    scales_of(keys, D, P)[offset] = codes_of(k, D, codes);
    for (int64_t d = 0; d < D; ++d) kc[d * P] = codes[d];
    scales_of(values, DV, P)[offset] = codes_of(v, D, codes);
    std::memcpy(vc, codes, D);
    std::memset(vc + D, 0, DV - D);
  } else {
    for (int64_t d = 0; d < D; ++d) put(kc + d * P, k[d]);
    for (int64_t d = 0; d < D; ++d) put(vc + d, v[d]);
    for (int64_t d = D; d < DV; ++d) put(vc + d, 0.0f);
  }
}

void write_kv(const float* k, const float* v, int64_t slot, int64_t kv_head, const AttentionShape& s, void* k_cache,
              void* v_cache) {
  switch (s.store) {
    case Store::kFp32:
      return write_kv_store(k, v, slot, kv_head, s, static_cast<float*>(k_cache), static_cast<float*>(v_cache));
    case Store::kBf16:
      return write_kv_store(k, v, slot, kv_head, s, static_cast<Simd::Bf16*>(k_cache),
                            static_cast<Simd::Bf16*>(v_cache));
    case Store::kFp16:
      return write_kv_store(k, v, slot, kv_head, s, static_cast<Simd::Fp16*>(k_cache),
                            static_cast<Simd::Fp16*>(v_cache));
    case Store::kInt8:
      return write_kv_store(k, v, slot, kv_head, s, static_cast<int8_t*>(k_cache), static_cast<int8_t*>(v_cache));
    default: return;  // refused before
  }
}

constexpr int kTileQ = 4;  // query vectors that share one pass over a page

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// The softmax of one query so far: acc / sum is its result, weights relative to e^maximum.
struct State {
  float maximum, sum;
  float acc[kMaxDim];
};

inline void clear(State& s, int64_t DV) {
  s.maximum = kNothing;
  s.sum = 0.0f;
  std::memset(s.acc, 0, DV * sizeof(float));
}

inline float exp_of(float x) {
  float lanes[kW];
  Simd::store(lanes, exp_ps(Simd::set1(x)));
  return lanes[0];
}

inline void scale_state(State& s, float by, int64_t DV) {
  s.sum *= by;
  const V factor = Simd::set1(by);
  for (int64_t d = 0; d < DV; d += kW) Simd::store(s.acc + d, Simd::mul(factor, Simd::load(s.acc + d)));
}

// Adds a split's softmax state (maximum, sum, weighted values) to the state of all splits before it.
inline void merge(State& total, float maximum, float sum, const float* acc, int64_t DV) {
  if (maximum == kNothing) return;
  if (total.maximum == kNothing) {
    total.maximum = maximum;
    total.sum = sum;
    std::memcpy(total.acc, acc, DV * sizeof(float));
    return;
  }
  const float top = greater(total.maximum, maximum);
  scale_state(total, exp_of(total.maximum - top), DV);
  const float by = exp_of(maximum - top);
  total.maximum = top;
  total.sum += by * sum;
  const V factor = Simd::set1(by);
  for (int64_t d = 0; d < DV; d += kW)
    Simd::store(total.acc + d, Simd::fma(factor, Simd::load(acc + d), Simd::load(total.acc + d)));
}

// Writes the result of a head. The sink, a logit without a value, joins the softmax last.
inline void finish(State& s, const float* sinks, int64_t head, int64_t D, int64_t DV, float* out) {
  if (sinks) {
    const float top = greater(s.maximum, sinks[head]);
    scale_state(s, exp_of(s.maximum - top), DV);
    s.sum += exp_of(sinks[head] - top);
  }
  const float inverse = 1.0f / s.sum;
  for (int64_t d = 0; d < D; ++d) out[d] = s.acc[d] * inverse;
}

struct QueryTile {
  int count;
  const float* q[kTileQ];
  int64_t first[kTileQ], end[kTileQ];  // the keys that each may see
  State state[kTileQ];
};

// A page of keys and one of values, and the next pages to prefetch. Pages lie anywhere in memory, so the hardware can't
// predict them.
template <class T>
struct Page {
  const T *k, *v, *next_k, *next_v;
};

template <class T, int N>
inline void fetch_elements(const T* p) {
  for (size_t line = 0; line < N * sizeof(T); line += 64) Simd::prefetch(reinterpret_cast<const char*>(p) + line);
}

// Scores of NV vectors of keys, from key j of a page, for the queries of a tile.
template <class T, int NV>
inline void score_keys(const QueryTile& t, const Page<T>& page, const AttentionShape& s, int64_t j,
                       float (*weight)[kMaxPage]) {
  V score[kTileQ][NV];
  for (int i = 0; i < kTileQ; ++i)
    for (int n = 0; n < NV; ++n) score[i][n] = Simd::zero();
  for (int64_t d = 0; d < s.head_dim; ++d) {
    V key[NV];
    for (int n = 0; n < NV; ++n) key[n] = Simd::load(page.k + d * s.page_size + j + n * kW);
    fetch_elements<T, NV * kW>(page.next_k + d * s.page_size + j);
    for (int i = 0; i < kTileQ; ++i) {
      const V q = Simd::set1(t.q[i][d]);
      for (int n = 0; n < NV; ++n) score[i][n] = Simd::fma(q, key[n], score[i][n]);
    }
  }
  for (int n = 0; n < NV; ++n) {
    V scale = Simd::set1(s.scale);
    if constexpr (kHasScales<T>) scale = Simd::mul(scale, Simd::load(scales_of(page.k, s.head_dim, s.page_size) + j + n * kW));
    for (int i = 0; i < kTileQ; ++i) Simd::store(weight[i] + j + n * kW, Simd::mul(score[i][n], scale));
  }
}

// Adds the values of keys [from, to) of a page, weighted, to NQ states, NV vectors from dimension d on.
template <class T, int NQ, int NV>
inline void add_values(State* const* states, const float* const* weights, int64_t from, int64_t to,
                       const Page<T>& page, int64_t DV, int64_t d) {
  V acc[NQ][NV];
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) acc[i][n] = Simd::load(states[i]->acc + d + n * kW);
  for (int64_t j = from; j < to; ++j) {
    V value[NV];
    for (int n = 0; n < NV; ++n) value[n] = Simd::load(page.v + j * DV + d + n * kW);
    fetch_elements<T, NV * kW>(page.next_v + j * DV + d);
    for (int i = 0; i < NQ; ++i) {
      const V p = Simd::set1(weights[i][j]);
      for (int n = 0; n < NV; ++n) acc[i][n] = Simd::fma(p, value[n], acc[i][n]);
    }
  }
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) Simd::store(states[i]->acc + d + n * kW, acc[i][n]);
}

template <class T, int NQ, int NV>
inline void add_all_values(State* const* states, const float* const* weights, int64_t from, int64_t to,
                           const Page<T>& page, int64_t DV) {
  if (to <= from) return;
  int64_t d = 0;
  for (; d + NV * kW <= DV; d += NV * kW) add_values<T, NQ, NV>(states, weights, from, to, page, DV, d);
  for (; d < DV; d += kW) add_values<T, NQ, 1>(states, weights, from, to, page, DV, d);
}

// Adds one page of keys and values to the state of each query of the tile. Pages come in order of position.
template <class T>
inline void attend_page(QueryTile& t, int64_t first_key, const Page<T>& page, const AttentionShape& s) {
  const int64_t DV = round_up(s.head_dim, 16), P = s.page_size;
  float weight[kTileQ][kMaxPage];
  int64_t j = 0;
  for (; j + 2 * kW <= P; j += 2 * kW) score_keys<T, 2>(t, page, s, j, weight);
  for (; j < P; j += kW) score_keys<T, 1>(t, page, s, j, weight);
  // Keys that all queries see are added for all queries at once, so that their values are read once.
  int64_t from[kTileQ], to[kTileQ], common_from = 0, common_to = P;
  State* states[kTileQ];
  const float* weights[kTileQ];
  for (int i = 0; i < kTileQ; ++i) {
    const int64_t first = greater<int64_t>(t.first[i] - first_key, 0), n = lesser(P, t.end[i] - first_key);
    from[i] = first;
    to[i] = greater(n, first);
    states[i] = &t.state[i];
    weights[i] = weight[i];
    common_from = greater(common_from, from[i]);
    common_to = lesser(common_to, to[i]);
    if (i >= t.count || n <= first) continue;
    State& state = t.state[i];
    float* p = weight[i];
    for (int64_t at = 0; at < first; ++at) p[at] = kNothing;
    for (int64_t at = n; at < P; ++at) p[at] = kNothing;
    V top = Simd::load(p);
    for (int64_t at = kW; at < P; at += kW) top = Simd::max(top, Simd::load(p + at));
    const float maximum = greater(state.maximum, Simd::maximum(top));
    V total = Simd::zero();
    for (int64_t at = 0; at < P; at += kW)
      Simd::store(p + at, exp_ps(Simd::sub(Simd::load(p + at), Simd::set1(maximum))));
    for (int64_t at = 0; at < first; ++at) p[at] = 0.0f;
    for (int64_t at = n; at < P; ++at) p[at] = 0.0f;
    for (int64_t at = 0; at < P; at += kW) total = Simd::add(total, Simd::load(p + at));
    if constexpr (kHasScales<T>) {  // of the keys that are seen: others' may be anything
      const float* scales = scales_of(page.v, DV, P);
      for (int64_t at = first; at < n; ++at) p[at] *= scales[at];
    }
    if (maximum != state.maximum) {
      scale_state(state, state.maximum == kNothing ? 0.0f : exp_of(state.maximum - maximum), DV);
      state.maximum = maximum;
    }
    state.sum += Simd::sum(total);
  }
  constexpr int kVectors = Simd::kTileM > 4 ? 4 : 2;  // registers allow 16 or 8 sums at a time
  if (t.count == kTileQ && common_from < common_to) {
    for (int i = 0; i < kTileQ; ++i)
      add_all_values<T, 1, 4>(states + i, weights + i, from[i], common_from, page, DV);
    add_all_values<T, kTileQ, kVectors>(states, weights, common_from, common_to, page, DV);
    for (int i = 0; i < kTileQ; ++i) add_all_values<T, 1, 4>(states + i, weights + i, common_to, to[i], page, DV);
    return;
  }
  for (int i = 0; i < t.count; ++i) add_all_values<T, 1, 4>(states + i, weights + i, from[i], to[i], page, DV);
}

template <class T>
void attention_store(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head,
                     const int32_t* pages, const T* k_cache, const T* v_cache, const AttentionShape& s, int64_t split0,
                     int64_t split1, float* partial, float* out, int64_t ldo) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), P = s.page_size, group = s.query_heads / s.kv_heads;
  const int64_t total = count * group, width = split_pages(P);
  const int64_t k_page = page_elements<T>(D, P), v_page = page_elements<T>(DV, P);
  for (int64_t t0 = 0; t0 < total; t0 += kTileQ) {
    QueryTile t;
    State whole[kTileQ];
    t.count = static_cast<int>(lesser<int64_t>(kTileQ, total - t0));
    int64_t first = position + count, end = 0;
    for (int i = 0; i < kTileQ; ++i) {
      const int64_t n = t0 + lesser<int64_t>(i, t.count - 1);  // an unused place repeats the last query
      const int64_t row = n / group, head = kv_head * group + n % group;
      t.q[i] = q + row * ldq + head * D;
      t.end[i] = position + row + 1;
      t.first[i] = s.window ? greater<int64_t>(0, t.end[i] - s.window) : 0;
      first = lesser(first, t.first[i]);
      end = greater(end, t.end[i]);
      clear(whole[i], DV);
    }
    for (int64_t split = greater(split0, first / (width * P)); split < split1 && split * width * P < end; ++split) {
      for (int i = 0; i < t.count; ++i) clear(t.state[i], DV);
      const int64_t last = lesser((split + 1) * width, (end + P - 1) / P);
      for (int64_t page = greater(split * width, first / P); page < last; ++page) {
        const int64_t base = static_cast<int64_t>(pages[page]) * s.kv_heads + kv_head;
        const int64_t next = page + 1 < last ? static_cast<int64_t>(pages[page + 1]) * s.kv_heads + kv_head : base;
        const Page<T> at{k_cache + base * k_page, v_cache + base * v_page, k_cache + next * k_page, v_cache + next * v_page};
        attend_page(t, page * P, at, s);
      }
      for (int i = 0; i < t.count; ++i) merge(whole[i], t.state[i].maximum, t.state[i].sum, t.state[i].acc, DV);
    }
    for (int i = 0; i < t.count; ++i) {
      const int64_t n = t0 + i, row = n / group, head = kv_head * group + n % group;
      if (partial == nullptr) {
        finish(whole[i], s.sinks, head, D, DV, out + row * ldo + head * D);
        continue;
      }
      float* to = partial + n * state_floats(D);
      to[0] = whole[i].maximum;
      to[1] = whole[i].sum;
      std::memcpy(to + 16, whole[i].acc, DV * sizeof(float));
    }
  }
}

void attention(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head, const int32_t* pages,
               const void* k_cache, const void* v_cache, const AttentionShape& s, int64_t split0, int64_t split1,
               float* partial, float* out, int64_t ldo) {
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    attention_store(q, ldq, position, count, kv_head, pages, static_cast<const T*>(k_cache),
                    static_cast<const T*>(v_cache), s, split0, split1, partial, out, ldo);
  };
  switch (s.store) {
    case Store::kFp32: return run(static_cast<float*>(nullptr));
    case Store::kBf16: return run(static_cast<Simd::Bf16*>(nullptr));
    case Store::kFp16: return run(static_cast<Simd::Fp16*>(nullptr));
    case Store::kInt8: return run(static_cast<int8_t*>(nullptr));
    default: return;  // refused before
  }
}

void combine(const float* partial, int64_t splits, int64_t stride, int64_t kv_head, const AttentionShape& s,
             float* out) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), group = s.query_heads / s.kv_heads;
  for (int64_t i = 0; i < group; ++i) {
    State whole;
    clear(whole, DV);
    for (int64_t split = 0; split < splits; ++split) {
      const float* from = partial + split * stride + i * state_floats(D);
      merge(whole, from[0], from[1], from + 16, DV);
    }
    const int64_t head = kv_head * group + i;
    finish(whole, s.sinks, head, D, DV, out + head * D);
  }
}
