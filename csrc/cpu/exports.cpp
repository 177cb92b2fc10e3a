// What Python sees: the choice of an instruction set, and the exports through apache-tvm-ffi.
#include <tvm/ffi/tvm_ffi.h>

#include <atomic>
#include <string>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "thread_pool.h"

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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_group, cai::linear_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, cai::rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, cai::swiglu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, cai::gather);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_kv_write, cai::rope_kv_write);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, cai::paged_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack, cai::pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run_program, cai::run_program);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, cai::instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, cai::instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, cai::use_instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_threads, cai::set_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(threads, cai::threads);
