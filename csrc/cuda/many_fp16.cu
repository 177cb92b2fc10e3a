#include "launch_instances.cuh"

namespace cai {
CAI_MANY(__half)
}  // namespace cai
