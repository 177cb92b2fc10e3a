// The kernels for generic; compiled with that instruction set's flags (see setup.py), reached only where cpuid shows it.
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_generic.h"

namespace cai {
namespace generic {
namespace {
#include "kernels.inl"
}  // namespace
}  // namespace generic

const KernelTable* kernels_generic() { return &generic::kTable; }

}  // namespace cai
