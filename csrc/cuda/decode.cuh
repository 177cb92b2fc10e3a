// The decode kernel for 16-bit activations: y = W x for 1 to 16 rows of x by the tensor cores, weights of x's type, int8 or
// int4, packed (packed.cuh), accumulated in float32.
//
// At these sizes a linear costs the reading of its weights. A block takes a tile of 16 weight rows at a time; each of its
// eight warps sums one of the tile's parts, whose weights come in bulk copies, several under way (ring.cuh), from before the
// kernel ahead has ended and across the ends of tiles. x lies in shared memory, put there once (staging.cuh).
//
// Where x is wide, for instance gated, two to eight blocks are a cluster: they take as many tiles together, each block the
// same parts of all of them, so that each needs that much less of x. The sums of parts meet in the block that stores the tile.
//
// Batch invariance: the order of sums is that of packed.cuh, whatever the rows and the cluster; an instruction treats all
// rows of x alike.
//
// Free of launches and of FFI, so that tests can run the same code on a CPU.
#pragma once

#include "device.cuh"
#include "ring.cuh"
#include "staging.cuh"
#include "step.cuh"

namespace cai {

// Of the sums of parts [2 buffers][kParts][rows of x][tile's rows] in shared memory: wider by four than the tile, so that
// lanes write to different banks.
constexpr int kPartStride = kTileRows + 4;

// What is known of an output element before its sum is.
struct Outlet {
  int column = 0;
  float scale = 1.0f, bias = 0.0f, residual = 0.0f;
};

// Without the residual.
__device__ __forceinline__ Outlet outlet_of(const Product& p, int row) {
  Outlet outlet{p.index != nullptr ? p.index[row] : row};
  if (p.scale != nullptr) outlet.scale = p.scale[row];
  if (p.bias != nullptr && (p.destination & kToY) != 0) outlet.bias = p.bias[outlet.column];
  return outlet;
}

// From sums to the numbers that are stored, of all kernels alike: single instructions, which no compiler fuses in one kernel and
// not in another. The sums of parts lie `stride` apart.
__device__ __forceinline__ float sum_of_parts(const float* first, int stride) {
  float sum = first[0];
#pragma unroll
  for (int part = 1; part < kParts; ++part) sum = __fadd_rn(sum, first[part * stride]);
  return sum;
}
// What goes to z.
__device__ __forceinline__ float scaled_sum(float sum, bool normed, float factor, float scale) {
  if (normed) sum = __fmul_rn(sum, factor);
  return __fmul_rn(sum, scale);
}
// What goes to y.
__device__ __forceinline__ float with_rest(float value, bool biased, float bias, bool residual, float rest) {
  if (biased) value = __fadd_rn(value, bias);
  if (residual) value = __fadd_rn(value, rest);
  return value;
}

template <typename T, typename W, int kHalves>
class Decoder {
  const Rows<T>& rows_;
  const Group& group_;
  const Cut& cut_;
  uint8_t* const memory_;
  const int rank_;  // of the block in its cluster
  const int cluster_, clusters_;
  const int thread_, warp_, lane_;

 public:
  __device__ Decoder(const Rows<T>& rows, const Group& group, const Cut& cut, uint8_t* memory, int block, int thread)
      : rows_(rows), group_(group), cut_(cut), memory_(memory), rank_(block % cut.cluster), cluster_(block / cut.cluster),
        clusters_(cut.blocks / cut.cluster), thread_(thread), warp_(thread / 32), lane_(thread % 32) {}

  __device__ __forceinline__ void run() {
    const int parts = kParts / cut_.cluster;  // that a block sums of a tile
    const Share share{cluster_, clusters_, warp_ / parts, rank_ * parts + warp_ % parts};
    Ring<W> ring(group_, cut_, share, memory_, warp_, lane_);
    if (cut_.cluster > 1) arrive_at_cluster();
    wait_for_previous_kernel();
    let_next_kernel_start();
    stage_x<T, W>(rows_, group_, cut_, memory_, rank_, thread_);
    if (cut_.cluster > 1) {
      wait_for_cluster();  // all of its blocks are there
      if (rows_.prologue == Prologue::kNorm) share_squares(rows_, group_.product[0], cut_, memory_, rank_, thread_);
    }
    __syncthreads();
    float factor = 1.0f;
    int buffer = 0;
#pragma unroll 1
    for (int at = cluster_; at < cut_.groups; at += clusters_) {
      const Product& p = group_.product[member_of(group_, at)];
      const int first_tile = (at - p.first_group) * cut_.cluster, tile = first_tile + rank_;
      const int row = tile * kTileRows + thread_ % kTileRows, m = thread_ / kTileRows;
      const bool mine = m < rows_.count && row < p.rows;
      const Outlet outlet = mine ? outlet_of_row(p, row, m) : Outlet{};
      if (has_tile(p, first_tile + share.tile)) sum_part(p, share, ring, buffer);
      meet();
      if (rows_.prologue == Prologue::kNorm && at == cluster_ && m < rows_.count) factor = factor_of(p, m);
      if (mine) finish(p, row, m, buffer, factor, outlet);
      buffer ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void meet() const {
    if (cut_.cluster > 1) {
      arrive_at_cluster();
      wait_for_cluster();
    } else {
      __syncthreads();
    }
  }

  __device__ __forceinline__ float* partial(int buffer, int part, int m) const {
    return reinterpret_cast<float*>(memory_ + cut_.partial) + ((buffer * kParts + part) * rows_.count + m) * kPartStride;
  }

  __device__ __forceinline__ Outlet outlet_of_row(const Product& p, int row, int m) const {
    Outlet outlet = outlet_of(p, row);
    if ((p.destination & kToY) != 0 && rows_.residual != nullptr)
      outlet.residual = Format<T>::widen(rows_.residual[m * rows_.residual_stride + p.y_col + outlet.column]);
    return outlet;
  }

  // The warp's part of its tile; the sums go to the block that stores the tile.
  __device__ __forceinline__ void sum_part(const Product& p, const Share& share, Ring<W>& ring, int buffer) {
    const int first = first_step(p.steps, share.part), end = first_step(p.steps, share.part + 1);
    const int g = lane_ / 4, t = lane_ % 4;
    Operand<kHalves> x;
    const int column = p.staged + first * kStepColumns<W> - slice_of<W>(p, cut_.cluster, rank_).first;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      // Rows beyond the last repeat it; their sums are not stored.
      const int m = g + 8 * half < rows_.count ? g + 8 * half : rows_.count - 1;
      x.row[half] = memory_ + cut_.x + m * cut_.x_stride + column * 2 + t * 16;
    }
    using TileStep = Step<T, W>;
    constexpr int kBlocks = Packing<W>::kBlocks;
    const bool ragged = kBlocks > 1 && end == p.steps && p.last_blocks != kBlocks;  // the part's last step
    const int whole = end - (ragged ? 1 : 0);
    Sums<kHalves> sums;
    int step = first;
#pragma unroll 1
    for (; step + kStepsPerCopy <= whole; step += kStepsPerCopy) {
      const uint8_t* weights = ring.next();
#pragma unroll
      for (int i = 0; i < kStepsPerCopy; ++i) {
        TileStep::template multiply<true>(weights + i * kFullStep<W>, kBlocks, lane_, x, sums);
        x.forward(kStepColumns<W>);
      }
      ring.done();
    }
    if (step < end) {  // what the last copy brings, if it is not all of that
      const uint8_t* weights = ring.next();
#pragma unroll 1
      for (; step < whole; ++step, weights += kFullStep<W>) {
        TileStep::template multiply<true>(weights, kBlocks, lane_, x, sums);
        x.forward(kStepColumns<W>);
      }
      if (ragged) TileStep::template multiply<false>(weights, p.last_blocks, lane_, x, sums);
      ring.done();
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = 8 * half + 2 * t + i % 2;
        if (m >= rows_.count) continue;
        float* to = partial(buffer, share.part, m) + g + i / 2 * 8;
        if (cut_.cluster > 1) {
          store_in_block(to, share.tile, sums.of[half][i]);
        } else {
          *to = sums.of[half][i];
        }
      }
  }

  // 1 / rms of a row of x.
  __device__ __forceinline__ float factor_of(const Product& p, int m) const {
    const int chunks = (p.cols + kSquaredColumns - 1) / kSquaredColumns;
    return inverse_rms(reinterpret_cast<const float*>(memory_ + cut_.squares) + m * chunks, chunks, p.cols, rows_.eps);
  }

  // The sums of the parts of one element, added in order, and the value stored: to z, and with bias and residual to y.
  __device__ __forceinline__ void finish(const Product& p, int row, int m, int buffer, float factor,
                                         const Outlet& outlet) const {
    const float sum = sum_of_parts(partial(buffer, 0, m) + row % kTileRows, rows_.count * kPartStride);
    const float value = scaled_sum(sum, rows_.prologue == Prologue::kNorm, factor, outlet.scale);
    if (p.destination & kToZ) rows_.z[m * rows_.z_stride + p.z_col + row] = Format<T>::narrow(value);
    if (p.destination & kToY)
      rows_.y[m * rows_.y_stride + p.y_col + outlet.column] =
          Format<T>::narrow(with_rest(value, p.bias != nullptr, outlet.bias, rows_.residual != nullptr, outlet.residual));
  }
};

template <typename T, typename W, int kHalves>
__global__ void __launch_bounds__(kThreads, 2)
    decode_products_kernel(const __grid_constant__ Rows<T> rows, const __grid_constant__ Group group,
                  const __grid_constant__ Cut cut) {
  static_assert(kHalves == 1 || kHalves == 2, "up to 8, or up to 16 rows of x");
  static_assert(kThreads == kTileRows * kMaxRows && kWarps == kParts, "a thread for every element, a warp for every part");
  Decoder<T, W, kHalves>(rows, group, cut, shared_memory(), static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x)).run();
}

// ------------------------------------------------------------------------------------------------- SwiGLU, alone

// y [M, columns] = silu(gate) * up of x [M, 2 columns], with the bits of the prologue above. Grid: (columns, rows).
template <typename T>
__global__ void __launch_bounds__(256) swiglu_kernel(const T* x, int64_t x_stride, T* y, int64_t y_stride, int columns) {
  const int k = static_cast<int>(blockIdx.x * 256 + threadIdx.x), m = static_cast<int>(blockIdx.y);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (k >= columns) return;
  const T* row = x + m * x_stride;
  y[m * y_stride + k] = Format<T>::narrow(gated(Format<T>::widen(row[k]), Format<T>::widen(row[columns + k])));
}

}  // namespace cai
