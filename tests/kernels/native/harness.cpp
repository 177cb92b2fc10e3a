// Checks every kernel of every table linked in against float64, and that a row's bits don't depend on the rows it came with.
// Usage: harness [TABLE...]: the tables named, or all that this processor runs. --list: print those. Exits 1 on a failure.
#include <cstdio>
#include <cstring>

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
  check::check_swiglu(*tested.table, kernels);
  check::check_rotate(*tested.table, kernels);
  check::check_write_kv(*tested.table, kernels);
  check::check_attention(*tested.table, kernels);
  return lanes.print() + kernels.print();
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Tested> all = tables();
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const Tested& t : all) std::printf("%s\n", t.table->name);
    return 0;
  }
  int failures = 0, run = 0;
  for (const Tested& t : all) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], t.table->name) == 0;
    if (!wanted) continue;
    failures += check_all(t);
    ++run;
  }
  if (run < (argc == 1 ? 1 : argc - 1)) {
    std::fprintf(stderr, "harness: a table named is not linked in, or this processor does not run it; see --list\n");
    return 2;
  }
  return failures ? 1 : 0;
}
