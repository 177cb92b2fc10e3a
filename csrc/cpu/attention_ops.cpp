// Rotary embedding, the write to the KV cache and attention, as one operation.
//
// A decode step takes one phase: who attends a sequence's KV head also rotates its query heads and its new key, and writes
// that key and value. Where there are few of those for the threads, the splits of their keys are dealt apart, and a second
// phase merges them. Prompts take two phases, since a row may see keys of rows that another thread writes.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <vector>

#include "ops.h"

namespace cai {
namespace {

// Rows of one sequence and one KV head of a prompt that are attended together.
constexpr Int kRowsPerTask = 16;

Int qkv_width(const AttentionShape& s) { return (s.query_heads + 2 * s.kv_heads) * s.head_dim; }

void check_shape(const AttentionShape& s, const Int* d) {
  if (s.head_dim < 1 || s.head_dim > 512 || s.page_size < 16 || s.page_size > 64 || s.page_size % 16 ||
      s.kv_heads < 1 || s.query_heads % s.kv_heads || d[4] < 0 || d[4] > 2 || s.window < 0)
    TVM_FFI_THROW(ValueError) << "attention takes head_dim up to 512, a page_size of 16, 32, 48 or 64, whole groups of "
                                 "query heads and a float cache";
}

// A slot or page outside the cache would be written to or read all the same.
void check_batch(const AttentionCall& c, Int pages, Int positions) {
  const Batch& b = c.batch;
  const Int size = c.shape.page_size;
  for (Int i = 0; i < c.M; ++i) {
    if (b.slots[i] < 0 || b.slots[i] >= pages * size)
      TVM_FFI_THROW(IndexError) << "slot " << b.slots[i] << " is outside the cache's " << pages << " pages of " << size;
    if (b.positions[i] < 0 || b.positions[i] >= positions)
      TVM_FFI_THROW(IndexError) << "position " << b.positions[i] << " is outside the rotary table's " << positions;
  }
  for (Int i = 0; i < b.sequences; ++i) {
    const Int rows = b.query_start[i + 1] - b.query_start[i], used = (b.context_len[i] + size - 1) / size;
    if (rows < 0 || rows > b.context_len[i] || b.query_start[i + 1] > c.M || used > c.shape.pages_per_sequence)
      TVM_FFI_THROW(IndexError) << "sequence " << i << " has " << rows << " rows and a context of " << b.context_len[i]
                                << " in " << c.shape.pages_per_sequence << " pages";
    const int32_t* table = b.page_table + i * c.shape.pages_per_sequence;
    for (Int p = 0; p < used; ++p)
      if (table[p] < 0 || table[p] >= pages)
        TVM_FFI_THROW(IndexError) << "page " << table[p] << " is outside the cache's " << pages;
  }
}

Int splits_of(const AttentionShape& s, Int context) {
  const Int keys = split_pages(s.page_size) * s.page_size;
  return (context + keys - 1) / keys;
}

// One sequence's new token, for one KV head and the splits [split0, split1).
void decode_head(const AttentionCall& c, Int sequence, Int head, Int split0, Int split1, float* partial) {
  const AttentionShape& s = c.shape;
  const KernelTable& k = kernels();
  const Int D = s.head_dim, group = s.query_heads / s.kv_heads, context = c.batch.context_len[sequence];
  const float* row = c.qkv + sequence * qkv_width(s);
  const float* cos_sin = c.cos_sin + c.batch.positions[sequence] * c.rotary_dim;
  float* q = static_cast<float*>(private_memory(Private::kQuery, (group + 1) * D * Int(sizeof(float))));
  k.rotate(row + head * group * D, group, D, cos_sin, c.rotary_dim, q);
  if (split1 == splits_of(s, context)) {  // the one that holds the new key; no other looks at it
    float* key = q + group * D;
    k.rotate(row + (s.query_heads + head) * D, 1, D, cos_sin, c.rotary_dim, key);
    k.write_kv(key, row + (s.query_heads + s.kv_heads + head) * D, c.batch.slots[sequence], head, s, c.k_cache, c.v_cache);
  }
  // The kernel finds a head's queries at head * D.
  k.attention(q - head * group * D, 0, context - 1, 1, head, c.batch.page_table + sequence * s.pages_per_sequence,
              c.k_cache, c.v_cache, s, split0, split1, partial, c.out + sequence * s.query_heads * D, 0);
}

void attend_decode(Team& team, const AttentionCall& c) {
  const AttentionShape& s = c.shape;
  const Int S = c.batch.sequences, heads = S * s.kv_heads;
  if (c.splits == 1) {
    team.deal(heads, [&](Int t) {
      const Int i = t / s.kv_heads;
      decode_head(c, i, t % s.kv_heads, 0, splits_of(s, c.batch.context_len[i]), nullptr);
    });
    return;
  }
  const Int stride = s.query_heads / s.kv_heads * state_floats(s.head_dim);
  team.deal(heads * c.splits, [&](Int t) {
    const Int i = t / c.splits / s.kv_heads, split = t % c.splits;
    if (split < splits_of(s, c.batch.context_len[i]))
      decode_head(c, i, t / c.splits % s.kv_heads, split, split + 1, c.partial + t * stride);
  });
  team.sync();
  team.deal(heads, [&](Int t) {
    const Int i = t / s.kv_heads;
    kernels().combine(c.partial + t * c.splits * stride, splits_of(s, c.batch.context_len[i]), stride, t % s.kv_heads, s,
                      c.out + i * s.query_heads * s.head_dim);
  });
}

void attend_rows(Team& team, const AttentionCall& c) {
  const AttentionShape& s = c.shape;
  const KernelTable& k = kernels();
  const Batch& b = c.batch;
  const Int D = s.head_dim, width = qkv_width(s), rotated = s.query_heads + s.kv_heads;
  const Int piece = std::max<Int>(1, c.M / (team.threads() * 4));
  team.deal((c.M + piece - 1) / piece, [&](Int p) {
    for (Int i = p * piece; i < std::min(c.M, (p + 1) * piece); ++i) {
      float* row = c.qkv + i * width;
      k.rotate(row, rotated, D, c.cos_sin + b.positions[i] * c.rotary_dim, c.rotary_dim, row);
      for (Int h = 0; h < s.kv_heads; ++h)
        k.write_kv(row + (s.query_heads + h) * D, row + (rotated + h) * D, b.slots[i], h, s, c.k_cache, c.v_cache);
    }
  });
  team.sync();
  Int tasks = 0;
  for (Int i = 0; i < b.sequences; ++i)
    tasks += (b.query_start[i + 1] - b.query_start[i] + kRowsPerTask - 1) / kRowsPerTask * s.kv_heads;
  // Sequences lie one after the other: a task's is found by walking on from the last one's.
  Int sequence = 0, first = 0, count = 0;
  auto find = [&](Int t) {
    if (t < first) sequence = first = count = 0;
    for (;; ++sequence) {
      const Int rows = b.query_start[sequence + 1] - b.query_start[sequence];
      count = (rows + kRowsPerTask - 1) / kRowsPerTask * s.kv_heads;
      if (t < first + count) return;
      first += count;
    }
  };
  team.deal(tasks, [&](Int t) {
    find(t);
    // The last rows of a prompt see the most keys: begin with them.
    const Int local = count - 1 - (t - first), head = local % s.kv_heads, row = local / s.kv_heads * kRowsPerTask;
    const Int rows = b.query_start[sequence + 1] - b.query_start[sequence], token = b.query_start[sequence] + row;
    const Int context = b.context_len[sequence];
    k.attention(c.qkv + token * width, width, context - rows + row, std::min(kRowsPerTask, rows - row), head,
                b.page_table + sequence * s.pages_per_sequence, c.k_cache, c.v_cache, s, 0, splits_of(s, context), nullptr,
                c.out + token * s.query_heads * D, s.query_heads * D);
  });
}

}  // namespace

void plan_attention(AttentionCall& c, const Int* d, double scale, Int pages_per_sequence, int threads) {
  AttentionShape& s = c.shape;
  s = {d[0], d[1], d[2], d[3], pages_per_sequence, d[5], pointer<const float>(d[6]), static_cast<float>(scale),
       static_cast<Store>(d[4])};
  check_shape(s, d);
  check_batch(c, d[7], d[8]);
  const Batch& b = c.batch;
  c.decode = c.M == b.sequences;
  Int longest = 1;
  for (Int i = 0; i < b.sequences; ++i) {
    c.decode &= b.query_start[i + 1] - b.query_start[i] == 1;
    longest = std::max<Int>(longest, b.context_len[i]);
  }
  const bool few = b.sequences * s.kv_heads < 4 * threads;
  c.splits = c.decode && few && threads > 1 ? splits_of(s, longest) : 1;
  if (c.splits > 1)
    c.partial = static_cast<float*>(private_memory(
        Private::kPartial, b.sequences * c.splits * s.query_heads * state_floats(s.head_dim) * Int(sizeof(float))));
}

void attention(Team& team, const AttentionCall& c) {
  if (c.decode) {
    attend_decode(team, c);
  } else {
    attend_rows(team, c);
  }
}

}  // namespace cai
