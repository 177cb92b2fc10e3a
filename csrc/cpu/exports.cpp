// What Python sees: the choice of an instruction set, and the exports through apache-tvm-ffi.
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <string>
#include <vector>

#include "ops.h"
#include "program.h"
#include "sampling.h"

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
  tables.push_back(kernels_neon());  // part of the architecture: nothing to ask for
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

// Threads for `work` multiply-adds or so: waking them costs microseconds.
int threads_for(Int work) { return work < (Int(1) << 16) ? 1 : num_threads(); }

void linear_group_alone(Int group, Int x, Int M, Int ldx, Int prologue, Int norm_weight, double eps, Int out, Int ldo,
                        Int residual, Int ldr, Int scratch) {
  const LinearCall c{pointer<const LinearGroup>(group), pointer<const float>(x), ldx, M, static_cast<Prologue>(prologue),
                     pointer<const float>(norm_weight), static_cast<float>(eps), pointer<const float>(residual), ldr,
                     pointer<float>(out), ldo, pointer<float>(scratch)};
  if (c.group->members < 1 || c.group->members > kMaxMembers)
    TVM_FFI_THROW(ValueError) << "a group has 1 to " << kMaxMembers << " members";
  if (M == 0) return;
  parallel(threads_for(linear_work(*c.group) * M), kLinearPhases, [&](Team& team) { linear_group(team, c, nullptr); });
}

// residual and residual_out are both 0 or both given.
void rms_norm_alone(Int x, Int residual, Int weight, double eps, Int width, Int M, Int residual_out, Int out) {
  const NormCall c{pointer<const float>(x), pointer<const float>(residual), pointer<const float>(weight),
                   static_cast<float>(eps), width, M, pointer<float>(residual_out), pointer<float>(out)};
  parallel(threads_for(M * width), 1, [&](Team& team) { rms_norm(team, c); });
}

void swiglu_alone(Int gate_up, Int width, Int M, Int out) {
  const SwigluCall c{pointer<const float>(gate_up), width, M, pointer<float>(out)};
  parallel(threads_for(4 * M * width), 1, [&](Team& team) { swiglu(team, c); });
}

// matrix: the eight integers of a PackedMatrix.
void gather_alone(Int matrix, Int ids, Int count, Int out) {
  const GatherCall c{pointer<const PackedMatrix>(matrix), pointer<const int32_t>(ids), count, pointer<float>(out)};
  check_gather(c);
  parallel(threads_for(count * c.matrix->cols), 1, [&](Team& team) { gather(team, c); });
}

// batch: [positions, slots, query_start, context_len, page_table, sequences, pages_per_sequence]
void attention_alone(Int qkv, Int M, Int batch, Int cos_sin, Int rotary_dim, Int shape, double scale, Int k_cache,
                     Int v_cache, Int out) {
  const Int* b = pointer<const Int>(batch);
  if (M == 0) return;
  AttentionCall c{};
  c.batch = {pointer<const int32_t>(b[0]), pointer<const int32_t>(b[1]), pointer<const int32_t>(b[2]),
             pointer<const int32_t>(b[3]), pointer<const int32_t>(b[4]), b[5]};
  c.qkv = pointer<float>(qkv);
  c.M = M;
  c.cos_sin = pointer<const float>(cos_sin);
  c.rotary_dim = rotary_dim;
  c.k_cache = pointer<void>(k_cache);
  c.v_cache = pointer<void>(v_cache);
  c.out = pointer<float>(out);
  Int work = 0;
  for (Int i = 0; i < b[5]; ++i) work += Int(c.batch.query_start[i + 1] - c.batch.query_start[i]) * c.batch.context_len[i];
  const Int* d = pointer<const Int>(shape);
  const int threads = threads_for(work * d[0] * d[2]);
  plan_attention(c, d, scale, b[6], threads);
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, cai::swiglu_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, cai::gather_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention, cai::attention_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_rows, cai::sample_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sampling_uniforms, cai::uniforms);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(top_logits, cai::top_logits_alone);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, cai::pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_int4, cai::pack_int4);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_program, cai::run_program);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, cai::instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, cai::instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, cai::use_instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_threads, cai::set_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(threads, cai::threads);
