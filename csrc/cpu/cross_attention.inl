// Attention to an encoder's output in pages of the KV cache: every query sees all `rows` positions. Part of kernels.inl;
// attention.inl describes the pages.
//
// Up to kCrossQueries queries share one pass over the keys and values. Pages lie anywhere in memory, so the next ones are
// prefetched.
//
// Order of sums. Positions are cut into the splits of attention.inl. A split has one softmax, and its weighted values are
// added in order of position. The states of the splits are merged in order. No operation mixes queries.

constexpr int64_t kMaxSplit = 256;  // positions of a split: split_pages(page_size) * page_size at most

template <class T>
void write_page_store(const float* k, const float* v, int64_t ld, int64_t count, int64_t page, int64_t kv_head,
                      const AttentionShape& s, T* k_cache, T* v_cache) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), P = s.page_size, base = page * s.kv_heads + kv_head;
  T *keys = k_cache + base * D * P, *values = v_cache + base * P * DV;
  for (int64_t d = 0; d < D; ++d)
    for (int64_t j = 0; j < count; ++j) put(keys + d * P + j, k[j * ld + d]);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t d = 0; d < D; ++d) put(values + j * DV + d, v[j * ld + d]);
    for (int64_t d = D; d < DV; ++d) put(values + j * DV + d, 0.0f);
  }
}

void write_page(const float* k, const float* v, int64_t ld, int64_t count, int64_t page, int64_t kv_head,
                const AttentionShape& s, void* k_cache, void* v_cache) {
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    write_page_store(k, v, ld, count, page, kv_head, s, static_cast<T*>(k_cache), static_cast<T*>(v_cache));
  };
  switch (s.store) {
    case Store::kFp32: return run(static_cast<float*>(nullptr));
    case Store::kBf16: return run(static_cast<Simd::Bf16*>(nullptr));
    case Store::kFp16: return run(static_cast<Simd::Fp16*>(nullptr));
    default: return;  // refused before
  }
}

// Where the keys or values of a sequence's output lie, for one KV head.
template <class T>
struct CrossPages {
  const T* cache;
  const int32_t* pages;
  int64_t kv_heads, kv_head, page_floats;  // page_floats: elements of one head's page

  // A position, `stride` elements apart in its page.
  const T* at(int64_t position, int64_t stride, int64_t page_size) const {
    const int64_t page = pages[position / page_size];
    return cache + (page * kv_heads + kv_head) * page_floats + position % page_size * stride;
  }
};

// Scores of NV vectors of keys from position `first`, a multiple of kW, for NQ queries. Vectors may lie in different pages.
template <class T, int NQ, int NV>
inline void cross_scores(const float* const* q, const CrossPages<T>& keys, int64_t first, const AttentionShape& s,
                         float* score, int64_t ld, int64_t rows) {
  const T *key_of[NV], *next_of[NV];
  for (int n = 0; n < NV; ++n) {
    const int64_t position = first + n * kW, next = position + NV * kW;
    key_of[n] = keys.at(position, 1, s.page_size);
    next_of[n] = next < rows ? keys.at(next, 1, s.page_size) : key_of[n];
  }
  V sum[NQ][NV];
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) sum[i][n] = Simd::zero();
  for (int64_t d = 0; d < s.head_dim; ++d) {
    V key[NV];
    for (int n = 0; n < NV; ++n) {
      key[n] = Simd::load(key_of[n] + d * s.page_size);
      fetch_elements<T, kW>(next_of[n] + d * s.page_size);
    }
    for (int i = 0; i < NQ; ++i) {
      const V one = Simd::set1(q[i][d]);
      for (int n = 0; n < NV; ++n) sum[i][n] = Simd::fma(one, key[n], sum[i][n]);
    }
  }
  const V scale = Simd::set1(s.scale);
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) Simd::store(score + i * ld + n * kW, Simd::mul(sum[i][n], scale));
}

// Adds `count` values of one page, weighted, NV vectors of their dimensions. next: the page read next, to be prefetched.
template <class T, int NQ, int NV>
inline void cross_values(const float* weight, int64_t ld, const T* values, const T* next, int64_t count, int64_t DV,
                         State* states, int64_t d) {
  V sum[NQ][NV];
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) sum[i][n] = Simd::load(states[i].acc + d + n * kW);
  for (int64_t j = 0; j < count; ++j) {
    V value[NV];
    for (int n = 0; n < NV; ++n) value[n] = Simd::load(values + j * DV + d + n * kW);
    fetch_elements<T, NV * kW>(next + j * DV + d);
    for (int i = 0; i < NQ; ++i) {
      const V p = Simd::set1(weight[i * ld + j]);
      for (int n = 0; n < NV; ++n) sum[i][n] = Simd::fma(p, value[n], sum[i][n]);
    }
  }
  for (int i = 0; i < NQ; ++i)
    for (int n = 0; n < NV; ++n) Simd::store(states[i].acc + d + n * kW, sum[i][n]);
}

// Scores of `count` positions become weights relative to e^maximum. Returns their sum.
inline float cross_softmax(float* score, int64_t count, float& maximum) {
  const int64_t padded = round_up(count, kW);
  for (int64_t j = count; j < padded; ++j) score[j] = kNothing;
  V top = Simd::load(score);
  for (int64_t j = kW; j < padded; j += kW) top = Simd::max(top, Simd::load(score + j));
  maximum = Simd::maximum(top);
  const V most = Simd::set1(maximum);
  for (int64_t j = 0; j < padded; j += kW) Simd::store(score + j, exp_ps(Simd::sub(Simd::load(score + j), most)));
  for (int64_t j = count; j < padded; ++j) score[j] = 0.0f;
  V total = Simd::zero();
  for (int64_t j = 0; j < padded; j += kW) total = Simd::add(total, Simd::load(score + j));
  const float sum = Simd::sum(total);
  if (sum != sum) maximum = sum;  // merge() takes a maximum of -inf for a split without keys
  return sum;
}

// One split, the positions [from, to), for NQ queries.
template <class T, int NQ>
inline void cross_split(const float* const* q, const CrossPages<T>& keys, const CrossPages<T>& values, int64_t from,
                        int64_t to, const AttentionShape& s, State* states) {
  // Sums at a time, as the registers allow.
  constexpr int kMost = Simd::kTileM > 3 ? 24 : 12, kVectors = NQ * 4 <= kMost ? 4 : NQ * 2 <= kMost ? 2 : 1;
  const int64_t DV = round_up(s.head_dim, 16), P = s.page_size;
  alignas(64) float score[NQ * kMaxSplit];
  int64_t j = 0;
  for (; j + kVectors * kW <= round_up(to - from, kW); j += kVectors * kW)
    cross_scores<T, NQ, kVectors>(q, keys, from + j, s, score + j, kMaxSplit, to);
  for (; j < to - from; j += kW) cross_scores<T, NQ, 1>(q, keys, from + j, s, score + j, kMaxSplit, to);
  for (int i = 0; i < NQ; ++i) {
    clear(states[i], DV);
    states[i].sum = cross_softmax(score + i * kMaxSplit, to - from, states[i].maximum);
  }
  for (int64_t at = from; at < to; at += P) {
    const T *page = values.at(at, DV, P), *next = at + P < to ? values.at(at + P, DV, P) : page;
    const int64_t count = lesser(P, to - at);
    const float* weight = score + at - from;
    int64_t d = 0;
    for (; d + kVectors * kW <= DV; d += kVectors * kW)
      cross_values<T, NQ, kVectors>(weight, kMaxSplit, page, next, count, DV, states, d);
    for (; d < DV; d += kW) cross_values<T, NQ, 1>(weight, kMaxSplit, page, next, count, DV, states, d);
  }
}

template <class T, int NQ>
void cross_tile(const CrossQueries& t, const CrossPages<T>& keys, const CrossPages<T>& values, int64_t rows, int64_t split0,
                int64_t split1, const AttentionShape& s) {
  const int64_t D = s.head_dim, DV = round_up(D, 16), width = split_pages(s.page_size) * s.page_size;
  const float* q[NQ];
  for (int i = 0; i < NQ; ++i) q[i] = t.q[lesser<int64_t>(i, t.count - 1)];  // an unused place repeats the last query
  State whole[NQ], part[NQ];
  for (int i = 0; i < NQ; ++i) clear(whole[i], DV);
  for (int64_t split = split0; split < split1; ++split) {
    cross_split<T, NQ>(q, keys, values, split * width, lesser(rows, (split + 1) * width), s, part);
    for (int64_t i = 0; i < t.count; ++i) merge(whole[i], part[i].maximum, part[i].sum, part[i].acc, DV);
  }
  for (int64_t i = 0; i < t.count; ++i) {
    if (t.partial[i] == nullptr) {
      finish(whole[i], nullptr, 0, D, DV, t.out[i]);
      continue;
    }
    t.partial[i][0] = whole[i].maximum;
    t.partial[i][1] = whole[i].sum;
    std::memcpy(t.partial[i] + 16, whole[i].acc, DV * sizeof(float));
  }
}

void cross_attention(const CrossQueries& t, int64_t kv_head, const int32_t* pages, int64_t rows, const void* k_cache,
                     const void* v_cache, const AttentionShape& s, int64_t split0, int64_t split1) {
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t D = s.head_dim, P = s.page_size;
    const CrossPages<T> keys{static_cast<const T*>(k_cache), pages, s.kv_heads, kv_head, D * P};
    const CrossPages<T> values{static_cast<const T*>(v_cache), pages, s.kv_heads, kv_head, round_up(D, 16) * P};
    if (t.count == 1) return cross_tile<T, 1>(t, keys, values, rows, split0, split1, s);
    if (t.count == 2) return cross_tile<T, 2>(t, keys, values, rows, split0, split1, s);
    if (t.count <= 4) return cross_tile<T, 4>(t, keys, values, rows, split0, split1, s);
    if (t.count == 5) return cross_tile<T, 5>(t, keys, values, rows, split0, split1, s);
    return cross_tile<T, kCrossQueries>(t, keys, values, rows, split0, split1, s);
  };
  switch (s.store) {
    case Store::kFp32: return run(static_cast<float*>(nullptr));
    case Store::kBf16: return run(static_cast<Simd::Bf16*>(nullptr));
    case Store::kFp16: return run(static_cast<Simd::Fp16*>(nullptr));
    default: return;  // refused before
  }
}

template <class T>
void cross_weights_store(const float* q, const CrossPages<T>& keys, int64_t rows, const AttentionShape& s, float* out) {
  V top = Simd::set1(kNothing), total = Simd::zero();
  float lanes[kW];
  for (int64_t j = 0; j < rows; j += kW) {
    cross_scores<T, 1, 1>(&q, keys, j, s, lanes, 0, rows);
    const int64_t count = lesser<int64_t>(kW, rows - j);
    std::memcpy(out + j, lanes, count * sizeof(float));
    for (int64_t n = count; n < kW; ++n) lanes[n] = kNothing;
    top = Simd::max(top, Simd::load(lanes));
  }
  const V most = Simd::set1(Simd::maximum(top));
  for (int64_t j = 0; j < rows; j += kW) {
    const int64_t count = lesser<int64_t>(kW, rows - j);
    Simd::store(lanes, exp_ps(Simd::sub(Simd::load_part(out + j, static_cast<int>(count)), most)));
    std::memcpy(out + j, lanes, count * sizeof(float));
    total = Simd::add(total, Simd::load_part(out + j, static_cast<int>(count)));
  }
  const float inverse = 1.0f / Simd::sum(total);
  for (int64_t j = 0; j < rows; ++j) out[j] *= inverse;
}

void cross_weights(const float* q, int64_t kv_head, const int32_t* pages, int64_t rows, const void* k_cache,
                   const AttentionShape& s, float* out) {
  auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cross_weights_store<T>(q, {static_cast<const T*>(k_cache), pages, s.kv_heads, kv_head, s.head_dim * s.page_size}, rows,
                           s, out);
  };
  switch (s.store) {
    case Store::kFp32: return run(static_cast<float*>(nullptr));
    case Store::kBf16: return run(static_cast<Simd::Bf16*>(nullptr));
    case Store::kFp16: return run(static_cast<Simd::Fp16*>(nullptr));
    default: return;  // refused before
  }
}
