// Rows of x into panels (panels.cuh), through the norm or the gate before a linear, with the bits that the decode kernel gives
// them: a launch ahead of the products of many rows.
#pragma once

#include "staging.cuh"

namespace cai {

// Columns of a row that a block takes at least, except of a normed one: of that it takes all.
constexpr int kFillColumns = kWarps * kSquaredColumns;

// `parts` blocks for every row; one where there is a norm. panels: `blocks` of a row; of the norm's rows also 1 / rms, factor
// [rows]. Zeros fill up the last block of columns; rows beyond the last stay as they are, their products go nowhere.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_panels_kernel(const __grid_constant__ Rows<T> rows, uint8_t* panels, float* factor, int cols, int blocks, int parts) {
  auto* squares = reinterpret_cast<float*>(shared_memory());  // of the norm: [runs of kSquaredColumns]
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int m = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) % parts;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const T* from = rows.x + m * rows.x_stride;
  uint8_t* to = panels + static_cast<int64_t>(m / kPanelRows) * blocks * kPanelBlock + m % kPanelRows * kPanelRowBytes;
  const bool vector = rows.x_vector != 0, norm = rows.prologue == Prologue::kNorm;
  const int chunks = (cols + kSquaredColumns - 1) / kSquaredColumns;
  for (int chunk = part * kWarps + warp; chunk < chunks; chunk += parts * kWarps) {
    const int k = chunk * kSquaredColumns + 8 * lane, block = k / kBlockColumns, t = k % kBlockColumns / 8;
    Eight x = k < cols ? load_eight(from, k, cols, vector) : Eight{};
    if (norm) {
      const float sum = sum_of_squares<T>(x);
      if (lane == 0) squares[chunk] = sum;
    }
    if (block >= blocks) continue;
    if (norm) {
      x = scaled(x, k < cols ? load_eight(rows.norm, k, cols, vector) : Eight{});
    } else if (rows.prologue == Prologue::kSwiglu) {
      x = gated_eight<T>(x, k < cols ? load_eight(from + cols, k, cols, vector) : Eight{});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      *reinterpret_cast<uint32_t*>(to + static_cast<int64_t>(block) * kPanelBlock + panel_chunk(m, i) + 4 * t) = x.pair[i];
  }
  if (!norm) return;
  __syncthreads();
  if (thread == 0) factor[m] = inverse_rms(squares, chunks, cols, rows.eps);
}

}  // namespace cai
