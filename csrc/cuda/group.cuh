// What a launch of the decode linears takes, and how the value of one output element is stored. Shared by both kernels:
// matrix_products.cuh (tensor cores, 16-bit activations) and products.cuh (everything else).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cai {

constexpr int kMaxMembers = 4;
constexpr int kMaxRows = 16;

enum Destination : int { kToZ = 1, kToY = 2 };  // a product may go to both

// The store of an int4 core: two codes to a byte, the even column in the low half.
struct Int4 {};

// One matrix of a launch: w [rows, cols] times columns [x_col, x_col + cols) of x.
struct Product {
  const void* w;
  const void* scale;    // int8: float [rows]; int4: bfloat16 [rows, groups]; else null
  const uint8_t* zero;  // int4: [rows, groups], or null for 8 everywhere
  const int32_t* index;  // [rows]: the column of y that each row makes, or null for the identity
  const float* bias;     // by column of y, or null
  int64_t w_stride;      // bytes from row to row
  int32_t scale_stride, zero_stride;  // elements from row to row of an int4 core's scales and zero points
  int32_t group_bits;                 // int4: 1 << group_bits columns share a scale (5, 6 or 7)
  int32_t rows, cols;
  int32_t x_col, z_col, y_col;  // where the member's columns start in x, z and y
  int32_t destination;
  // Filled in by the plan of a launch.
  int32_t team;         // products.cuh: threads that share a row, 32 or the block
  int32_t copy_bytes;   // the widest aligned load of a row: 16, 8 or 4 bytes; 0: byte by byte
  int32_t copy_scales;  // whether scales (bit 0) and zero points (bit 1) are aligned for copies of a whole chunk's
  int32_t first_block;  // matrix_products.cuh: its first tile; products.cuh: its first block
  int32_t reserved;
};
static_assert(sizeof(Product) == 104, "the emulator's tests mirror this layout");

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
  int32_t x_vector;  // filled in by the plan: whether 16-byte loads of x (and of the norm's weight) are aligned
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
template <>
struct Format<int8_t> {
  static __device__ __forceinline__ float widen(int8_t v) { return static_cast<float>(v); }
};

// N consecutive elements, read with the widest aligned loads, kept as they are stored.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

template <typename T, int N>
__device__ __forceinline__ void load_widened(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = Format<T>::widen(pack.at[i]);
}

template <typename W>
struct Stored {
  static constexpr int kPer16Bytes = 16 / static_cast<int>(sizeof(W));
  static __host__ __device__ __forceinline__ int64_t bytes(int64_t columns) { return columns * sizeof(W); }
};
template <>
struct Stored<Int4> {
  static constexpr int kPer16Bytes = 32;
  static __host__ __device__ __forceinline__ int64_t bytes(int64_t columns) { return (columns + 1) / 2; }
};

template <typename A, typename B>
constexpr bool is_same = false;
template <typename A>
constexpr bool is_same<A, A> = true;

// ------------------------------------------------------------------------------------------------------ epilogue

// The value of one element of W x: to z, and with bias and residual to y.
template <typename T>
__device__ __forceinline__ void store(const Product& p, const Rows<T>& rows, int row, int m, float value) {
  if (p.destination & kToZ) rows.z[m * rows.z_stride + p.z_col + row] = Format<T>::narrow(value);
  if (p.destination & kToY) {
    const int column = p.index != nullptr ? p.index[row] : row;
    if (p.bias != nullptr) value += p.bias[column];
    if (rows.residual != nullptr) {
      value += Format<T>::widen(rows.residual[m * rows.residual_stride + p.y_col + column]);
    }
    rows.y[m * rows.y_stride + p.y_col + column] = Format<T>::narrow(value);
  }
}

inline bool aligned_to(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace cai
