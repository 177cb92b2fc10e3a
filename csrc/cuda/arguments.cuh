// What a launch of the decode linears takes, where things lie in a block's shared memory, and how the value of one output
// element is stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "packed.cuh"

namespace cai {

constexpr int kMaxMembers = 4;
constexpr int kMaxRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 4;         // copies of a warp under way
constexpr int kStepsPerCopy = 2;  // at most
constexpr int kSquaredColumns = 256;  // whose squares one warp sums for the norm

enum Destination : int { kToZ = 1, kToY = 2 };  // a product may go to both

// What x goes through first. kSwiglu: x holds gate and up side by side.
enum class Prologue : int { kNone, kNorm, kSwiglu };

// One matrix of a launch: w [rows, cols] times columns [x_col, x_col + cols) of x.
struct Product {
  const uint8_t* w;     // packed
  const float* scale;   // int8: [rows]; else null
  const int32_t* index;  // [rows]: the column of y that each row makes, or null for the identity
  const float* bias;     // by column of y, or null
  int64_t tile_bytes;
  int32_t rows, cols;
  int32_t x_col, z_col, y_col;  // where the member's columns start in x, z and y
  int32_t destination;
  int32_t steps, last_blocks;  // of a tile
  // Filled in by the plan of a launch.
  int32_t first_group;  // of its groups of tiles
  int32_t staged;       // where its columns begin in the rows of x in shared memory
  int32_t stages;       // whether it brings columns there: of products that read the same, the first does
};

struct Group {
  Product product[kMaxMembers];
  int32_t count;
};

// Everything a launch takes besides the matrices. T is the activation type of x, residual, z and y.
template <typename T>
struct Rows {
  const T* x;
  const T* residual;  // by column of y, or null
  const T* norm;      // weight of the RMSNorm that x goes through first, or null
  T* z;
  T* y;
  int64_t x_stride, residual_stride, z_stride, y_stride;
  float eps;         // of the norm
  int32_t count;     // 1 to kMaxRows
  Prologue prologue;
  int32_t x_vector;  // filled in by the plan: whether 16-byte loads of x (and of the norm's weight) are aligned
};

// Shared memory that a block may have, of a device: at most, and so much that a block of the next kernel has room beside it,
// which fetches its weights meanwhile.
struct Room {
  int32_t most, for_two;
};

// How a launch is cut up. A cluster of blocks takes as many tiles together: of each, every block sums the same
// kParts / cluster parts, so that it needs no other columns of x.
struct Cut {
  int32_t cluster;  // 1, 2, 4 or 8 blocks
  int32_t groups;   // of `cluster` tiles
  int32_t blocks;   // of the grid
  // Offsets in a block's shared memory, and strides in bytes.
  int32_t slot_bytes, ring, partial, squares, x, x_stride, bytes;
};

// ------------------------------------------------------------------------------------------------ number formats

template <typename T>
struct Format;

template <>
struct Format<float> {
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};
template <>
struct Format<__nv_bfloat16> {
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Format<__half> {
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace cai
