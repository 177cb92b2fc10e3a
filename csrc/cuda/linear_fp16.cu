#include "launch.cuh"

namespace cai {
CAI_LINEAR(, __half)
}  // namespace cai
