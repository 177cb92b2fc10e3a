// What Python sees: the choice of an instruction set, and the exports through apache-tvm-ffi.
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <string>
#include <vector>

#include "program.h"
#include "sampling.h"
#include "tensors.h"

namespace cai {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

std::vector<const KernelTable*> supported() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (has_avx512()) tables.push_back(kernels_avx512());
  if (has_avx2()) tables.push_back(kernels_avx2());
#elif defined(__aarch64__)
  tables.push_back(kernels_neon());  // every processor of this architecture has it
#endif
  tables.push_back(kernels_generic());
  return tables;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = supported().front();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

namespace {

// -------------------------------------------------------------------------------------- one operation, one region

// group: the int64 numbers of a CpuLinear. norm_weight, norm_bias: given where the prologue is a norm that has them.
void linear_group_alone(Tensor group, Tensor x, Int prologue, MaybeTensor norm_weight, MaybeTensor norm_bias, double eps,
                        MaybeTensor residual, Tensor out, Tensor scratch) {
  const Int* numbers = checked_array<const Int>(group, "a linear's group", kInt64, 0, true);
  const LinearGroup& g = checked_group(numbers, group.numel());
  const Prologue before = checked_prologue(prologue, norm_weight.has_value(), norm_bias.has_value());
  const Int width = output_width(g);
  const Rows in = checked_rows(x, "x", -1, g.in_features * (before == Prologue::kSwiglu ? 2 : 1));
  LinearCall c{&g, in.data, in.stride, in.count, before, nullptr, nullptr, static_cast<float>(eps), nullptr, 0,
               checked_matrix<float>(out, "out", kFloat, in.count, width), width,
               checked_array<float>(scratch, "scratch", kFloat, scratch_floats(g, in.count), true)};
  if (norm_weight.has_value())
    c.norm_weight = checked_array<float>(norm_weight.value(), "the norm's weight", kFloat, g.in_features);
  if (norm_bias.has_value())
    c.norm_bias = checked_array<float>(norm_bias.value(), "the norm's bias", kFloat, g.in_features);
  if (norm_weight.has_value() && in.count > 1 && in.stride != g.in_features)
    TVM_FFI_THROW(ValueError) << "x must be contiguous where a norm is applied to it";
  if (residual.has_value()) {
    const Rows r = checked_rows(residual.value(), "the residual", in.count, width);
    c.residual = r.data;
    c.ldr = r.stride;
  }
  if (in.count == 0) return;
  parallel(threads_for(linear_work(g) * in.count), kLinearPhases, [&](Team& team) { linear_group(team, c, nullptr); });
}

// group: the int64 numbers of the CpuLinear of a CpuConvolution. x [n * window, columns].
void convolution_alone(Tensor group, Tensor x, Int prologue, Int window, Int stride, Tensor out, Tensor scratch) {
  const Int* numbers = checked_array<const Int>(group, "a linear's group", kInt64, 0, true);
  const LinearGroup& g = checked_group(numbers, group.numel());
  const Prologue before = checked_convolution(g, prologue, window, stride);
  const Int rows = rows_of(x, "x"), M = rows / stride;
  const float* from = checked_matrix<float>(x, "x", kFloat, rows, g.in_features / kTaps);
  if (rows % window) TVM_FFI_THROW(ValueError) << "a convolution takes windows of " << window << " rows, not " << rows << " rows";
  float* memory =
      checked_array<float>(scratch, "scratch", kFloat, convolution_floats(g, M, window, stride), true);
  const LinearCall c = convolution_call(g, from, rows, before, window, stride,
                                        checked_matrix<float>(out, "out", kFloat, M, output_width(g)), memory);
  if (rows == 0) return;
  parallel(threads_for(linear_work(g) * M), kLinearPhases, [&](Team& team) { linear_group(team, c, nullptr); });
}

// residual and residual_out: both given or neither.
void rms_norm_alone(Tensor x, MaybeTensor residual, Tensor weight, double eps, MaybeTensor residual_out, Tensor out) {
  const Int M = rows_of(x, "x"), width = x.size(1);
  NormCall c{checked_matrix<float>(x, "x", kFloat, M, width), nullptr, checked_array<float>(weight, "weight", kFloat, width),
             static_cast<float>(eps), width, M, nullptr, checked_matrix<float>(out, "out", kFloat, M, width)};
  if (residual.has_value() != residual_out.has_value())
    TVM_FFI_THROW(ValueError) << "rms_norm takes residual and residual_out together";
  if (residual.has_value()) {
    c.residual = checked_matrix<float>(residual.value(), "the residual", kFloat, M, width);
    c.residual_out = checked_matrix<float>(residual_out.value(), "residual_out", kFloat, M, width);
  }
  parallel(threads_for(M * width), 1, [&](Team& team) { rms_norm(team, c); });
}

void layer_norm_alone(Tensor x, Tensor weight, Tensor bias, double eps, Tensor out) {
  const Int M = rows_of(x, "x"), width = x.size(1);
  const LayerNormCall c{checked_matrix<float>(x, "x", kFloat, M, width), checked_array<float>(weight, "weight", kFloat, width),
                        checked_array<float>(bias, "bias", kFloat, width), static_cast<float>(eps), width, M,
                        checked_matrix<float>(out, "out", kFloat, M, width)};
  parallel(threads_for(M * width), 1, [&](Team& team) { layer_norm(team, c); });
}

void gelu_alone(Tensor x, Tensor out) {
  const Int M = rows_of(out, "out"), width = out.size(1);
  const Rows in = checked_rows(x, "x", M, width);
  const GeluCall c{in.data, in.stride, width, M, checked_matrix<float>(out, "out", kFloat, M, width)};
  parallel(threads_for(2 * M * width), 1, [&](Team& team) { gelu(team, c); });
}

// index: none for row m of x and row m modulo its rows of the table.
void add_rows_alone(Tensor x, Tensor table, MaybeTensor index, Tensor out) {
  const Int M = rows_of(x, "x"), width = x.size(1), rows = rows_of(table, "the table");
  AddRowsCall c{checked_matrix<float>(x, "x", kFloat, M, width), checked_matrix<float>(table, "the table", kFloat, rows, width),
                nullptr, rows, width, M, checked_matrix<float>(out, "out", kFloat, M, width)};
  if (index.has_value()) c.index = checked_array<int32_t>(index.value(), "the numbers of rows", kInt32, M);
  check_add_rows(c);
  parallel(threads_for(M * width), 1, [&](Team& team) { add_rows(team, c); });
}

void swiglu_alone(Tensor gate_up, Tensor out) {
  const Int M = rows_of(out, "out"), width = out.size(1);
  const SwigluCall c{checked_matrix<float>(gate_up, "gate_up", kFloat, M, 2 * width), width, M,
                     checked_matrix<float>(out, "out", kFloat, M, width)};
  parallel(threads_for(4 * M * width), 1, [&](Team& team) { swiglu(team, c); });
}

// matrix: the seven integers of a PackedMatrix.
void gather_alone(Tensor matrix, Tensor ids, Tensor out) {
  const auto* packed = reinterpret_cast<const PackedMatrix*>(checked_array<const Int>(matrix, "the matrix", kInt64, 7));
  const Int count = rows_of(out, "out");
  const GatherCall c{packed, checked_array<int32_t>(ids, "ids", kInt32, count), count,
                     checked_matrix<float>(out, "out", kFloat, count, packed->cols)};
  check_gather(c);
  parallel(threads_for(count * c.matrix->cols), 1, [&](Team& team) { gather(team, c); });
}

// heads, pages: see checked_layer. The tensors from positions to page_table are of an AttentionBatch.
void attention_alone(Tensor qkv, Tensor positions, Tensor slots, Tensor query_start, Tensor context_len, Tensor page_table,
                     Tensor cos_sin, Tensor heads, double scale, Tensor k_cache, Tensor v_cache, Int pages,
                     MaybeTensor sinks, MaybeTensor head_norms, double norm_eps, Tensor out) {
  const AttentionLayer layer = checked_layer(heads, scale, cos_sin, k_cache, v_cache, pages, sinks, head_norms, norm_eps);
  const AttentionShape& s = layer.shape;
  AttentionCall c{};
  c.M = rows_of(qkv, "qkv");
  c.batch = checked_batch(positions, slots, query_start, context_len, page_table, c.M);
  c.qkv = checked_matrix<float>(qkv, "qkv", kFloat, c.M, (s.query_heads + 2 * s.kv_heads) * s.head_dim);
  c.out = checked_matrix<float>(out, "out", kFloat, c.M, s.query_heads * s.head_dim);
  if (c.M == 0) return;
  Int work = 0;
  for (Int i = 0; i < c.batch.sequences; ++i)
    work += Int(c.batch.query_start[i + 1] - c.batch.query_start[i]) * c.batch.context_len[i];
  const int threads = threads_for(work * s.query_heads * s.head_dim);
  const Int floats = plan_attention(c, layer, threads);
  c.partial = static_cast<float*>(private_memory(Private::kPartial, floats * Int(sizeof(float))));
  parallel(threads, kAttentionPhases, [&](Team& team) { attention(team, c); });
}

// call: [rows, count, logits, vocabulary, mask, mask_words, ids, status, saved_begin], see SampleCall.
void sample_rows(Int call) {
  const Int* c = pointer<const Int>(call);
  sample_tokens({pointer<const SampleRow>(c[0]), c[1], c[3], pointer<float>(c[2]), pointer<const uint32_t>(c[4]), c[5],
                 pointer<int32_t>(c[6]), pointer<uint8_t>(c[7]), pointer<Int>(c[8]), nullptr, nullptr});
}

void uniforms(Int rows, Int count) { sampling_uniforms(pointer<SampleRow>(rows), count); }

void top_logits_alone(Int logits, Int which, Int count, Int vocabulary, Int k, Int greatest, Int total, Int ids) {
  const TopLogitsCall c{pointer<const float>(logits), pointer<const int32_t>(which), count, vocabulary, k,
                        pointer<float>(greatest),     pointer<int64_t>(total),       pointer<int32_t>(ids)};
  parallel(threads_for(4 * count * vocabulary), 1, [&](Team& team) { top_logits(team, c); });
}

// source: rows of any one-, two- or four-byte elements. target: bytes, as many as the padded blocks take.
void pack_alone(Tensor source, Tensor target) {
  const Int rows = rows_of(source, "the matrix"), cols = source.size(1), size = source.dtype().bits / 8;
  if (source.device().device_type != kDLCPU || !source.IsContiguous() || (size != 1 && size != 2 && size != 4))
    TVM_FFI_THROW(ValueError) << "a matrix to pack is contiguous on the CPU, of 8, 16 or 32 bits, not " << described(source);
  const Int blocks = (rows + kBlockRows - 1) / kBlockRows, chunks = (cols + kBlockCols - 1) / kBlockCols;
  const Int bytes = blocks * kBlockRows * chunks * kBlockCols * size;
  pack(source.data_ptr(), rows, cols, size, checked_array<void>(target, "the packed matrix", kByte, bytes, true));
}

// source: uint8 [rows, ceil(cols / 2)].
void pack_int4_alone(Tensor source, Int cols, Tensor target) {
  const Int rows = rows_of(source, "the matrix");
  const Int blocks = (rows + kLaneRows - 1) / kLaneRows, padded = (cols + kInt4Cols - 1) / kInt4Cols * kInt4Cols;
  const uint8_t* from = checked_matrix<uint8_t>(source, "the matrix", kByte, rows, (cols + 1) / 2);
  void* to = checked_array<void>(target, "the packed matrix", kByte, blocks * kLaneRows * padded / 2, true);
  pack_int4(from, rows, cols, static_cast<uint32_t*>(to));
}

void pack_quads_alone(Tensor source, Tensor target) {
  const Int rows = rows_of(source, "the matrix"), cols = source.size(1);
  const auto* from = checked_matrix<int8_t>(source, "the matrix", kInt8, rows, cols);
  const Int blocks = (rows + kLaneRows - 1) / kLaneRows, padded = (cols + kBlockCols - 1) / kBlockCols * kBlockCols;
  pack_quads(from, rows, cols, checked_array<uint8_t>(target, "the packed matrix", kByte, blocks * kLaneRows * padded, true));
}

tvm::ffi::String instruction_set() { return kernels().name; }

tvm::ffi::String instruction_sets() {
  std::string names;
  for (const KernelTable* t : supported()) names += (names.empty() ? "" : ",") + std::string(t->name);
  return names;
}

void use_instruction_set(tvm::ffi::String name) {
  for (const KernelTable* t : supported()) {
    if (name == t->name) {
      chosen.store(t, std::memory_order_release);
      return;
    }
  }
  TVM_FFI_THROW(ValueError) << "instruction set " << name << " is not one of " << instruction_sets();
}

void set_threads(Int n) { set_num_threads(static_cast<int>(n)); }
Int threads() { return num_threads(); }

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_group, cai::linear_group_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, cai::rms_norm_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(convolution, cai::convolution_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_norm, cai::layer_norm_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gelu, cai::gelu_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rows, cai::add_rows_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, cai::swiglu_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, cai::gather_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, cai::attention_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_rows, cai::sample_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sampling_uniforms, cai::uniforms);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(top_logits, cai::top_logits_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, cai::pack_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_int4, cai::pack_int4_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_quads, cai::pack_quads_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_program, cai::make_program);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, cai::instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, cai::instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, cai::use_instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_threads, cai::set_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(threads, cai::threads);
