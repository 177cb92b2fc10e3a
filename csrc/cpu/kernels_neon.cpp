// The kernels for NEON, which every 64-bit ARM processor has; compiled for those alone (see setup.py).
#include "kernels.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd_generic.h"
#include "simd_neon.h"

namespace cai {
namespace neon {
namespace {
#include "kernels.inl"
}  // namespace
}  // namespace neon

const KernelTable* kernels_neon() { return &neon::kTable; }

}  // namespace cai
