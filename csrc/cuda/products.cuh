// The decode kernel of slim linears: y = W x for 1 to 16 rows of x, any store, accumulated in float32.
//
// At these sizes a linear costs the reading of its weights, so the kernel is built around that: each thread streams 16
// bytes of four weight rows at a time, widens them in registers, and multiplies them with every row of x. A team of
// threads, a warp or the whole block, shares the four rows.
//
// Batch invariance: which thread multiplies which element, and in which order the sums meet (ascending within a thread,
// a butterfly within a warp, warps in order), depends on the number of columns and the store alone.
//
// Free of launches and of FFI, so that tests can run the same code on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cai {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerTeam = 4;  // weight rows a team reads at a time: four independent loads in flight per thread
constexpr int kMaxMembers = 4;
constexpr int kMaxRows = 16;

enum Destination : int { kToZ = 1, kToY = 2 };  // a product may go to both

// One matrix of a launch: w [rows, cols] times columns [x_col, x_col + cols) of x.
struct Product {
  const void* w;
  const float* scale;    // [rows] or null
  const int32_t* index;  // [rows]: the column of y that each row makes, or null for the identity
  const float* bias;     // by column of y, or null
  int64_t w_stride;      // elements from row to row
  int32_t rows, cols;
  int32_t x_col, z_col, y_col;  // where the member's columns start in x, z and y
  int32_t destination;
  int32_t team;         // threads that share a row: 32 or kThreads
  int32_t vectorized;   // whether 16-byte loads are aligned
  int32_t first_block;  // of this product in the grid
};
static_assert(sizeof(Product) == 80, "the emulator's tests mirror this layout");

struct Group {
  Product product[kMaxMembers];
  int32_t count;
};

// Everything a launch takes besides the matrices. T is the activation type of x, residual, z and y.
template <typename T>
struct Rows {
  const T* x;
  const T* residual;  // by column of y, or null
  T* z;
  T* y;
  int64_t x_stride, residual_stride, z_stride, y_stride;
  int32_t count;  // 1 to kMaxRows
};

// ------------------------------------------------------------------------------------------------ number formats

template <typename T>
struct Format;

template <>
struct Format<float> {
  static constexpr int kPerVector = 4;
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};
template <>
struct Format<__half> {
  static constexpr int kPerVector = 8;
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};
template <>
struct Format<int8_t> {
  static constexpr int kPerVector = 16;
  static __device__ __forceinline__ float widen(int8_t v) { return static_cast<float>(v); }
};

// N consecutive elements, read with the widest aligned loads, kept as they are stored.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// Weights pass through once: they should not push x out of the caches.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_streaming(const T* from) {
  static_assert(sizeof(T) * N == 16, "one 16-byte load");
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  Pack<T, N> pack;
  __builtin_memcpy(&pack, &bits, 16);
  return pack;
}

template <typename T, int N>
__device__ __forceinline__ void load_widened(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = Format<T>::widen(pack.at[i]);
}

// --------------------------------------------------------------------------------------------------- the products

// The row of x that feeds sum m. Rows beyond the last repeat it; their sums are not stored.
template <typename T>
__device__ __forceinline__ const T* row_of(const T* x, int64_t x_stride, int rows, int m) {
  return x + (m < rows ? m : rows - 1) * x_stride;
}

// Adds the products of columns [k, k + kPerVector) of four weight rows and M rows of x to sum. Everything is aligned.
template <typename T, typename W, int M>
__device__ __forceinline__ void multiply_vector(const W* const (&w)[kRowsPerTeam], const T* x, int64_t x_stride, int rows,
                                                int k, float (&sum)[kRowsPerTeam][M]) {
  constexpr int kVector = Format<W>::kPerVector;
  constexpr int kMost = M > 8 ? 4 : 8;
  constexpr int kChunk = kVector < kMost ? kVector : kMost;  // columns widened at a time, to bound the registers
  Pack<W, kVector> packed[kRowsPerTeam];
#pragma unroll
  for (int r = 0; r < kRowsPerTeam; ++r) packed[r] = load_streaming<W, kVector>(w[r] + k);
#pragma unroll
  for (int chunk = 0; chunk < kVector; chunk += kChunk) {
    float weight[kRowsPerTeam][kChunk];
#pragma unroll
    for (int r = 0; r < kRowsPerTeam; ++r)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) weight[r][i] = Format<W>::widen(packed[r].at[chunk + i]);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float value[kChunk];
      load_widened<T, kChunk>(row_of(x, x_stride, rows, m) + k + chunk, value);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
#pragma unroll
        for (int r = 0; r < kRowsPerTeam; ++r) sum[r][m] = fmaf(weight[r][i], value[i], sum[r][m]);
    }
  }
}

// The same sums in the same order, one column at a time: for the end of a row, and for rows that lie unaligned.
template <typename T, typename W, int M>
__device__ __forceinline__ void multiply_columns(const W* const (&w)[kRowsPerTeam], const T* x, int64_t x_stride, int rows,
                                                 int k, int end, float (&sum)[kRowsPerTeam][M]) {
#pragma unroll 1
  for (; k < end; ++k) {
    float weight[kRowsPerTeam];
#pragma unroll
    for (int r = 0; r < kRowsPerTeam; ++r) weight[r] = Format<W>::widen(w[r][k]);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float value = Format<T>::widen(row_of(x, x_stride, rows, m)[k]);
#pragma unroll
      for (int r = 0; r < kRowsPerTeam; ++r) sum[r][m] = fmaf(weight[r], value, sum[r][m]);
    }
  }
}

// The value of one element of W x: to z, and with bias and residual to y.
template <typename T>
__device__ __forceinline__ void store(const Product& p, const Rows<T>& rows, int row, int m, float value) {
  if (p.scale != nullptr) value *= p.scale[row];
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

// One block: kThreads / team * kRowsPerTeam rows of one product. M is rows.count rounded up to a power of two.
template <typename T, typename W, int M>
__global__ void __launch_bounds__(kThreads) products_kernel(const Rows<T> rows, const Group group) {
  static_assert(M >= 1 && M <= kMaxRows && (M & (M - 1)) == 0, "a power of two up to 16");
  constexpr int kSums = kRowsPerTeam * M;
  __shared__ float partial[kWarps][kSums];

  int member = 0;
  while (member + 1 < group.count && static_cast<int>(blockIdx.x) >= group.product[member + 1].first_block) ++member;
  const Product& p = group.product[member];
  const int thread = static_cast<int>(threadIdx.x);
  const int rows_per_block = kThreads / p.team * kRowsPerTeam;
  const int block_row = (static_cast<int>(blockIdx.x) - p.first_block) * rows_per_block;
  const int team_row = block_row + thread / p.team * kRowsPerTeam;

  const W* w[kRowsPerTeam];
#pragma unroll
  for (int r = 0; r < kRowsPerTeam; ++r) {
    const int row = team_row + r < p.rows ? team_row + r : p.rows - 1;  // rows beyond the last repeat it
    w[r] = static_cast<const W*>(p.w) + row * p.w_stride;
  }
  const T* x = rows.x + p.x_col;
  float sum[kRowsPerTeam][M] = {};
  constexpr int kVector = Format<W>::kPerVector;
  const int first = thread % p.team * kVector;
  const int step = p.team * kVector;
  const int vectors_end = p.vectorized ? p.cols - p.cols % kVector : 0;
  int k = first;
  constexpr int kUnroll = M <= 2 ? 2 : 1;  // more loads in flight, where the sums leave the registers
#pragma unroll kUnroll
  for (; k < vectors_end; k += step) multiply_vector<T, W, M>(w, x, rows.x_stride, rows.count, k, sum);
#pragma unroll 1
  for (; k < p.cols; k += step) {
    const int end = k + kVector < p.cols ? k + kVector : p.cols;
    multiply_columns<T, W, M>(w, x, rows.x_stride, rows.count, k, end, sum);
  }

#pragma unroll
  for (int r = 0; r < kRowsPerTeam; ++r) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum[r][m] += __shfl_xor_sync(0xffffffffu, sum[r][m], lanes);
      if (thread % 32 == 0) partial[thread / 32][r * M + m] = sum[r][m];
    }
  }
  __syncthreads();

  const int warps_per_team = p.team / 32;
  const int outputs = kWarps / warps_per_team * kSums;
  for (int i = thread; i < outputs; i += kThreads) {
    const int team = i / kSums, row = block_row + team * kRowsPerTeam + i % kSums / M, m = i % M;
    if (row >= p.rows || m >= rows.count) continue;
    float value = partial[team * warps_per_team][i % kSums];
    for (int warp = 1; warp < warps_per_team; ++warp) value += partial[team * warps_per_team + warp][i % kSums];
    store(p, rows, row, m, value);
  }
}

// ------------------------------------------------------------------------------------------------------- planning

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Fills in team, vectorized and first_block of every product, and returns the number of blocks. The team hangs on columns
// and store alone, never on the number of rows of x.
template <typename T, typename W>
int plan(const Rows<T>& rows, Group& group) {
  constexpr int kVector = Format<W>::kPerVector;
  int blocks = 0;
  for (int g = 0; g < group.count; ++g) {
    Product& p = group.product[g];
    p.team = p.cols >= 2 * 32 * kVector ? kThreads : 32;
    const bool x_aligned = aligned16(rows.x + p.x_col) && rows.x_stride * sizeof(T) % 16 == 0;
    const bool w_aligned = aligned16(p.w) && p.w_stride * sizeof(W) % 16 == 0;
    p.vectorized = x_aligned && w_aligned;
    p.first_block = blocks;
    const int rows_per_block = kThreads / p.team * kRowsPerTeam;
    blocks += (p.rows + rows_per_block - 1) / rows_per_block;
  }
  return blocks;
}

}  // namespace cai
