// rotate, write_kv, attention and combine.
#include <algorithm>
#include <cmath>
#include <limits>

#include "caches.h"

namespace cai::check {
namespace {

// Query rows of one sequence over a cache of its own.
struct Sequence {
  const KernelTable& table;
  Caches caches;
  int64_t position, count, ldq, ldo;
  Buffer<int32_t> pages;
  Buffer<float> q;

  int64_t group() const { return caches.shape.query_heads / caches.shape.kv_heads; }
  int64_t width() const { return caches.shape.query_heads * caches.shape.head_dim; }
  int64_t splits() const {
    const int64_t keys = split_pages(caches.shape.page_size) * caches.shape.page_size;
    return (position + count + keys - 1) / keys;
  }
  const void* keys() const { return caches.keys.data(); }
  const void* values() const { return caches.values.data(); }

  // Rows [first, last), in one call over all splits.
  Buffer<float> run(int64_t first, int64_t last, int64_t head) const {
    Buffer<float> out((last - first) * ldo, kUntouched);
    const Buffer<float> rows(q.begin() + first * ldq, q.begin() + (last - 1) * ldq + width());
    table.attention(rows.data(), ldq, position + first, last - first, head, pages.data(), keys(), values(), caches.shape,
                    0, splits(), nullptr, out.data(), ldo);
    return out;
  }

  // All rows, one split a call, merged by combine.
  Buffer<float> run_in_splits(int64_t head) const {
    const int64_t row_floats = group() * state_floats(caches.shape.head_dim), stride = count * row_floats;
    Buffer<float> partial(splits() * stride, kUntouched), out(count * ldo, kUntouched);
    for (int64_t s = splits() - 1; s >= 0; --s)
      table.attention(q.data(), ldq, position, count, head, pages.data(), keys(), values(), caches.shape, s, s + 1,
                      partial.data() + s * stride, nullptr, 0);
    for (int64_t i = 0; i < count; ++i)
      table.combine(partial.data() + i * row_floats, splits(), stride, head, caches.shape, out.data() + i * ldo);
    return out;
  }

  // The result of one row and query head in float64.
  std::vector<double> expected(int64_t row, int64_t head) const {
    const AttentionShape& s = caches.shape;
    const int64_t P = s.page_size, kv_head = head / group(), end = position + row + 1;
    const int64_t first = s.window ? std::max<int64_t>(0, end - s.window) : 0;
    double top = s.sinks ? s.sinks[head] : -std::numeric_limits<double>::infinity(), total = 0;
    std::vector<double> weight(end - first, 0.0), y(s.head_dim, 0.0);
    for (int64_t j = first; j < end; ++j) {
      double& score = weight[j - first];
      for (int64_t d = 0; d < s.head_dim; ++d)
        score += q[row * ldq + head * s.head_dim + d] * caches.key(pages[j / P], kv_head, j % P, d);
      score *= s.scale;
      top = std::max(top, score);
    }
    for (double& w : weight) total += w = std::exp(w - top);
    if (s.sinks) total += std::exp(s.sinks[head] - top);
    for (int64_t j = first; j < end; ++j)
      for (int64_t d = 0; d < s.head_dim; ++d)
        y[d] += weight[j - first] / total * caches.value(pages[j / P], kv_head, j % P, d);
    return y;
  }
};

Sequence random_sequence(const KernelTable& table, Random& random, AttentionShape shape, int64_t position, int64_t count) {
  const int64_t P = shape.page_size, used = (position + count + P - 1) / P, pages = used + 2;
  shape.pages_per_sequence = used;
  // A place that no token has filled holds NaN (all bits one): it must not be seen.
  Sequence s{table, Caches(shape, pages, 0xff), position, count, 0, 0, random.choice(used, pages), {}};
  s.ldq = s.width() + random.between(0, 5);
  s.ldo = s.width() + random.between(0, 5);
  s.q = random.floats(count * s.ldq, -2, 2);
  for (int64_t j = 0; j < position + count; ++j) {
    for (int64_t h = 0; h < shape.kv_heads; ++h) {
      const Buffer<float> k = random.floats(shape.head_dim, -2, 2), v = random.floats(shape.head_dim);
      s.caches.write(s.pages[j / P], h, j % P, k.data(), v.data());
    }
  }
  // Pages that a window has left behind may be anyone's: an index that no memory stands behind.
  if (shape.window)
    for (int64_t page = 0; (page + 1) * P <= position + 1 - shape.window; ++page) s.pages[page] = INT32_MAX / 2;
  return s;
}

void check_sequence(const Sequence& s, int64_t head, Report& report) {
  const std::string kernel = std::string("attention ") + name(s.caches.shape.store);
  const int64_t D = s.caches.shape.head_dim;
  const Buffer<float> out = s.run(0, s.count, head);
  for (int64_t i = 0; i < s.count; ++i) {
    bool kept = true;
    for (int64_t n = 0; n < s.ldo; ++n)
      kept &= (n < s.width() && n / D / s.group() == head) || out[i * s.ldo + n] == kUntouched;
    report.expect(kept, kernel, "wrote a head it was not given");
    for (int64_t g = head * s.group(); g < (head + 1) * s.group(); ++g) {
      const std::vector<double> want = s.expected(i, g);
      for (int64_t d = 0; d < D; ++d) report.value(kernel, out[i * s.ldo + g * D + d], want[d], 1.0, 2e-6);
    }
    report.same(s.run(i, i + 1, head), {out.begin() + i * s.ldo, out.begin() + (i + 1) * s.ldo}, kernel,
                "a row's bits depend on the rows it came with");
  }
  report.same(s.run_in_splits(head), out, kernel, "the bits depend on who attends which split");
}

}  // namespace

void check_attention(const KernelTable& table, Report& report) {
  Random random(6);
  for (Store store : kCacheStores) {
    for (int64_t D : {1, 7, 16, 33, 64, 80, 128}) {
      const int64_t kv_heads = random.between(1, 2), query_heads = kv_heads * random.between(1, 5);
      const Buffer<float> sinks = random.floats(query_heads, -1, 6);
      for (const bool with_window : {false, true}) {
        const int64_t window = with_window ? random.between(1, 90) : 0, P = random.between(1, 4) * 16;
        const int64_t position = random.between(0, with_window ? 300 : 130), count = random.between(1, 9);
        const AttentionShape shape{query_heads, kv_heads, D, P, 0, window, random.between(0, 1) ? sinks.data() : nullptr,
                                   1.0f / std::sqrt(static_cast<float>(D)), store};
        const Sequence s = random_sequence(table, random, shape, position, count);
        check_sequence(s, random.between(0, kv_heads - 1), report);
      }
    }
    // Long enough for several splits.
    const AttentionShape shape{3, 1, 20, random.between(1, 4) * 16, 0, 0, nullptr, 0.3f, store};
    check_sequence(random_sequence(table, random, shape, random.between(500, 800), 3), 0, report);
  }
}

void check_rotate(const KernelTable& table, Report& report) {
  Random random(5);
  for (int64_t D : {2, 7, 16, 33, 64, 128}) {
    const int64_t heads = random.between(1, 5), rotary = random.between(0, D / 2) * 2, half = rotary / 2;
    const Buffer<float> x = random.floats(heads * D, -4, 4);
    Buffer<float> cos_sin(rotary), out(heads * D, kUntouched), in_place = x;
    for (int64_t d = 0; d < half; ++d) {
      const double angle = random.uniform(0, 5000);
      cos_sin[d] = static_cast<float>(std::cos(angle));
      cos_sin[half + d] = static_cast<float>(std::sin(angle));
    }
    table.rotate(x.data(), heads, D, cos_sin.data(), rotary, out.data());
    table.rotate(in_place.data(), heads, D, cos_sin.data(), rotary, in_place.data());
    report.same(in_place, out, "rotate", "the result in place is another");
    for (int64_t n = 0; n < heads * D; ++n) {
      const float* head = x.data() + n / D * D;
      const int64_t d = n % D;
      if (d >= rotary) {
        report.expect(out[n] == x[n], "rotate", "changed what is not rotated");
        continue;
      }
      const double a = head[d % half], b = head[d % half + half], c = cos_sin[d % half], s = cos_sin[d % half + half];
      report.value("rotate", out[n], d < half ? a * c - b * s : b * c + a * s, std::fabs(a) + std::fabs(b), 1.5e-7);
    }
  }
}

void check_write_kv(const KernelTable& table, Report& report) {
  Random random(11);
  for (Store store : kCacheStores) {
    for (int64_t D : {1, 7, 16, 33, 64}) {
      const AttentionShape shape{2, 2, D, random.between(1, 4) * 16, 3, 0, nullptr, 1.0f, store};
      Caches got(shape, 3, 0x5a), want(shape, 3, 0x5a);
      for (int i = 0; i < 8; ++i) {
        Buffer<float> k = random.floats(D, -100, 100), v = random.floats(D, -1e-4f, 1e-4f);
        if (i == 0) k[0] = 1e30f;  // an infinity in fp16
        if (i == 1) v[0] = NAN;
        const int64_t slot = random.between(0, 3 * shape.page_size - 1), head = random.between(0, 1);
        table.write_kv(k.data(), v.data(), slot, head, shape, got.keys.data(), got.values.data());
        want.write(slot / shape.page_size, head, slot % shape.page_size, k.data(), v.data());
      }
      report.expect(got.keys == want.keys, std::string("write_kv ") + name(store), "the cached keys are not those, rounded");
      report.expect(got.values == want.values, std::string("write_kv ") + name(store),
                    "the cached values are not those, rounded and padded with zeros");
    }
  }
}

}  // namespace cai::check
