// What is launched for an activation type, a store and a number of rows. The instances are in linear_*.cu, one file for each
// activation type, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include "matrix_products.cuh"

namespace cai {

enum class Store : int { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };
constexpr int kStores = 5;

// How a launch is made; for measurements. Results don't depend on it.
struct LaunchOptions {
  cudaStream_t stream;
  bool dependent;  // programmatic dependent launch, where the device has it
};

// Whether the tensor cores' kernel takes the store for activations T.
template <typename T>
bool multiplies_matrices(Store store) {
  if (is_same<T, float>) return false;
  return store == Store::kInt8 || store == Store::kInt4 ||
         store == (is_same<T, __nv_bfloat16> ? Store::kBFloat16 : Store::kFloat16);
}

// One launch for a group whose matrices share a store. A prologue needs `multiplies_matrices`; the norm bfloat16; the gate
// kFusedSwigluRows rows at most.
template <typename T>
cudaError_t launch_group(Store store, Prologue prologue, const Rows<T>& rows, const Group& group,
                         const LaunchOptions& options);

// y [count, columns] = silu(gate) * up of x [count, 2 columns].
template <typename T>
cudaError_t launch_swiglu(const T* x, int64_t x_stride, T* y, int64_t y_stride, int count, int columns,
                          const LaunchOptions& options);

}  // namespace cai
