// What a tile of matrix_products.cuh is: its sizes, the shared memory of a block, the copies that fill it.
#pragma once

#include "device.cuh"
#include "group.cuh"

namespace cai {

constexpr int kWarpsPerTile = 8;
constexpr int kTileThreads = 32 * kWarpsPerTile;
constexpr int kTileRows = 16;        // weight rows: two operands of eight
constexpr int kChunkBytes = 64;      // of a weight row: 16 from each of the four lanes that share it
constexpr int kStages = 4;           // chunks in a warp's ring
constexpr int kFusedSwigluRows = 2;  // more rows of x than this are gated once, by a kernel of their own

// What x goes through first. kSwiglu: x holds gate and up side by side.
enum class Prologue : int { kNone, kNorm, kSwiglu };

// Blocks that must fit a multiprocessor, which bounds the registers of a thread.
template <typename W, int kHalves, Prologue kPrologue>
constexpr int kBlocksPerProcessor =
    (is_same<W, Int4> && (kHalves == 2 || kPrologue == Prologue::kNorm)) ||
            (is_same<W, int8_t> && kHalves == 2 && kPrologue == Prologue::kNorm)
        ? 2
        : 3;

template <typename W>
constexpr int kChunkColumns = 4 * Stored<W>::kPer16Bytes;  // of a row

template <typename T, typename W, int kHalves, Prologue kPrologue>
struct alignas(16) TileMemory {
  static constexpr bool kInt4 = is_same<W, Int4>;
  static constexpr int kWeightBytes = kTileRows * kChunkBytes;
  static constexpr int kSlotBytes = kWeightBytes + (kInt4 ? kTileRows * (8 + 4) : 0);  // with scales and zero points
  uint8_t ring[kWarpsPerTile][kStages][kSlotBytes];
  float partial[kWarpsPerTile][8 * kHalves][kTileRows];
  float squares[kPrologue == Prologue::kNorm ? kWarpsPerTile : 1][8 * kHalves];
  float factor[8 * kHalves];  // of the norm, by row of x
  alignas(16) T gated[kPrologue == Prologue::kSwiglu ? kWarpsPerTile : 1][kFusedSwigluRows][kChunkColumns<W>];
};

// `BYTES` at a time, so many that `from` is aligned to; `valid` of 16 bytes are read, the rest become zero.
__device__ __forceinline__ void copy_16_bytes(uint8_t* to, const uint8_t* from, int valid, int at_a_time) {
  if (at_a_time == 16) {
    copy_async<16>(to, from, valid);
  } else if (at_a_time == 8) {
    for (int i = 0; i < 16; i += 8) {
      const int part = valid - i < 0 ? 0 : valid - i < 8 ? valid - i : 8;
      copy_async<8>(to + i, part > 0 ? from + i : from, part);
    }
  } else if (at_a_time == 4) {
    for (int i = 0; i < 16; i += 4) {
      const int part = valid - i < 0 ? 0 : valid - i < 4 ? valid - i : 4;
      copy_async<4>(to + i, part > 0 ? from + i : from, part);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) to[i] = i < valid ? from[i] : 0;
  }
}

}  // namespace cai
