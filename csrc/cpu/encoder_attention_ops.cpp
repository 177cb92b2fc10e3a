// Full attention over the windows of an encoder: one phase, whose pieces are some query rows of one head of one window.
//
// A thread packs the keys and values of a KV head when it comes to its first piece of it. A thread's pieces are next to each
// other, so that hardly any head is packed twice.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>

#include "program.h"

namespace cai {
namespace {

struct EncoderAttentionCall {
  Int query_heads, kv_heads, head_dim, rows;  // rows: of a window
  float scale;
  const float* qkv;  // [windows * rows, (query_heads + 2 kv_heads) head_dim]
  Int windows;
  float* out;  // [windows * rows, query_heads * head_dim]

  Int width() const { return (query_heads + 2 * kv_heads) * head_dim; }
  Int out_width() const { return query_heads * head_dim; }
};
constexpr Int kPhases = 1;

void check(const EncoderAttentionCall& c) {
  if (c.query_heads < 1 || c.kv_heads < 1 || c.query_heads % c.kv_heads || c.head_dim < 1 || c.rows < 1)
    TVM_FFI_THROW(ValueError) << "encoder attention takes whole groups of query heads and windows of 1 position or more, "
                              << "not " << c.query_heads << " query heads of " << c.head_dim << ", " << c.kv_heads
                              << " KV heads, and windows of " << c.rows;
}

// Raises ValueError for rows that are no whole windows.
Int windows_of(Int all_rows, Int rows) {
  if (all_rows % rows)
    TVM_FFI_THROW(ValueError) << "encoder attention takes windows of " << rows << " rows, and " << all_rows
                              << " rows are no multiple of that";
  return all_rows / rows;
}

void encoder_attention(Team& team, const EncoderAttentionCall& c) {
  const KernelTable& k = kernels();
  const Int D = c.head_dim, group = c.query_heads / c.kv_heads, heads = c.windows * c.query_heads;
  // Rows of one piece: whole passes over the keys, and pieces enough that no thread waits long for the last one.
  const Int parts_wanted = std::max<Int>(1, (8 * team.threads() + heads - 1) / std::max<Int>(1, heads));
  const Int part = ((c.rows + parts_wanted - 1) / parts_wanted + kEncoderRows - 1) / kEncoderRows * kEncoderRows;
  const Int parts = (c.rows + part - 1) / part;
  const Int packed_floats = window_floats(c.rows, D);
  float* packed = nullptr;
  Int packed_head = -1;  // window * kv_heads + KV head
  team.deal(heads * parts, [&](Int piece) {
    const Int row = piece % parts * part, head = piece / parts % c.query_heads, window = piece / parts / c.query_heads;
    const float* rows = c.qkv + window * c.rows * c.width();
    const Int kv_head = head / group;
    if (packed == nullptr)
      packed = static_cast<float*>(private_memory(
          Private::kWindow, (packed_floats + encoder_work_floats(D)) * Int(sizeof(float))));
    if (packed_head != window * c.kv_heads + kv_head) {
      packed_head = window * c.kv_heads + kv_head;
      const float* key = rows + (c.query_heads + kv_head) * D;
      k.pack_window(key, key + c.kv_heads * D, c.width(), c.rows, D, packed);
    }
    k.encoder_attention(rows + row * c.width() + head * D, c.width(), std::min(part, c.rows - row), packed, c.rows, D,
                        c.scale, packed + packed_floats, c.out + (window * c.rows + row) * c.out_width() + head * D,
                        c.out_width());
  });
}

void encoder_attention_alone(Tensor qkv, Int query_heads, Int kv_heads, Int head_dim, Int rows, double scale, Tensor out) {
  EncoderAttentionCall c{query_heads, kv_heads, head_dim, rows, static_cast<float>(scale), nullptr, 0, nullptr};
  check(c);
  const Int all_rows = rows_of(qkv, "qkv");
  c.windows = windows_of(all_rows, rows);
  c.qkv = checked_matrix<float>(qkv, "qkv", kFloat, all_rows, c.width());
  c.out = checked_matrix<float>(out, "out", kFloat, all_rows, c.out_width());
  parallel(threads_for(all_rows * rows * c.out_width()), kPhases, [&](Team& team) { encoder_attention(team, c); });
}

// input: qkv. attributes: query_heads, kv_heads, head_dim, rows, scale.
class RecordedEncoderAttention : public OperationOf<EncoderAttentionCall, kPhases> {
 public:
  explicit RecordedEncoderAttention(const Noted& n)
      : shape_{n.integer("query_heads"), n.integer("kv_heads"), n.integer("head_dim"), n.integer("rows"),
               static_cast<float>(n.number("scale")), nullptr, 0, nullptr} {
    check(shape_);
    qkv_ = n.input(0, shape_.width());
    out_ = n.checked_output(shape_.out_width());
  }
  Int prepare(const Step& step, EncoderAttentionCall& c) const override {
    c = shape_;
    c.windows = windows_of(step.rows(qkv_), c.rows);
    c.qkv = step.at<const float>(qkv_);
    c.out = step.at<float>(out_);
    return 0;
  }
  void run(Team& team, const EncoderAttentionCall& c, const char*) const override { encoder_attention(team, c); }

 private:
  const EncoderAttentionCall shape_;
  Int qkv_, out_;
};
CAI_OPERATION("encoder_attention", RecordedEncoderAttention);

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(encoder_attention, cai::encoder_attention_alone);
