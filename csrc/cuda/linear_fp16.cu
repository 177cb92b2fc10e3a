#include "launch_instances.cuh"

namespace cai {
CAI_LINEAR(__half)
}  // namespace cai
