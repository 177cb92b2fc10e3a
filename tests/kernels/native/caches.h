// A KV cache laid out as attention.inl says: keys [page][kv_head][head_dim][page_size], values
// [page][kv_head][page_size][round_up(head_dim, 16)].
#pragma once

#include "checks.h"

namespace cai::check {

// Both caches, every byte the same until written.
struct Caches {
  AttentionShape shape;
  int64_t size, value_dim;
  Buffer<uint8_t> keys, values;

  Caches(const AttentionShape& s, int64_t pages, uint8_t pattern)
      : shape(s), size(element_size(s.store)), value_dim(round_up(s.head_dim, 16)),
        keys(pages * s.kv_heads * s.head_dim * s.page_size * size, pattern),
        values(pages * s.kv_heads * s.page_size * value_dim * size, pattern) {}

  int64_t key_place(int64_t page, int64_t head, int64_t offset, int64_t d) const {
    return (((page * shape.kv_heads + head) * shape.head_dim + d) * shape.page_size + offset) * size;
  }
  int64_t value_place(int64_t page, int64_t head, int64_t offset, int64_t d) const {
    return (((page * shape.kv_heads + head) * shape.page_size + offset) * value_dim + d) * size;
  }
  void write(int64_t page, int64_t head, int64_t offset, const float* k, const float* v) {
    for (int64_t d = 0; d < shape.head_dim; ++d) encode(shape.store, k[d], &keys[key_place(page, head, offset, d)]);
    for (int64_t d = 0; d < value_dim; ++d)
      encode(shape.store, d < shape.head_dim ? v[d] : 0.0, &values[value_place(page, head, offset, d)]);
  }
  double key(int64_t page, int64_t head, int64_t offset, int64_t d) const {
    return decode(shape.store, &keys[key_place(page, head, offset, d)]);
  }
  double value(int64_t page, int64_t head, int64_t offset, int64_t d) const {
    return decode(shape.store, &values[value_place(page, head, offset, d)]);
  }
};

}  // namespace cai::check
