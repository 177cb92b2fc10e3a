#include "launch_instances.cuh"

namespace cai {
CAI_LINEAR(__nv_bfloat16)
}  // namespace cai
