// The decode kernel for what matrix_products.cuh does not take (float32 activations, float stores of another type): y = W x
// for 1 to 8 rows of x, any store, by fused multiply-adds in float32.
//
// Each thread streams 16 bytes of four weight rows at a time, widens them in registers, and multiplies them with every row
// of x. A team of threads, a warp or the whole block, shares the four rows.
//
// Batch invariance: which thread multiplies which element, and in which order the sums meet (ascending within a thread,
// a butterfly within a warp, warps in order), depends on the number of columns and the store alone.
//
// Free of launches and of FFI, so that tests can run the same code on a CPU.
#pragma once

#include "group.cuh"

namespace cai {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kMostProductRows = 8;  // of x; more take another launch
constexpr int kRowsPerTeam = 4;  // weight rows a team reads at a time: four independent loads in flight per thread

// ----------------------------------------------------------------------------------------------- rows of weights

// Weights pass through once: they should not push x out of the caches.
__device__ __forceinline__ uint4 load_streaming(const void* from) { return __ldcs(static_cast<const uint4*>(from)); }

// A weight row as 16-byte vectors and as single numbers, float32 either way.
template <typename W>
struct WeightRow {
  const W* w;

  __device__ __forceinline__ WeightRow(const Product& p, int row)
      : w(reinterpret_cast<const W*>(static_cast<const uint8_t*>(p.w) + row * p.w_stride)) {}

  struct Vector {
    Pack<W, Stored<W>::kPer16Bytes> numbers;
    __device__ __forceinline__ float at(int i) const { return Format<W>::widen(numbers.at[i]); }
  };
  __device__ __forceinline__ Vector load(int k) const {
    const uint4 bits = load_streaming(w + k);
    Vector vector;
    __builtin_memcpy(&vector, &bits, 16);
    return vector;
  }
  __device__ __forceinline__ float at(int k) const { return Format<W>::widen(w[k]); }
};

template <>
struct WeightRow<Int4> {
  const uint8_t* w;
  const __nv_bfloat16* scale;
  const uint8_t* zero;
  int group_bits;

  __device__ __forceinline__ WeightRow(const Product& p, int row)
      : w(static_cast<const uint8_t*>(p.w) + row * p.w_stride),
        scale(static_cast<const __nv_bfloat16*>(p.scale) + static_cast<int64_t>(row) * p.scale_stride),
        zero(p.zero == nullptr ? nullptr : p.zero + static_cast<int64_t>(row) * p.zero_stride), group_bits(p.group_bits) {}

  struct Vector {
    uint32_t codes[4];
    float scale;
    int zero;
    // Exact: five bits times eight.
    __device__ __forceinline__ float at(int i) const {
      return scale * static_cast<float>(static_cast<int>(codes[i / 8] >> (4 * (i % 8)) & 15) - zero);
    }
  };
  __device__ __forceinline__ Vector load(int k) const {
    const uint4 bits = load_streaming(w + k / 2);
    return {{bits.x, bits.y, bits.z, bits.w}, Format<__nv_bfloat16>::widen(scale[k >> group_bits]), zero_of(k)};
  }
  __device__ __forceinline__ float at(int k) const {
    const int code = w[k / 2] >> (k % 2 * 4) & 15;
    return Format<__nv_bfloat16>::widen(scale[k >> group_bits]) * static_cast<float>(code - zero_of(k));
  }
  __device__ __forceinline__ int zero_of(int k) const { return zero == nullptr ? 8 : zero[k >> group_bits]; }
};

// --------------------------------------------------------------------------------------------------- the products

// The row of x that feeds sum m. Rows beyond the last repeat it; their sums are not stored.
template <typename T>
__device__ __forceinline__ const T* row_of(const T* x, int64_t x_stride, int rows, int m) {
  return x + (m < rows ? m : rows - 1) * x_stride;
}

// Adds the products of columns [k, k + kPer16Bytes) of four weight rows and M rows of x to sum. Everything is aligned.
template <typename T, typename W, int M>
__device__ __forceinline__ void multiply_vector(const WeightRow<W> (&w)[kRowsPerTeam], const T* x, int64_t x_stride,
                                                int rows, int k, float (&sum)[kRowsPerTeam][M]) {
  constexpr int kVector = Stored<W>::kPer16Bytes;
  constexpr int kChunk = kVector < 8 ? kVector : 8;  // columns widened at a time, to bound the registers
  const typename WeightRow<W>::Vector packed[kRowsPerTeam] = {w[0].load(k), w[1].load(k), w[2].load(k), w[3].load(k)};
  static_assert(kRowsPerTeam == 4, "as listed");
#pragma unroll
  for (int chunk = 0; chunk < kVector; chunk += kChunk) {
    float weight[kRowsPerTeam][kChunk];
#pragma unroll
    for (int r = 0; r < kRowsPerTeam; ++r)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) weight[r][i] = packed[r].at(chunk + i);
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
__device__ __forceinline__ void multiply_columns(const WeightRow<W> (&w)[kRowsPerTeam], const T* x, int64_t x_stride,
                                                 int rows, int k, int end, float (&sum)[kRowsPerTeam][M]) {
#pragma unroll 1
  for (; k < end; ++k) {
    float weight[kRowsPerTeam];
#pragma unroll
    for (int r = 0; r < kRowsPerTeam; ++r) weight[r] = w[r].at(k);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float value = Format<T>::widen(row_of(x, x_stride, rows, m)[k]);
#pragma unroll
      for (int r = 0; r < kRowsPerTeam; ++r) sum[r][m] = fmaf(weight[r], value, sum[r][m]);
    }
  }
}

// One block: kThreads / team * kRowsPerTeam rows of one product. M is at least rows.count.
template <typename T, typename W, int M>
__global__ void __launch_bounds__(kThreads, M == 1 ? 6 : 0)  // 0: as the compiler sees fit
    products_kernel(const __grid_constant__ Rows<T> rows, const __grid_constant__ Group group) {
  static_assert(M >= 1 && M <= kMostProductRows, "more would not fit the registers");
  constexpr int kSums = kRowsPerTeam * M;
  __shared__ float partial[kWarps][kSums];

  int member = 0;
  while (member + 1 < group.count && static_cast<int>(blockIdx.x) >= group.product[member + 1].first_block) ++member;
  const Product& p = group.product[member];
  const int thread = static_cast<int>(threadIdx.x);
  const int rows_per_block = kThreads / p.team * kRowsPerTeam;
  const int block_row = (static_cast<int>(blockIdx.x) - p.first_block) * rows_per_block;
  const int team_row = block_row + thread / p.team * kRowsPerTeam;

  const auto weights = [&](int r) { return WeightRow<W>(p, team_row + r < p.rows ? team_row + r : p.rows - 1); };
  const WeightRow<W> w[kRowsPerTeam] = {weights(0), weights(1), weights(2), weights(3)};  // the last row is repeated
  const T* x = rows.x + p.x_col;
  float sum[kRowsPerTeam][M] = {};
  constexpr int kVector = Stored<W>::kPer16Bytes;
  const int first = thread % p.team * kVector;
  const int step = p.team * kVector;
  const int vectors_end = p.copy_bytes == 16 ? p.cols - p.cols % kVector : 0;
  int k = first;
#pragma unroll 1
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
    if constexpr (is_same<W, int8_t>) value *= static_cast<const float*>(p.scale)[row];
    store(p, rows, row, m, value);
  }
}

// ------------------------------------------------------------------------------------------------------- planning

// Fills in team, copy_bytes (16 or 0) and first_block of every product, and returns the number of blocks. The team hangs on
// columns and store alone, never on the number of rows of x.
template <typename T, typename W>
int plan(const Rows<T>& rows, Group& group) {
  constexpr int kVector = Stored<W>::kPer16Bytes;
  int blocks = 0;
  for (int g = 0; g < group.count; ++g) {
    Product& p = group.product[g];
    p.team = p.cols >= 2 * 32 * kVector ? kThreads : 32;
    const bool x_aligned = aligned_to(rows.x + p.x_col, 16) && rows.x_stride * sizeof(T) % 16 == 0;
    p.copy_bytes = x_aligned && aligned_to(p.w, 16) && p.w_stride % 16 == 0 ? 16 : 0;
    p.first_block = blocks;
    const int rows_per_block = kThreads / p.team * kRowsPerTeam;
    blocks += (p.rows + rows_per_block - 1) / rows_per_block;
  }
  return blocks;
}

}  // namespace cai
