// How many rows of x lie in memory for the kernels that take them all: in panels of 64 rows, and of each its columns in blocks of
// 32. A block is an image of what the tensor cores read from shared memory, so that bulk copies bring it there as it is.
//
//     block     [64 rows][4 chunks of 16 bytes]; zeros beyond the last column
//     chunk     of column c = 8 t + r (t, r from 0 on) chunk r / 2, in it the words of the four t, each two columns: chunks 0 and 1
//               are an instruction's slots 0 to 7 and 8 to 15, as packed.cuh has weights for it, 2 and 3 those of the second
//     swizzle   chunk c of row m lies at place c ^ (m / 2 % 4), so that eight rows' same chunk lies in different banks. It is
//               the pattern that the PTX ISA calls 64-byte swizzle; it follows addresses, so blocks begin at multiples of 512
//
// Panel after panel they lie end to end, [panel][block].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cai {

constexpr int kPanelRows = 64;
constexpr int kPanelRowBytes = 64;  // of a block
constexpr int kPanelBlock = kPanelRows * kPanelRowBytes;

// Of so many rows of x.
template <typename Int>
__host__ __device__ __forceinline__ constexpr Int panels_of(Int rows) {
  return (rows + kPanelRows - 1) / kPanelRows;
}

// Bytes from the start of a block's row to its chunk.
__host__ __device__ __forceinline__ constexpr int panel_chunk(int row, int chunk) { return (chunk ^ (row / 2 % 4)) * 16; }

// Of an element of a block, by its row and column there.
__host__ __device__ __forceinline__ constexpr int panel_offset(int row, int column) {
  return row * kPanelRowBytes + panel_chunk(row, column % 8 / 2) + column / 8 * 4 + column % 2 * 2;
}

// What a warp group's product is told of its second operand: where half a block lies, and how (PTX ISA, "Matrix descriptor").
// Eight rows of 64 bytes are the pattern that repeats, 512 bytes further with each; a half's chunks are 32 bytes further.
__host__ __device__ __forceinline__ constexpr uint64_t panel_descriptor(uint32_t block, int half) {
  constexpr uint64_t kSwizzle64 = 2, kEightRows = 8 * kPanelRowBytes;
  const uint64_t start = (block + 32u * half) & 0x3ffff;
  return start >> 4 | uint64_t{1} << 16 | (kEightRows >> 4) << 32 | kSwizzle64 << 62;
}

}  // namespace cai
