// Attention without a causal limit: pack_window and encoder_attention, write_page, cross_attention and cross_weights.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "caches.h"

namespace cai::check {
namespace {

using Element = std::function<double(int64_t position, int64_t d)>;

// The softmax of one query over `rows` keys, in float64.
std::vector<double> softmax(const float* q, int64_t rows, int64_t D, double scale, const Element& key) {
  std::vector<double> weight(rows, 0.0);
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t d = 0; d < D; ++d) weight[j] += scale * q[d] * key(j, d);
  const double top = *std::max_element(weight.begin(), weight.end());
  double total = 0;
  for (double& w : weight) total += w = std::exp(w - top);
  for (double& w : weight) w /= total;
  return weight;
}

double weighted(const std::vector<double>& weight, int64_t d, const Element& value) {
  double sum = 0;
  for (size_t j = 0; j < weight.size(); ++j) sum += weight[j] * value(static_cast<int64_t>(j), d);
  return sum;
}

void check_window(const KernelTable& table, Random& random, int64_t D, int64_t rows, int64_t count, Report& report) {
  const int64_t ld = 3 * D + random.between(0, 4), ldo = D + random.between(0, 4);
  // Rows of queries, keys and values side by side; the last row ends where its values do.
  const int64_t all = std::max(rows, count);
  const Buffer<float> qkv = random.floats((all - 1) * ld + 3 * D, -2, 2);
  const float *k = qkv.data() + D, *v = qkv.data() + 2 * D, scale = 1.0f / std::sqrt(static_cast<float>(D));
  Buffer<float> packed(window_floats(rows, D), NAN), work(encoder_work_floats(D), NAN), out(count * ldo, kUntouched);
  table.pack_window(k, v, ld, rows, D, packed.data());
  table.encoder_attention(qkv.data(), ld, count, packed.data(), rows, D, scale, work.data(), out.data(), ldo);
  for (int64_t i = 0; i < count; ++i) {
    const Element key = [&](int64_t j, int64_t d) { return k[j * ld + d]; };
    const std::vector<double> weight = softmax(qkv.data() + i * ld, rows, D, scale, key);
    const Element value = [&](int64_t j, int64_t d) { return v[j * ld + d]; };
    for (int64_t d = 0; d < ldo; ++d) {
      if (d < D) {
        report.value("encoder_attention", out[i * ldo + d], weighted(weight, d, value), 1.0, 2e-6);
      } else {
        report.expect(out[i * ldo + d] == kUntouched, "encoder_attention", "wrote beyond its head");
      }
    }
    Buffer<float> alone(D);
    table.encoder_attention(qkv.data() + i * ld, ld, 1, packed.data(), rows, D, scale, work.data(), alone.data(), D);
    report.same(alone, {out.begin() + i * ldo, out.begin() + i * ldo + D}, "encoder_attention",
                "a row's bits depend on the rows it came with");
  }
}

void check_output(const KernelTable& table, Random& random, AttentionShape shape, int64_t rows, int64_t count,
                  Report& report) {
  const int64_t D = shape.head_dim, P = shape.page_size, used = (rows + P - 1) / P;
  const int64_t head = random.between(0, shape.kv_heads - 1);
  const std::string cross = std::string("cross_attention ") + name(shape.store);
  shape.pages_per_sequence = used;
  Caches caches(shape, used + 2, 0xff), want(shape, used + 2, 0xff);  // NaN, which must not be seen
  const Buffer<int32_t> pages = random.choice(used, used + 2);
  const int64_t ld = 2 * D + random.between(0, 4);
  const Buffer<float> kv = random.floats((rows - 1) * ld + 2 * D, -2, 2);
  for (int64_t p = 0; p < used; ++p) {
    const int64_t here = std::min(P, rows - p * P);
    table.write_page(kv.data() + p * P * ld, kv.data() + p * P * ld + D, ld, here, pages[p], head, shape, caches.keys.data(),
                     caches.values.data());
    for (int64_t j = 0; j < here; ++j) want.write(pages[p], head, j, &kv[(p * P + j) * ld], &kv[(p * P + j) * ld + D]);
  }
  report.expect(caches.keys == want.keys && caches.values == want.values, std::string("write_page ") + name(shape.store),
                "the cached keys and values are not those, rounded");

  const int64_t splits = (rows + split_pages(P) * P - 1) / (split_pages(P) * P), floats = state_floats(D);
  const Buffer<float> q = random.floats(count * D, -2, 2);
  Buffer<float> out(count * D, kUntouched), alone(count * D, kUntouched), merged(D), states(count * splits * floats);
  CrossQueries all{}, one{};
  all.count = count;
  one.count = 1;
  for (int64_t i = 0; i < count; ++i) {
    all.q[i] = one.q[0] = &q[i * D];
    all.out[i] = &out[i * D];
    one.out[0] = &alone[i * D];
    table.cross_attention(one, head, pages.data(), rows, caches.keys.data(), caches.values.data(), shape, 0, splits);
  }
  table.cross_attention(all, head, pages.data(), rows, caches.keys.data(), caches.values.data(), shape, 0, splits);
  report.same(alone, out, cross, "a query's bits depend on the queries it came with");
  for (int64_t s = splits - 1; s >= 0; --s) {
    for (int64_t i = 0; i < count; ++i) all.partial[i] = &states[(i * splits + s) * floats];
    table.cross_attention(all, head, pages.data(), rows, caches.keys.data(), caches.values.data(), shape, s, s + 1);
  }
  AttentionShape single = shape;  // combine takes whole groups of query heads
  single.query_heads = single.kv_heads = 1;
  const Element key = [&](int64_t j, int64_t d) { return caches.key(pages[j / P], head, j % P, d); };
  const Element value = [&](int64_t j, int64_t d) { return caches.value(pages[j / P], head, j % P, d); };
  for (int64_t i = 0; i < count; ++i) {
    table.combine(&states[i * splits * floats], splits, floats, 0, single, merged.data());
    report.same(merged, {out.begin() + i * D, out.begin() + (i + 1) * D}, cross,
                "the bits depend on who attends which split");
    const std::vector<double> weight = softmax(&q[i * D], rows, D, shape.scale, key);
    for (int64_t d = 0; d < D; ++d) report.value(cross, out[i * D + d], weighted(weight, d, value), 1.0, 2e-6);
    Buffer<float> weights(rows);
    table.cross_weights(&q[i * D], head, pages.data(), rows, caches.keys.data(), shape, weights.data());
    for (int64_t j = 0; j < rows; ++j)
      report.value(std::string("cross_weights ") + name(shape.store), weights[j], weight[j], weight[j], 5e-6);
  }
}

}  // namespace

void check_full_attention(const KernelTable& table, Report& report) {
  Random random(7);
  for (int64_t D : {1, 7, 16, 33, 64, 80, 128})
    for (int64_t rows : {int64_t(1), random.between(2, 63), random.between(64, 200)})
      check_window(table, random, D, rows, random.between(1, 30), report);
  for (Store store : kCacheStores) {
    for (int64_t D : {1, 7, 16, 33, 64, 80, 128}) {
      const int64_t kv_heads = random.between(1, 2), query_heads = kv_heads * random.between(1, 3);
      const AttentionShape shape{query_heads, kv_heads, D, random.between(1, 4) * 16, 0, 0, nullptr,
                                 1.0f / std::sqrt(static_cast<float>(D)), store};
      for (int64_t count = 1; count <= kCrossQueries; ++count)
        check_output(table, random, shape, random.between(1, count == 3 ? 600 : 100), count, report);
    }
  }
}

}  // namespace cai::check
