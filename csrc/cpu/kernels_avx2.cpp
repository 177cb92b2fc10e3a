// The kernels for avx2; compiled with that instruction set's flags (see setup.py), reached only where cpuid shows it.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_generic.h"
#include "simd_avx2.h"

namespace cai {
namespace avx2 {
namespace {
#include "kernels.inl"
}  // namespace
}  // namespace avx2

const KernelTable* kernels_avx2() { return &avx2::kTable; }

}  // namespace cai
