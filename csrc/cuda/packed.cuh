// How the decode kernel keeps a core: kernels/cuda_packing.py packs it, once, when a model is loaded.
//
// A tile is 16 rows. Its columns come in steps of 1 KiB: 32 columns of 16-bit weights, 64 of int8, 128 of int4, that is one,
// two or four blocks of 32 columns. Tile after tile and step after step lie end to end, so that whatever part of a tile a
// warp takes is one run of bytes. In a step lane 4 g + t of a warp has two runs of 16 bytes, of rows g and g + 8: from each
// block of 32 columns it has columns 8 t to 8 t + 7. The last step of a tile ends with the block of its last column; zeros
// fill up the block, and the rows of the last tile.
//
//     step      [2 halves][32 lanes][blocks][8 columns] weights, then of int4 [groups][16 rows] scales in bfloat16 and, of
//               stores with zero points, [groups][16 rows] of those in a byte each
//     int4      a lane's 8 columns are one word: column 2 i in bits 4 i, column 2 i + 1 in bits 16 + 4 i
//
// The eight parts of a tile are runs of its steps. Every part is summed by a warp on its own, front to back, and the sums of
// parts are added in order. So the order of every sum follows from columns and store alone.
#pragma once

#include <cstdint>

namespace cai {

constexpr int kTileRows = 16;
constexpr int kParts = 8;
constexpr int kStepBytes = 1024;  // of weights
constexpr int kBlockColumns = 32;

// The store of an int4 core.
template <int kGroup, bool kZero>
struct Int4 {};

template <typename W>
struct Packing {
  static constexpr int kBlocks = 2 / static_cast<int>(sizeof(W));  // of a step
  static constexpr int kGroup = 0, kExtra = 0;
  static constexpr bool kZero = false;
};
template <int kColumns, bool kZeroPoints>
struct Packing<Int4<kColumns, kZeroPoints>> {
  static constexpr int kBlocks = 4;
  static constexpr int kGroup = kColumns;
  static constexpr bool kZero = kZeroPoints;
  static constexpr int kExtra = kTileRows * (kZero ? 3 : 2);  // bytes of a group
};

template <typename W>
constexpr int kStepColumns = Packing<W>::kBlocks * kBlockColumns;

// Bytes of a step that has this many blocks.
template <typename W>
constexpr int bytes_of_step(int blocks) {
  using P = Packing<W>;
  const int groups = P::kGroup == 0 ? 0 : (blocks * kBlockColumns + P::kGroup - 1) / (P::kGroup == 0 ? 1 : P::kGroup);
  return blocks * (kStepBytes / P::kBlocks) + groups * P::kExtra;
}
template <typename W>
constexpr int kFullStep = bytes_of_step<W>(Packing<W>::kBlocks);

// Of so many columns.
template <typename Int>
constexpr Int blocks_of(Int columns) {
  return (columns + kBlockColumns - 1) / kBlockColumns;
}

// The steps of a tile, and the blocks of its last one.
struct TileSteps {
  int32_t steps, last_blocks;
};
template <typename W>
constexpr TileSteps steps_of(int columns) {
  const int blocks = blocks_of(columns), full = Packing<W>::kBlocks;
  const int steps = (blocks + full - 1) / full;
  return {steps, blocks - (steps - 1) * full};
}
template <typename W>
constexpr int64_t bytes_of_tile(TileSteps t) {
  return static_cast<int64_t>(t.steps - 1) * kFullStep<W> + bytes_of_step<W>(t.last_blocks);
}

// The first step of a part; of part 8 the end.
constexpr int first_step(int steps, int part) { return steps * part / kParts; }

}  // namespace cai
