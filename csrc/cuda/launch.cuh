// What is launched for an activation type, a store and a number of rows. The instances are in linear_*.cu, one file for each
// activation type, so that they compile side by side.
#pragma once

#include <cuda_runtime_api.h>

#include "many_arguments.cuh"
#include "panels.cuh"

namespace cai {

// As kernels/cuda_packing.py numbers them. kOwn: 16-bit weights of the activations' type.
enum class Store : int { kOwn, kInt8, kInt4 };

// What the products of a launch have in common.
struct Kind {
  Store store;
  int group;  // int4: 32, 64 or 128 columns share a scale; else 0
  bool zero;  // int4: whether there are zero points

  bool operator==(const Kind& other) const {
    return store == other.store && group == other.group && zero == other.zero;
  }
};

// How a launch is made; for measurements. Results don't depend on it.
struct LaunchOptions {
  cudaStream_t stream;
  bool dependent;  // programmatic dependent launch
};

// Fills in the bytes and steps of a packed matrix of `p.cols` columns.
template <typename T>
void measure(const Kind& kind, Product& p);

// One launch for a group whose matrices are of one kind; of several where the rows of x don't fit a block's shared memory
// together. The norm is for bfloat16 alone.
template <typename T>
cudaError_t launch_group(const Kind& kind, const Rows<T>& rows, const Group& group, const LaunchOptions& options);

// One launch for many rows, of matrices of one kind.
template <typename T>
cudaError_t launch_many(const Kind& kind, const ManyRows<T>& rows, const Group& group, const LaunchOptions& options);

// The rows of x, `cols` columns of them after the prologue, into panels of `blocks` blocks of columns; factor [count]: of a norm.
template <typename T>
cudaError_t launch_fill(const Rows<T>& rows, uint8_t* panels, float* factor, int cols, int blocks, const LaunchOptions& options);

// y [count, columns] = silu(gate) * up of x [count, 2 columns].
template <typename T>
cudaError_t launch_swiglu(const T* x, int64_t x_stride, T* y, int64_t y_stride, int count, int columns,
                          const LaunchOptions& options);

}  // namespace cai
