// The library of csrc/cuda with the emulated device in place of a GPU: the same ops.cu, tensors in the CPU's memory, its
// launches as launch_instances.cuh chooses them, run by the emulator.
#include "device.h"
// The device comes first: it redefines what the kernels are written in.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "many_launches.h"

namespace cai {

constexpr int kAtOnce = 3;  // clusters of the emulated device

template <typename T>
struct EmulatedLaunch {
  template <typename W, int kHalves>
  cudaError_t run(const Rows<T>& rows, const Group& group, Cut cut) const {
    choose_blocks(cut, kAtOnce);
    emulator::launch(cut.blocks, kThreads, [&] { decode_products_kernel<T, W, kHalves>(rows, group, cut); }, cut.cluster, cut.bytes);
    return cudaSuccess;
  }
};

template <typename T>
cudaError_t launch_group(const Kind& kind, const Rows<T>& rows, const Group& group, const LaunchOptions& options) {
  if (!options.dependent) return cudaErrorNotSupported;  // the tests ask for it
  return launch_rows(kind, rows, group, kHopper, EmulatedLaunch<T>{});
}

template <typename T>
cudaError_t launch_many(const Kind& kind, const ManyRows<T>& rows, const Group& group, const LaunchOptions&) {
  constexpr ManyDevice kDevice{kHopper, 6, 1, true};  // small, so that blocks take several groups of tiles
  return launch_many_rows(kind, rows, group, kDevice, emulator::ManyLaunch<T>{});
}

template <typename T>
cudaError_t launch_fill(const Rows<T>& rows, uint8_t* panels, float* factor, int cols, int blocks, const LaunchOptions&) {
  emulator::fill(rows, panels, factor, cols, blocks);
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_swiglu(const T* x, int64_t x_stride, T* y, int64_t y_stride, int count, int columns,
                          const LaunchOptions&) {
  for (int m = 0; m < count; ++m)
    emulator::launch((columns + 255) / 256, 256,
                     [&] { swiglu_kernel(x + m * x_stride, x_stride, y + m * y_stride, y_stride, columns); });
  return cudaSuccess;
}

}  // namespace cai

namespace tvm::ffi {
struct HostGuard {  // in place of the guard that chooses a GPU
  explicit HostGuard(int) {}
};
}  // namespace tvm::ffi

inline const char* name_of(cudaError_t) { return "refused by the emulated device"; }

#define kDLCUDA kDLCPU
#define CUDADeviceGuard HostGuard
#define TVMFFIEnvGetStream(type, id) nullptr
#define cudaGetErrorName name_of
#define cudaGetErrorString name_of
#include "cuda/ops.cu"
