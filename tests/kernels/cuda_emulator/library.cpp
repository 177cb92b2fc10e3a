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

#include "cuda/launch.cuh"
#include "cuda/products.cuh"

namespace cai {

constexpr int kAtOnce = 3;  // blocks of the emulated device

template <typename T, typename W, int kHalves, Prologue kPrologue>
cudaError_t launch_tiles(Rows<T> rows, Group group) {
  const int tiles = plan_tiles<T, W>(rows, group);
  emulator::launch(blocks_for(tiles, kAtOnce), kTileThreads,
                   [&] { matrix_products_kernel<T, W, kHalves, kPrologue>(rows, group, tiles); });
  return cudaSuccess;
}

template <typename T, typename W>
cudaError_t launch_matrix_products(Prologue prologue, const Rows<T>& rows, const Group& group) {
  const bool few = rows.count <= 8;
  if (prologue == Prologue::kSwiglu) return launch_tiles<T, W, 1, Prologue::kSwiglu>(rows, group);
  if (prologue == Prologue::kNone)
    return few ? launch_tiles<T, W, 1, Prologue::kNone>(rows, group)
               : launch_tiles<T, W, 2, Prologue::kNone>(rows, group);
  if constexpr (is_same<T, __nv_bfloat16>)
    return few ? launch_tiles<T, W, 1, Prologue::kNorm>(rows, group)
               : launch_tiles<T, W, 2, Prologue::kNorm>(rows, group);
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_group(Store store, Prologue prologue, const Rows<T>& rows, const Group& group,
                         const LaunchOptions& options) {
  if (!options.dependent) return cudaErrorNotSupported;  // the tests ask for it
  if constexpr (!is_same<T, float>) {
    if (store == Store::kInt8) return launch_matrix_products<T, int8_t>(prologue, rows, group);
    if (store == Store::kInt4) return launch_matrix_products<T, Int4>(prologue, rows, group);
    if (multiplies_matrices<T>(store)) return launch_matrix_products<T, T>(prologue, rows, group);
  }
  if (store != Store::kFloat32 || prologue != Prologue::kNone || rows.count > kMostProductRows)
    return cudaErrorInvalidValue;
  Group planned = group;
  const int blocks = plan<T, float>(rows, planned);
  emulator::launch(blocks, kThreads, [&] { products_kernel<T, float, kMostProductRows>(rows, planned); });
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
