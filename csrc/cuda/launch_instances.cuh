// Choosing the kernel for an activation type, a store and a number of rows, and launching it.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "launch.cuh"
#include "products.cuh"

namespace cai {

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&value, attribute, device);
}

// A launch whose blocks may start while the kernel before it ends; see device.cuh.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, const LaunchOptions& options,
                   Arguments&&... arguments) {
  int major = 0;
  const cudaError_t error = device_attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.stream = options.stream;
  config.attrs = &attribute;
  config.numAttrs = options.dependent && major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename T, typename W, int kHalves, Prologue kPrologue>
cudaError_t launch_tiles(Rows<T> rows, Group group, const LaunchOptions& options) {
  constexpr auto kKernel = matrix_products_kernel<T, W, kHalves, kPrologue>;
  static std::array<std::atomic<int>, 64> resident{};  // blocks that run at once, by device; 0: not known yet
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= static_cast<int>(resident.size())) return cudaErrorInvalidDevice;
  int at_once = resident[device].load(std::memory_order_relaxed);
  if (at_once == 0) {
    int processors = 0, blocks = 0;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kKernel, kTileThreads, 0);
    if (error != cudaSuccess) return error;
    if (blocks == 0) return cudaErrorLaunchOutOfResources;
    at_once = processors * blocks;
    resident[device].store(at_once, std::memory_order_relaxed);
  }
  const int tiles = plan_tiles<T, W>(rows, group);
  if (tiles == 0) return cudaSuccess;
  return launch(kKernel, dim3(blocks_for(tiles, at_once)), kTileThreads, options, rows, group, tiles);
}

template <typename T, typename W>
cudaError_t launch_matrix_products(Prologue prologue, const Rows<T>& rows, const Group& group,
                                   const LaunchOptions& options) {
  const bool few = rows.count <= 8;
  if (prologue == Prologue::kSwiglu) {
    if (rows.count > kFusedSwigluRows) return cudaErrorInvalidValue;
    return launch_tiles<T, W, 1, Prologue::kSwiglu>(rows, group, options);
  }
  if (prologue == Prologue::kNorm) {
    if constexpr (is_same<T, __nv_bfloat16>) {
      return few ? launch_tiles<T, W, 1, Prologue::kNorm>(rows, group, options)
                 : launch_tiles<T, W, 2, Prologue::kNorm>(rows, group, options);
    } else {
      return cudaErrorInvalidValue;
    }
  }
  return few ? launch_tiles<T, W, 1, Prologue::kNone>(rows, group, options)
             : launch_tiles<T, W, 2, Prologue::kNone>(rows, group, options);
}

template <typename T, typename W, int M>
cudaError_t launch_instance(const Rows<T>& rows, Group group, cudaStream_t stream) {
  const int blocks = plan<T, W>(rows, group);
  if (blocks > 0) products_kernel<T, W, M><<<blocks, kThreads, 0, stream>>>(rows, group);
  return cudaGetLastError();
}

template <typename T, typename W>
cudaError_t launch_products(const Rows<T>& rows, const Group& group, cudaStream_t stream) {
  if (rows.count <= 1) return launch_instance<T, W, 1>(rows, group, stream);
  if (rows.count <= 4) return launch_instance<T, W, 4>(rows, group, stream);
  if (rows.count <= kMostProductRows) return launch_instance<T, W, kMostProductRows>(rows, group, stream);
  Rows<T> part = rows;
  part.count = kMostProductRows;
  const cudaError_t error = launch_instance<T, W, kMostProductRows>(part, group, stream);
  if (error != cudaSuccess) return error;
  part.count = rows.count - kMostProductRows;
  part.x += kMostProductRows * rows.x_stride;
  part.y += kMostProductRows * rows.y_stride;
  if (rows.z != nullptr) part.z += kMostProductRows * rows.z_stride;
  if (rows.residual != nullptr) part.residual += kMostProductRows * rows.residual_stride;
  return launch_products<T, W>(part, group, stream);
}

template <typename T>
cudaError_t launch_group(Store store, Prologue prologue, const Rows<T>& rows, const Group& group,
                         const LaunchOptions& options) {
  constexpr bool kFloat = is_same<T, float>, kBFloat16 = is_same<T, __nv_bfloat16>;
  if (multiplies_matrices<T>(store)) {
    if constexpr (!kFloat) {
      if (store == Store::kInt8) return launch_matrix_products<T, int8_t>(prologue, rows, group, options);
      if (store == Store::kInt4) return launch_matrix_products<T, Int4>(prologue, rows, group, options);
      return launch_matrix_products<T, T>(prologue, rows, group, options);
    }
  }
  if (prologue != Prologue::kNone) return cudaErrorInvalidValue;
  if (store == Store::kFloat32) return launch_products<T, float>(rows, group, options.stream);
  if constexpr (!kBFloat16)
    if (store == Store::kBFloat16) return launch_products<T, __nv_bfloat16>(rows, group, options.stream);
  if constexpr (kFloat || kBFloat16)
    if (store == Store::kFloat16) return launch_products<T, __half>(rows, group, options.stream);
  if constexpr (kFloat) {
    if (store == Store::kInt8) return launch_products<T, int8_t>(rows, group, options.stream);
    if (store == Store::kInt4) return launch_products<T, Int4>(rows, group, options.stream);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t launch_swiglu(const T* x, int64_t x_stride, T* y, int64_t y_stride, int count, int columns,
                          const LaunchOptions& options) {
  const dim3 blocks((columns + 255) / 256, count);
  return launch(swiglu_kernel<T>, blocks, 256, options, x, x_stride, y, y_stride, columns);
}

// The instances for T.
#define CAI_LINEAR(T)                                                                                       \
  template cudaError_t launch_group(Store, Prologue, const Rows<T>&, const Group&, const LaunchOptions&);   \
  template cudaError_t launch_swiglu(const T*, int64_t, T*, int64_t, int, int, const LaunchOptions&);

}  // namespace cai
