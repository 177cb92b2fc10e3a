// What a launch of the linears takes that multiplies many rows of x.
#pragma once

#include "arguments.cuh"

namespace cai {

constexpr int kTilesOfGroup = 8;  // that a block, or a cluster, sums together: one to each of its warps that multiply
constexpr int kManyThreads = 32 * (kTilesOfGroup + 4);  // of four warps more, which give their registers away, one asks for copies
constexpr int kMostStages = 8;
constexpr int kRingStart = 1024;  // in shared memory; barriers lie before it

// T is the activation type of residual and y. In the products of such a launch x_col and z_col are multiples of kBlockColumns.
template <typename T>
struct ManyRows {
  const uint8_t* x;     // panels
  const float* factor;  // [count] what sums are multiplied by, or null
  const T* residual;    // by column of y, or null
  uint8_t* z;           // panels
  T* y;
  int64_t residual_stride, y_stride;
  int32_t count;
  int32_t x_blocks, z_blocks;  // of columns, in a panel
};

// Blocks of a cluster that each take all parts: two groups of tiles, two runs of rows of x. Each brings half of the weights and
// half of the rows that it needs, for another block as well, and gets the other halves.
constexpr int kShared = 4;

// How such a launch is cut up. Either a block takes all parts of a group of tiles for its rows of x, and clusters of kShared
// go through the product together; or a cluster of eight takes one group, each block one part of all its tiles, and the sums
// meet in the block that stores the tile.
struct ManyCut {
  int32_t groups;      // of kTilesOfGroup tiles; with clusters of kShared, of twice as many
  int32_t row_blocks;  // runs of the kernel's rows of x; with clusters of kShared, pairs of them
  int32_t runs;        // of the kernel's rows of x
  int32_t blocks;      // of the grid
  int32_t stages, stage_bytes;
  int32_t partial;  // where the sums of parts are in shared memory
  int32_t bytes;
};

}  // namespace cai
