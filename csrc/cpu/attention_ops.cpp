// Norms of heads, rotary embedding, the write to the KV cache and attention, as one operation.
//
// A decode step takes one phase. The thread that attends a sequence's KV head also turns its query heads and its new key
// (norm and rotation), and writes that key and value. With fewer (sequence, KV head) pairs than the threads need, the
// splits of their keys are separate pieces, and a second phase merges them. Prompts take two phases, since a row may see
// keys of rows that another thread writes.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <vector>

#include "program.h"

namespace cai {
namespace {

// Query rows of a prompt, of one KV head, in one piece of work.
constexpr Int kRowsPerTask = 16;

Int qkv_width(const AttentionShape& s) { return (s.query_heads + 2 * s.kv_heads) * s.head_dim; }

// The kernels do not check slots and pages: one outside the cache would corrupt memory.
void check_batch(const AttentionCall& c) {
  const Batch& b = c.batch;
  const Int size = c.layer.shape.page_size, pages = c.layer.pages, positions = c.layer.positions;
  if (b.slots == nullptr && c.M > 0)
    TVM_FFI_THROW(ValueError) << "slots must be int32 of " << c.M << " elements where keys and values are written, not empty";
  for (Int i = 0; i < c.M; ++i) {
    if (b.slots[i] < 0 || b.slots[i] >= pages * size)
      TVM_FFI_THROW(IndexError) << "slot " << b.slots[i] << " is outside the cache's " << pages << " pages of " << size;
    if (b.positions[i] < 0 || b.positions[i] >= positions)
      TVM_FFI_THROW(IndexError) << "position " << b.positions[i] << " is outside the rotary table's " << positions;
  }
  if (b.query_start[0] < 0) TVM_FFI_THROW(IndexError) << "query_start begins at " << b.query_start[0];
  for (Int i = 0; i < b.sequences; ++i) {
    const Int rows = b.query_start[i + 1] - b.query_start[i], used = (b.context_len[i] + size - 1) / size;
    if (rows < 0 || rows > b.context_len[i] || b.query_start[i + 1] > c.M || used > b.pages_per_sequence)
      TVM_FFI_THROW(IndexError) << "sequence " << i << " has " << rows << " rows and a context of " << b.context_len[i]
                                << " in " << b.pages_per_sequence << " pages";
    const int32_t* table = b.page_table + i * b.pages_per_sequence;
    // Pages wholly before the window of the first row are never read: their entries may be anything.
    const Int unseen = c.layer.shape.window ? b.context_len[i] - rows + 1 - c.layer.shape.window : 0;
    for (Int p = std::max<Int>(0, unseen) / size; p < used; ++p)
      if (table[p] < 0 || table[p] >= pages)
        TVM_FFI_THROW(IndexError) << "page " << table[p] << " is outside the cache's " << pages;
  }
}

Int splits_of(const AttentionShape& s, Int context) {
  const Int keys = split_pages(s.page_size) * s.page_size;
  return (context + keys - 1) / keys;
}

enum class Part { kQuery = 0, kKey = 1 };

// `heads` heads of one row, next to each other, from x to out (which may be x): normalized where the model does so, and
// rotated for their position.
void turn(const AttentionLayer& layer, Part part, const float* x, Int heads, Int position, float* out) {
  const KernelTable& k = kernels();
  const Int D = layer.shape.head_dim;
  if (layer.head_norms) {
    const float* weight = layer.head_norms + static_cast<Int>(part) * D;
    k.rms_norm(x, nullptr, weight, layer.norm_eps, D, 0, heads, nullptr, out);
    x = out;
  }
  k.rotate(x, heads, D, layer.cos_sin + position * layer.rotary_dim, layer.rotary_dim, out);
}

// One sequence's new token, for one KV head and the splits [split0, split1).
void decode_head(const AttentionCall& c, Int sequence, Int head, Int split0, Int split1, float* partial) {
  const AttentionShape& s = c.layer.shape;
  const KernelTable& k = kernels();
  const Int D = s.head_dim, group = s.query_heads / s.kv_heads, context = c.batch.context_len[sequence];
  const float* row = c.qkv + sequence * qkv_width(s);
  const Int position = c.batch.positions[sequence];
  float* q = static_cast<float*>(private_memory(Private::kQuery, (group + 1) * D * Int(sizeof(float))));
  turn(c.layer, Part::kQuery, row + head * group * D, group, position, q);
  if (split1 == splits_of(s, context)) {  // the split that holds the new key; no other split reads it
    float* key = q + group * D;
    turn(c.layer, Part::kKey, row + (s.query_heads + head) * D, 1, position, key);
    k.write_kv(key, row + (s.query_heads + s.kv_heads + head) * D, c.batch.slots[sequence], head, s, c.layer.k_cache, c.layer.v_cache);
  }
  // The kernel finds a head's queries at head * D.
  k.attention(q - head * group * D, 0, context - 1, 1, head, c.batch.page_table + sequence * s.pages_per_sequence,
              c.layer.k_cache, c.layer.v_cache, s, split0, split1, partial, c.out + sequence * s.query_heads * D, 0);
}

void attend_decode(Team& team, const AttentionCall& c) {
  const AttentionShape& s = c.layer.shape;
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
  const AttentionShape& s = c.layer.shape;
  const KernelTable& k = kernels();
  const Batch& b = c.batch;
  const Int D = s.head_dim, width = qkv_width(s), turned = s.query_heads + s.kv_heads;
  const Int piece = std::max<Int>(1, c.M / (team.threads() * 4));
  team.deal((c.M + piece - 1) / piece, [&](Int p) {
    for (Int i = p * piece; i < std::min(c.M, (p + 1) * piece); ++i) {
      float* row = c.qkv + i * width;
      float* keys = row + s.query_heads * D;
      turn(c.layer, Part::kQuery, row, s.query_heads, b.positions[i], row);
      turn(c.layer, Part::kKey, keys, s.kv_heads, b.positions[i], keys);
      for (Int h = 0; h < s.kv_heads; ++h)
        k.write_kv(keys + h * D, row + (turned + h) * D, b.slots[i], h, s, c.layer.k_cache, c.layer.v_cache);
    }
  });
  team.sync();
  Int tasks = 0;
  for (Int i = 0; i < b.sequences; ++i)
    tasks += (b.query_start[i + 1] - b.query_start[i] + kRowsPerTask - 1) / kRowsPerTask * s.kv_heads;
  // Tasks are in the order of the sequences: search from the last task's sequence on.
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
                b.page_table + sequence * s.pages_per_sequence, c.layer.k_cache, c.layer.v_cache, s, 0, splits_of(s, context), nullptr,
                c.out + token * s.query_heads * D, s.query_heads * D);
  });
}

}  // namespace

Int plan_attention(AttentionCall& c, const AttentionLayer& layer, int threads) {
  const Batch& b = c.batch;
  c.layer = layer;
  AttentionShape& s = c.layer.shape;
  s.pages_per_sequence = b.pages_per_sequence;
  check_batch(c);
  c.decode = c.M == b.sequences;
  Int longest = 1;
  for (Int i = 0; i < b.sequences; ++i) {
    c.decode &= b.query_start[i + 1] - b.query_start[i] == 1;
    longest = std::max<Int>(longest, b.context_len[i]);
  }
  const bool few = b.sequences * s.kv_heads < 4 * threads;
  c.splits = c.decode && few && threads > 1 ? splits_of(s, longest) : 1;
  return c.splits > 1 ? b.sequences * c.splits * s.query_heads * state_floats(s.head_dim) : 0;
}

void attention(Team& team, const AttentionCall& c) {
  if (c.decode) {
    attend_decode(team, c);
  } else {
    attend_rows(team, c);
  }
}

namespace {

MaybeTensor maybe(const Noted& n, const char* name) {
  return n.has_binding(name) ? MaybeTensor(n.tensor(name)) : MaybeTensor();
}

// input: qkv, which may be overwritten. attributes: scale, pages, group, norm_eps. bindings: heads, k_cache, v_cache, cos_sin,
// sinks and head_norms (if any); see checked_layer.
class RecordedAttention : public OperationOf<AttentionCall, kAttentionPhases> {
 public:
  explicit RecordedAttention(const Noted& n)
      : layer_(checked_layer(n.tensor("heads"), n.number("scale"), n.tensor("cos_sin"), n.tensor("k_cache"),
                             n.tensor("v_cache"), n.integer("pages"), maybe(n, "sinks"), maybe(n, "head_norms"),
                             n.number("norm_eps"))),
        group_(n.group()),
        qkv_(n.input(0, qkv_width(layer_.shape))),
        out_(n.checked_output(layer_.shape.query_heads * layer_.shape.head_dim)) {
    if (n.value(out_).axis != Axis::kTokens) n.fail("attends rows of tokens");
  }
  Int prepare(const Step& step, AttentionCall& c) const override {
    c.batch = step.batch(group_);
    c.qkv = step.at<float>(qkv_);
    c.M = step.rows(qkv_);
    c.out = step.at<float>(out_);
    return plan_attention(c, layer_, step.threads);
  }
  void give(AttentionCall& c, float* memory) const override { c.partial = memory; }
  void run(Team& team, const AttentionCall& c, const char*) const override { attention(team, c); }

 private:
  const AttentionLayer layer_;
  const Int group_, qkv_, out_;
};
CAI_OPERATION("attention", RecordedAttention);

}  // namespace
}  // namespace cai
