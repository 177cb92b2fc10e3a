#include "launch.cuh"

namespace cai {
CAI_LINEAR(, float)
}  // namespace cai
