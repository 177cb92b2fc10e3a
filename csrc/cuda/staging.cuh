// x on its way into shared memory, once for a block: normalized or gated, zeros beyond its columns.
#pragma once

#include "arguments.cuh"
#include "device.cuh"

namespace cai {

// Eight 16-bit numbers of a row, as pairs.
struct Eight {
  uint32_t pair[4];
};

template <typename T>
__device__ __forceinline__ float number_at(const Eight& v, int i) {
  const uint16_t bits = static_cast<uint16_t>(v.pair[i / 2] >> (16 * (i % 2)));
  T number;
  __builtin_memcpy(&number, &bits, 2);
  return Format<T>::widen(number);
}

// Columns [k, k + 8) of a row that has `cols`; zeros beyond them.
template <typename T>
__device__ __forceinline__ Eight load_eight(const T* row, int k, int cols, bool vector) {
  Eight v{};
  if (vector && k + 8 <= cols) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + k);
    v = {bits.x, bits.y, bits.z, bits.w};
  } else {
    const auto* numbers = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (k + i < cols) v.pair[i / 2] |= static_cast<uint32_t>(numbers[k + i]) << (16 * (i % 2));
  }
  return v;
}

// Sums over the lanes, in an order that does not depend on anything.
__device__ __forceinline__ float sum_of_lanes(float v) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

template <typename T>
__device__ __forceinline__ float sum_of_squares(const Eight& v) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float number = number_at<T>(v, i);
    sum = fmaf(number, number, sum);
  }
  return sum_of_lanes(sum);
}

// x times the norm's weight; the division by the root mean square follows the sums.
__device__ __forceinline__ Eight scaled(Eight x, const Eight& weight) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) x.pair[pair] = multiply_bfloat16_pairs(x.pair[pair], weight.pair[pair]);
  return x;
}

template <typename T>
__device__ __forceinline__ Eight gated_eight(const Eight& gate, const Eight& up) {
  Eight made{};
#pragma unroll
  for (int number = 0; number < 8; ++number) {
    const T value = Format<T>::narrow(gated(number_at<T>(gate, number), number_at<T>(up, number)));
    uint16_t bits;
    __builtin_memcpy(&bits, &value, 2);
    made.pair[number / 2] |= static_cast<uint32_t>(bits) << (16 * (number % 2));
  }
  return made;
}

// 1 / rms of a row, of the squares of its runs of kSquaredColumns columns.
__device__ __forceinline__ float inverse_rms(const float* squares, int runs, int cols, float eps) {
  float sum = squares[0];
  for (int i = 1; i < runs; ++i) sum += squares[i];
  return inverse_root(sum / static_cast<float>(cols) + eps);
}

// The columns of a product that a block needs: those of its parts.
struct Slice {
  int32_t first, end;
};

template <typename W>
__device__ __forceinline__ Slice slice_of(const Product& p, int cluster, int rank) {
  const int parts = kParts / cluster;
  const int first = first_step(p.steps, rank * parts), end = first_step(p.steps, (rank + 1) * parts);
  return {first * kStepColumns<W>, end * kStepColumns<W>};
}

// Brings the rows of x for all products into shared memory, the block together, and for the norm the sums of squares
// [count][blocks of kSquaredColumns]: of these a cluster shares the work and the results. A barrier must follow.
template <typename T, typename W>
__device__ __forceinline__ void stage_x(const Rows<T>& rows, const Group& group, const Cut& cut, uint8_t* memory, int rank,
                                        int thread) {
  constexpr int kAtOnce = 4;  // loads under way
  const int warp = thread / 32, lane = thread % 32;
  const bool vector = rows.x_vector != 0;
  for (int i = 0; i < group.count; ++i) {
    const Product& p = group.product[i];
    if (!p.stages) continue;
    const Slice slice = slice_of<W>(p, cut.cluster, rank);
    const int width = slice.end - slice.first, chunks = (width + kSquaredColumns - 1) / kSquaredColumns;
    for (int first = warp; first < chunks * rows.count; first += kWarps * kAtOnce) {
      Eight x[kAtOnce], other[kAtOnce];  // the latter: the norm's weight, or `up`
      int chunk[kAtOnce], row[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int item = first + j * kWarps;
        row[j] = item / chunks;
        chunk[j] = item - row[j] * chunks;
        const int at = chunk[j] * kSquaredColumns + 8 * lane, k = slice.first + at;
        const bool there = row[j] < rows.count && at < width && k < p.cols;
        const T* from = rows.x + row[j] * rows.x_stride + p.x_col;
        x[j] = there ? load_eight(from, k, p.cols, vector) : Eight{};
        if (rows.prologue == Prologue::kNorm) {
          other[j] = there ? load_eight(rows.norm, k, p.cols, vector) : Eight{};
        } else if (rows.prologue == Prologue::kSwiglu) {
          other[j] = there ? load_eight(from + p.cols, k, p.cols, vector) : Eight{};
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (row[j] >= rows.count) continue;  // the warp together
        if (rows.prologue == Prologue::kNorm) {
          if (cut.cluster == 1) {
            const float sum = sum_of_squares<T>(x[j]);
            if (lane == 0) reinterpret_cast<float*>(memory + cut.squares)[row[j] * chunks + chunk[j]] = sum;
          }
          x[j] = scaled(x[j], other[j]);
        } else if (rows.prologue == Prologue::kSwiglu) {
          x[j] = gated_eight<T>(x[j], other[j]);
        }
        const int at = chunk[j] * kSquaredColumns + 8 * lane;
        if (at < width) {
          auto* to = reinterpret_cast<uint4*>(memory + cut.x + row[j] * cut.x_stride + (p.staged + at) * 2);
          *to = make_uint4(x[j].pair[0], x[j].pair[1], x[j].pair[2], x[j].pair[3]);
        }
      }
    }
  }
}

// The sums of squares of a cluster of several: each block sums every so-manieth run of columns and gives all the result.
template <typename T>
__device__ __forceinline__ void share_squares(const Rows<T>& rows, const Product& p, const Cut& cut, uint8_t* memory,
                                              int rank, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  const int chunks = (p.cols + kSquaredColumns - 1) / kSquaredColumns;
  for (int item = warp * cut.cluster + rank; item < chunks * rows.count; item += kWarps * cut.cluster) {
    const int row = item / chunks, chunk = item - row * chunks, k = chunk * kSquaredColumns + 8 * lane;
    const T* from = rows.x + row * rows.x_stride + p.x_col;
    const float sum = sum_of_squares<T>(k < p.cols ? load_eight(from, k, p.cols, rows.x_vector != 0) : Eight{});
    if (lane < cut.cluster) store_in_block(reinterpret_cast<float*>(memory + cut.squares) + item, lane, sum);
  }
}

}  // namespace cai
