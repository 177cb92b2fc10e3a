#include "launch_instances.cuh"

namespace cai {
CAI_MANY(__nv_bfloat16)
}  // namespace cai
