#include "launch_instances.cuh"

namespace cai {
CAI_LINEAR(float)
}  // namespace cai
