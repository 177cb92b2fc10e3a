// Choosing the instantiation of products_kernel for a store and a number of rows, and launching it.
#pragma once

#include <cuda_runtime.h>

#include "products.cuh"

namespace cai {

enum class Store : int { kFloat32, kBFloat16, kFloat16, kInt8 };

template <typename T, typename W, int M>
cudaError_t launch_instance(const Rows<T>& rows, Group group, cudaStream_t stream) {
  const int blocks = plan<T, W>(rows, group);
  if (blocks > 0) products_kernel<T, W, M><<<blocks, kThreads, 0, stream>>>(rows, group);
  return cudaGetLastError();
}

template <typename T, typename W>
cudaError_t launch_store(const Rows<T>& rows, const Group& group, cudaStream_t stream) {
  if (rows.count <= 1) return launch_instance<T, W, 1>(rows, group, stream);
  if (rows.count <= 4) return launch_instance<T, W, 4>(rows, group, stream);
  if (rows.count <= 8) return launch_instance<T, W, 8>(rows, group, stream);
  return launch_instance<T, W, 16>(rows, group, stream);
}

// One launch for a group whose matrices share a store.
template <typename T>
cudaError_t launch_products(Store store, const Rows<T>& rows, const Group& group, cudaStream_t stream) {
  switch (store) {
    case Store::kFloat32: return launch_store<T, float>(rows, group, stream);
    case Store::kBFloat16: return launch_store<T, __nv_bfloat16>(rows, group, stream);
    case Store::kFloat16: return launch_store<T, __half>(rows, group, stream);
    case Store::kInt8: return launch_store<T, int8_t>(rows, group, stream);
  }
  return cudaErrorInvalidValue;
}

// Each in a file of its own, so that they compile side by side.
extern template cudaError_t launch_products(Store, const Rows<float>&, const Group&, cudaStream_t);
extern template cudaError_t launch_products(Store, const Rows<__nv_bfloat16>&, const Group&, cudaStream_t);
extern template cudaError_t launch_products(Store, const Rows<__half>&, const Group&, cudaStream_t);

}  // namespace cai
