// The kernels for avx512; compiled with that instruction set's flags (see setup.py), reached only where cpuid shows it.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_generic.h"
#include "simd_avx512.h"

namespace cai {
namespace avx512 {
namespace {
#include "kernels.inl"
}  // namespace
}  // namespace avx512

const KernelTable* kernels_avx512() { return &avx512::kTable; }

}  // namespace cai
