// Checks every kernel of every table linked in against float64, and that a row's bits don't depend on the rows it came with.
// Usage: harness [--guard] [TABLE...]: the tables named, or all that this processor runs; --guard: with guard pages, see
// checks.h. harness --list: print the tables. harness --overread TABLE: let a kernel read past its input, with guard pages,
// which must end the program. Exits 1 on a failure.
#include <algorithm>
#include <cstdio>

#include "checks.h"

namespace {

using namespace cai;

struct Tested {
  const KernelTable* table;
  void (*simd)(check::Report&);
};

std::vector<Tested> tables() {
  std::vector<Tested> found = {{kernels_generic(), check::check_simd_generic}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back({kernels_avx2(), check::check_simd_avx2});
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back({kernels_avx512(), check::check_simd_avx512});
#elif defined(__aarch64__)
  found.push_back({kernels_neon(), check::check_simd_neon});
#endif
  return found;
}

int check_all(const Tested& tested) {
  check::Report lanes(std::string(tested.table->name) + " lanes"), kernels(tested.table->name);
  tested.simd(lanes);
  check::check_linear(*tested.table, kernels);
  check::check_linear_int8(*tested.table, kernels);
  check::check_quantize_rows(*tested.table, kernels);
  check::check_gather(*tested.table, kernels);
  check::check_rms_norm(*tested.table, kernels);
  check::check_layer_norm(*tested.table, kernels);
  check::check_gelu(*tested.table, kernels);
  check::check_swiglu(*tested.table, kernels);
  check::check_rotate(*tested.table, kernels);
  check::check_write_kv(*tested.table, kernels);
  check::check_attention(*tested.table, kernels);
  check::check_full_attention(*tested.table, kernels);
  check::check_sampling(*tested.table, kernels);
  return lanes.print() + kernels.print();
}

int overread(const KernelTable& table) {
  const check::Buffer<float> gate_up(2 * 16 - 1, 1.0f);
  check::Buffer<float> out(16);
  table.swiglu(gate_up.data(), 32, 16, 0, 1, out.data());
  std::printf("%s read a float that is not its own, unnoticed\n", table.name);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Tested> all = tables();
  std::vector<std::string> names(argv + 1, argv + argc);
  const std::string option = names.empty() || names[0].compare(0, 2, "--") != 0 ? "" : names[0];
  if (!option.empty()) names.erase(names.begin());
  check::guard_pages = option == "--guard" || option == "--overread";
  int failures = 0;
  size_t known = 0;
  for (const Tested& t : all) {
    const bool named = std::find(names.begin(), names.end(), t.table->name) != names.end();
    known += named;
    if (option == "--list") {
      std::printf("%s\n", t.table->name);
    } else if (option == "--overread") {
      if (named) return overread(*t.table);
    } else if (named || names.empty()) {
      failures += check_all(t);
    }
  }
  if (known < names.size()) {
    std::fprintf(stderr, "harness: a table named is not linked in, or this processor does not run it; see --list\n");
    return 2;
  }
  return failures ? 1 : 0;
}
