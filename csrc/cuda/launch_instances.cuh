// Launching the kernels.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "dispatch.cuh"

namespace cai {

// A launch whose blocks may start while the kernel before it ends; see device.cuh.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int cluster, int shared_bytes,
                   const LaunchOptions& options, Arguments&&... arguments) {
  std::array<cudaLaunchAttribute, 2> attributes{};
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = options.stream;
  config.attrs = attributes.data();
  if (options.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

constexpr int kDevices = 64;
constexpr int kClusterSizes = 4;  // 1, 2, 4, 8

inline cudaError_t current_device(int& device) {
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : device < kDevices ? cudaSuccess : cudaErrorInvalidDevice;
}

// What the device has; an error if it lacks bulk copies and clusters.
inline cudaError_t room_of_device(Room& room) {
  static std::array<std::atomic<int>, kDevices> most{}, whole{};
  int device = 0, major = 0;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  room.most = most[device].load(std::memory_order_acquire);
  room.for_two = whole[device].load(std::memory_order_relaxed) / 2 - 1024;  // 1 KiB of each block is the system's
  if (room.most != 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess && major < 9) return cudaErrorNotSupported;
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room.most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&room.for_two, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  whole[device].store(room.for_two, std::memory_order_relaxed);
  most[device].store(room.most, std::memory_order_release);
  room.for_two = room.for_two / 2 - 1024;
  return cudaSuccess;
}

// Once for a kernel and a device (kernels of one type are told apart by the template's value), before its first launch: its blocks may have all their shared memory, and of that one share
// for all kernels: another one for the next would wait until the multiprocessor is empty.
template <auto kKernel>
cudaError_t allow_shared_memory() {
  static std::array<std::atomic<bool>, kDevices> done{};  // of this kernel
  int device = 0;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess || done[device].load(std::memory_order_relaxed)) return error;
  Room room{};
  error = room_of_device(room);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room.most);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) done[device].store(true, std::memory_order_relaxed);
  return error;
}

// How many clusters of a kernel run at once, with a block to a multiprocessor: clusters of eight leave some of those out, which
// of a device's groups of multiprocessors have no eight left.
template <auto kKernel, int kBlockThreads>
cudaError_t clusters_at_once(int cluster, int& clusters) {
  static std::array<std::array<std::atomic<int>, kClusterSizes>, kDevices> known{};  // of this kernel; 0: not yet
  int device = 0;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int size = cluster == 1 ? 0 : cluster == 2 ? 1 : cluster == 4 ? 2 : 3;
  clusters = known[device][size].load(std::memory_order_relaxed);
  if (clusters != 0) return cudaSuccess;
  Room room{};
  error = room_of_device(room);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = allow_shared_memory<kKernel>();
  if (error == cudaSuccess && cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(clusters / cluster * cluster);
    config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = room.most;
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config);
  }
  if (error == cudaSuccess && clusters == 0) return cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) known[device][size].store(clusters, std::memory_order_relaxed);
  return error;
}

template <typename T>
struct DecodeLaunch {
  const LaunchOptions& options;

  template <typename W, int kHalves>
  cudaError_t run(const Rows<T>& rows, const Group& group, Cut cut) const {
    constexpr auto kKernel = decode_products_kernel<T, W, kHalves>;
    int clusters = 0;
    const cudaError_t error = clusters_at_once<kKernel, kThreads>(cut.cluster, clusters);
    if (error != cudaSuccess) return error;
    choose_blocks(cut, clusters);
    return launch(kKernel, dim3(cut.blocks), kThreads, cut.cluster, cut.bytes, options, rows, group, cut);
  }
};

template <typename T>
cudaError_t launch_group(const Kind& kind, const Rows<T>& rows, const Group& group, const LaunchOptions& options) {
  if (rows.prologue == Prologue::kNorm && !is_same<T, __nv_bfloat16>) return cudaErrorInvalidValue;
  Room room{};
  const cudaError_t error = room_of_device(room);
  return error != cudaSuccess ? error : launch_rows(kind, rows, group, room, DecodeLaunch<T>{options});
}

// What launches for many rows are cut for.
inline cudaError_t many_device(ManyDevice& found) {
  static std::array<std::atomic<int>, kDevices> multiprocessors{}, majors{};
  int device = 0, major = 0;
  cudaError_t error = room_of_device(found.room);
  if (error == cudaSuccess) error = current_device(device);
  if (error != cudaSuccess) return error;
  found.multiprocessors = multiprocessors[device].load(std::memory_order_acquire);
  major = majors[device].load(std::memory_order_relaxed);
  if (found.multiprocessors == 0) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    majors[device].store(major, std::memory_order_relaxed);
    multiprocessors[device].store(found.multiprocessors, std::memory_order_release);
  }
  found.clusters = found.multiprocessors / kShared;  // at most: a launch asks how many there are for its kernel
  found.warp_groups = major == 9;
  return cudaSuccess;
}

template <typename T>
struct ManyLaunch {
  const LaunchOptions& options;

  template <typename W, int kRows, bool kSplit>
  cudaError_t run(const ManyRows<T>& rows, const Group& group, ManyCut cut) const {
    constexpr auto kKernel = many_products_kernel<T, W, kRows, kSplit>;
    constexpr int kCluster = kSplit ? kParts : kShared;
    int clusters = 0;
    const cudaError_t error = clusters_at_once<kKernel, kManyThreads>(kCluster, clusters);
    if (error != cudaSuccess) return error;
    if (!kSplit && cut.blocks > clusters * kCluster) cut.blocks = clusters * kCluster;
    return launch(kKernel, dim3(cut.blocks), kManyThreads, kCluster, cut.bytes, options, rows, group, cut);
  }
};

template <typename T>
cudaError_t launch_many(const Kind& kind, const ManyRows<T>& rows, const Group& group, const LaunchOptions& options) {
  ManyDevice device{};
  const cudaError_t error = many_device(device);
  return error != cudaSuccess ? error : launch_many_rows(kind, rows, group, device, ManyLaunch<T>{options});
}

template <typename T>
cudaError_t launch_fill(const Rows<T>& rows, uint8_t* panels, float* factor, int cols, int blocks,
                        const LaunchOptions& options) {
  if (rows.prologue == Prologue::kNorm && !is_same<T, __nv_bfloat16>) return cudaErrorInvalidValue;
  const cudaError_t error = allow_shared_memory<fill_panels_kernel<T>>();
  if (error != cudaSuccess) return error;
  Rows<T> ready = rows;
  align_rows(ready, cols);
  const int parts = fill_parts(rows.prologue, cols);
  return launch(fill_panels_kernel<T>, dim3(static_cast<unsigned>(rows.count) * parts), kThreads, 1,
                fill_shared_bytes(rows.prologue, cols), options, ready, panels, factor, cols, blocks, parts);
}

template <typename T>
cudaError_t launch_swiglu(const T* x, int64_t x_stride, T* y, int64_t y_stride, int count, int columns,
                          const LaunchOptions& options) {
  const dim3 blocks((columns + 255) / 256, count);
  return launch(swiglu_kernel<T>, blocks, 256, 1, 0, options, x, x_stride, y, y_stride, columns);
}

// The instances for T.
#define CAI_LINEAR(T)                                                                                 \
  template void measure<T>(const Kind&, Product&);                                                    \
  template cudaError_t launch_group(const Kind&, const Rows<T>&, const Group&, const LaunchOptions&); \
  template cudaError_t launch_swiglu(const T*, int64_t, T*, int64_t, int, int, const LaunchOptions&);
#define CAI_MANY(T)                                                                                      \
  template cudaError_t launch_many(const Kind&, const ManyRows<T>&, const Group&, const LaunchOptions&); \
  template cudaError_t launch_fill(const Rows<T>&, uint8_t*, float*, int, int, const LaunchOptions&);

}  // namespace cai
