// Attention of a decoder to an encoder's output in pages: the write of the output's keys and values, the attention, and the
// weights of single heads for alignment.
//
// Consecutive sequences with the same pages, the beams of one window, are attended together, so that keys and values are
// read once for all of them. With fewer pieces than the threads need, splits of the positions are separate pieces, and a
// second phase merges them.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstring>

#include "program.h"

namespace cai {
namespace {

constexpr Int kRowsPerTask = 16;  // query rows of a piece
constexpr Int kPhases = 2;

// One layer's heads, cache, and positions of an encoder's output.
struct CrossLayer {
  CacheLayer cache;
  Int pages, rows;  // pages: of the cache

  const AttentionShape& shape() const { return cache.shape; }
  Int pages_of_output() const { return (rows + shape().page_size - 1) / shape().page_size; }
  Int width() const { return shape().query_heads * shape().head_dim; }
  Int kv_width() const { return 2 * shape().kv_heads * shape().head_dim; }
  Int splits() const {
    const Int keys = split_pages(shape().page_size) * shape().page_size;
    return (rows + keys - 1) / keys;
  }
  // The kernels do not check pages.
  void check_pages(const int32_t* numbers) const {
    for (Int p = 0; p < pages_of_output(); ++p)
      if (numbers[p] < 0 || numbers[p] >= pages)
        TVM_FFI_THROW(IndexError) << "page " << numbers[p] << " is outside the cache's " << pages;
  }
};

CrossLayer checked_cross(const Tensor& heads, const Tensor& k_cache, const Tensor& v_cache, Int pages, Int rows) {
  const CrossLayer layer{checked_cache(heads, k_cache, v_cache, pages), pages, rows};
  if (rows < 1 || layer.shape().window)
    TVM_FFI_THROW(ValueError) << "cross-attention takes 1 position or more and no window, not " << rows << " positions";
  if (layer.shape().store == Store::kInt8) TVM_FFI_THROW(ValueError) << "cross-attention takes no int8 cache";
  return layer;
}

// ----------------------------------------------------------------------------------------------------------- attention

struct CrossCall {
  CrossLayer layer;
  Batch batch;
  const float* q;  // [M, query_heads * head_dim]
  Int M;
  float* out;
  // Set by plan:
  Int pieces, splits;  // pieces: of a KV head; splits: of the positions, where they are separate pieces; else 1
  // Set by the caller: memory for states [M][kv_heads][splits][group], as many floats as plan returned.
  float* partial;

  Int first_row() const { return batch.query_start[0]; }
  const int32_t* table(Int sequence) const { return batch.page_table + sequence * batch.pages_per_sequence; }
  Int state_stride() const {
    const AttentionShape& s = layer.shape();
    return s.query_heads / s.kv_heads * state_floats(s.head_dim);
  }
};

// The rows of the sequences [first, end), whose pages are the same. Rows of a batch follow one another, so these do.
struct Run {
  Int first, end, row, rows;

  Int pieces() const { return (rows + kRowsPerTask - 1) / kRowsPerTask; }
};

Run run_from(const CrossCall& c, Int first) {
  const Batch& b = c.batch;
  const size_t bytes = static_cast<size_t>(c.layer.pages_of_output()) * sizeof(int32_t);
  Int end = first + 1;
  while (end < b.sequences && std::memcmp(c.table(end), c.table(first), bytes) == 0) ++end;
  return {first, end, b.query_start[first], b.query_start[end] - b.query_start[first]};
}

void check_batch(const CrossCall& c) {
  const Batch& b = c.batch;
  if (b.query_start[0] < 0) TVM_FFI_THROW(IndexError) << "query_start begins at " << b.query_start[0];
  if (b.pages_per_sequence < c.layer.pages_of_output() && b.sequences > 0)
    TVM_FFI_THROW(IndexError) << c.layer.rows << " positions take " << c.layer.pages_of_output()
                              << " pages, and page_table has " << b.pages_per_sequence;
  for (Int i = 0; i < b.sequences; ++i) {
    const Int rows = b.query_start[i + 1] - b.query_start[i];
    if (rows < 0 || b.query_start[i + 1] > c.M)
      TVM_FFI_THROW(IndexError) << "sequence " << i << " has rows " << b.query_start[i] << " to " << b.query_start[i + 1]
                                << " of " << c.M;
    if (rows > 0) c.layer.check_pages(c.table(i));
  }
}

// Checks the batch and decides how to divide the work. Returns the floats of memory that the states need.
Int plan(CrossCall& c, int threads) {
  check_batch(c);
  c.pieces = 0;
  for (Int i = 0; i < c.batch.sequences;) {
    const Run run = run_from(c, i);
    c.pieces += run.pieces();
    i = run.end;
  }
  const AttentionShape& s = c.layer.shape();
  const bool few = c.pieces * s.kv_heads < 4 * threads;
  c.splits = few && threads > 1 ? c.layer.splits() : 1;
  return c.splits > 1 ? c.M * s.kv_heads * c.splits * c.state_stride() : 0;
}

// Rows [row, row + rows) of a run, for one KV head and the splits [split0, split1).
void attend(const CrossCall& c, const Run& run, Int row, Int rows, Int kv_head, Int split0, Int split1) {
  const CrossLayer& layer = c.layer;
  const AttentionShape& s = layer.shape();
  const Int group = s.query_heads / s.kv_heads, D = s.head_dim, total = rows * group;
  CrossQueries tile{};
  for (Int n = 0; n < total; ++n) {
    const Int r = row + n / group, member = n % group, at = r * layer.width() + (kv_head * group + member) * D;
    const Int i = tile.count++;
    tile.q[i] = c.q + at;
    tile.out[i] = c.out + at;
    tile.partial[i] = nullptr;
    if (c.splits > 1)
      tile.partial[i] =
          c.partial + ((r * s.kv_heads + kv_head) * c.splits + split0) * c.state_stride() + member * state_floats(D);
    if (tile.count < kCrossQueries && n + 1 < total) continue;
    kernels().cross_attention(tile, kv_head, c.table(run.first), layer.rows, layer.cache.k_cache,
                              layer.cache.v_cache, s, split0, split1);
    tile.count = 0;
  }
}

void cross_attention(Team& team, const CrossCall& c) {
  const AttentionShape& s = c.layer.shape();
  // Pieces are in the order of the runs: search from the last piece's run on.
  Run run{};
  Int before = 0;  // pieces of the runs before it
  team.deal(c.pieces * s.kv_heads * c.splits, [&](Int t) {
    const Int split = t % c.splits, kv_head = t / c.splits % s.kv_heads, piece = t / c.splits / s.kv_heads;
    if (run.end == 0 || piece < before) {
      run = run_from(c, 0);
      before = 0;
    }
    while (piece >= before + run.pieces()) {
      before += run.pieces();
      run = run_from(c, run.end);
    }
    const Int skipped = (piece - before) * kRowsPerTask;
    attend(c, run, run.row + skipped, std::min(kRowsPerTask, run.rows - skipped), kv_head, c.splits > 1 ? split : 0,
           c.splits > 1 ? split + 1 : c.layer.splits());
  });
  if (c.splits == 1) return;
  team.sync();
  const Int rows = c.batch.query_start[c.batch.sequences] - c.first_row();
  team.deal(rows * s.kv_heads, [&](Int t) {
    const Int row = c.first_row() + t / s.kv_heads, kv_head = t % s.kv_heads;
    kernels().combine(c.partial + (row * s.kv_heads + kv_head) * c.splits * c.state_stride(), c.splits, c.state_stride(),
                      kv_head, s, c.out + row * c.layer.width());
  });
}

// heads, k_cache, v_cache, pages: see checked_cache. The tensors from query_start to page_table are of an AttentionBatch.
void cross_attention_alone(Tensor q, Tensor query_start, Tensor page_table, Tensor heads, double scale, Tensor k_cache,
                           Tensor v_cache, Int pages, Int rows, Tensor out) {
  CrossCall c{};
  c.layer = checked_cross(heads, k_cache, v_cache, pages, rows);
  c.layer.cache.shape.scale = static_cast<float>(scale);
  c.M = rows_of(q, "q");
  c.q = checked_matrix<float>(q, "q", kFloat, c.M, c.layer.width());
  c.out = checked_matrix<float>(out, "out", kFloat, c.M, c.layer.width());
  c.batch.sequences = rows_of(page_table, "page_table");
  c.batch.pages_per_sequence = page_table.size(1);
  c.batch.page_table = checked_matrix<int32_t>(page_table, "page_table", kInt32, c.batch.sequences, page_table.size(1));
  c.batch.query_start = checked_array<int32_t>(query_start, "query_start", kInt32, c.batch.sequences + 1);
  if (c.M == 0) return;
  const int threads = threads_for(c.M * rows * c.layer.width());
  c.partial = static_cast<float*>(private_memory(Private::kPartial, plan(c, threads) * Int(sizeof(float))));
  parallel(threads, kPhases, [&](Team& team) { cross_attention(team, c); });
}

CrossLayer noted_layer(const Noted& n) {
  return checked_cross(n.tensor("heads"), n.tensor("k_cache"), n.tensor("v_cache"), n.integer("pages"), n.integer("rows"));
}

// input: q. attributes: scale, pages, rows, group. bindings: heads, k_cache, v_cache; see checked_cache.
class RecordedCrossAttention : public OperationOf<CrossCall, kPhases> {
 public:
  explicit RecordedCrossAttention(const Noted& n)
      : layer_(noted_layer(n)), group_(n.group()), q_(n.input(0, layer_.width())), out_(n.checked_output(layer_.width())) {
    layer_.cache.shape.scale = static_cast<float>(n.number("scale"));
    if (n.value(out_).axis != Axis::kTokens) n.fail("attends rows of tokens");
  }
  Int prepare(const Step& step, CrossCall& c) const override {
    c.layer = layer_;
    c.batch = step.batch(group_);
    c.q = step.at<const float>(q_);
    c.M = step.rows(q_);
    c.out = step.at<float>(out_);
    return plan(c, step.threads);
  }
  void give(CrossCall& c, float* memory) const override { c.partial = memory; }
  void run(Team& team, const CrossCall& c, const char*) const override { cross_attention(team, c); }

 private:
  CrossLayer layer_;
  const Int group_, q_, out_;
};
CAI_OPERATION("cross_attention", RecordedCrossAttention);

// --------------------------------------------------------------------------------------------------------------- write

struct CrossWriteCall {
  CrossLayer layer;
  const float* kv;       // [outputs * rows, 2 kv_heads head_dim]: keys, then values
  const int32_t* pages;  // [outputs, pages of an output]
  Int outputs;
  float* out;  // [outputs], or null
};

// Raises ValueError for rows that are not those of the outputs, IndexError for a page outside the cache.
void check_write(const CrossWriteCall& c, Int kv_rows) {
  if (kv_rows != c.outputs * c.layer.rows)
    TVM_FFI_THROW(ValueError) << c.outputs << " encoder outputs have " << c.outputs * c.layer.rows
                              << " rows of keys and values, not " << kv_rows;
  for (Int i = 0; i < c.outputs; ++i) c.layer.check_pages(c.pages + i * c.layer.pages_of_output());
}

void cross_write(Team& team, const CrossWriteCall& c) {
  const AttentionShape& s = c.layer.shape();
  const Int each = c.layer.pages_of_output(), width = c.layer.kv_width(), P = s.page_size;
  team.deal(c.outputs * each, [&](Int t) {
    const Int output = t / each, first = t % each * P, count = std::min(P, c.layer.rows - first);
    const float* rows = c.kv + (output * c.layer.rows + first) * width;
    if (c.out && first == 0) c.out[output] = 0.0f;
    for (Int h = 0; h < s.kv_heads; ++h)
      kernels().write_page(rows + h * s.head_dim, rows + (s.kv_heads + h) * s.head_dim, width, count, c.pages[t], h, s,
                           c.layer.cache.k_cache, c.layer.cache.v_cache);
  });
}

// page_numbers: int32 [outputs, pages of an output].
void cross_write_alone(Tensor kv, Tensor page_numbers, Tensor heads, Tensor k_cache, Tensor v_cache, Int pages, Int rows) {
  const Int outputs = rows_of(page_numbers, "pages");
  CrossWriteCall c{checked_cross(heads, k_cache, v_cache, pages, rows), nullptr, nullptr, outputs, nullptr};
  const Int kv_rows = rows_of(kv, "kv");
  c.kv = checked_matrix<float>(kv, "kv", kFloat, kv_rows, c.layer.kv_width());
  c.pages = checked_matrix<int32_t>(page_numbers, "pages", kInt32, c.outputs, c.layer.pages_of_output());
  check_write(c, kv_rows);
  parallel(threads_for(kv_rows * c.layer.kv_width()), 1, [&](Team& team) { cross_write(team, c); });
}

// inputs: kv, and pages, int32 [outputs, pages of an output]. attributes: pages, rows. bindings: heads, k_cache, v_cache.
// Every operation has an output: this one's, [outputs, 1], is zeros.
class RecordedCrossWrite : public OperationOf<CrossWriteCall, 1> {
 public:
  explicit RecordedCrossWrite(const Noted& n)
      : layer_(noted_layer(n)),
        kv_(n.input(0, layer_.kv_width(), ValueType::kFloat32, false)),
        pages_(n.input(1, layer_.pages_of_output(), ValueType::kInt32)),
        out_(n.checked_output(1)) {}
  Int prepare(const Step& step, CrossWriteCall& c) const override {
    c = {layer_, step.at<const float>(kv_), step.at<const int32_t>(pages_), step.rows(pages_), step.at<float>(out_)};
    check_write(c, step.rows(kv_));
    return 0;
  }
  void run(Team& team, const CrossWriteCall& c, const char*) const override { cross_write(team, c); }

 private:
  const CrossLayer layer_;
  const Int kv_, pages_, out_;
};
CAI_OPERATION("cross_write", RecordedCrossWrite);

// ------------------------------------------------------------------------------------------------------------- weights

// which: int32 query heads. page_numbers: int32, those of one output or more. out: [heads * rows of q, rows].
void cross_weights_alone(Tensor q, Tensor page_numbers, Tensor which, Tensor heads, double scale, Tensor k_cache,
                         Tensor v_cache, Int pages, Int rows, Tensor out) {
  CrossLayer layer = checked_cross(heads, k_cache, v_cache, pages, rows);
  AttentionShape& s = layer.cache.shape;
  s.scale = static_cast<float>(scale);
  const Int M = rows_of(q, "q"), D = s.head_dim, count = which.numel();
  const float* queries = checked_matrix<float>(q, "q", kFloat, M, layer.width());
  const int32_t* numbers = checked_array<int32_t>(page_numbers, "pages", kInt32, layer.pages_of_output(), true);
  const int32_t* head = checked_array<int32_t>(which, "the heads", kInt32, count);
  float* to = checked_matrix<float>(out, "out", kFloat, count * M, rows);
  layer.check_pages(numbers);
  for (Int i = 0; i < count; ++i)
    if (head[i] < 0 || head[i] >= s.query_heads)
      TVM_FFI_THROW(IndexError) << "query head " << head[i] << " is none of the layer's " << s.query_heads;
  parallel(threads_for(count * M * rows * D), 1, [&](Team& team) {
    team.deal(count * M, [&](Int t) {
      const Int h = head[t / M];
      kernels().cross_weights(queries + t % M * layer.width() + h * D, h / (s.query_heads / s.kv_heads), numbers, rows,
                              layer.cache.k_cache, s, to + t * rows);
    });
  });
}

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(cross_attention, cai::cross_attention_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cross_write, cai::cross_write_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cross_weights, cai::cross_weights_alone);
