// A stage of copies times kRows rows of x in panels: what a warp does with the weights of its tile, sums in the order of
// step.cuh.
#pragma once

#include "many_arguments.cuh"
#include "panels.cuh"
#include "step.cuh"

namespace cai {

// A stage brings so many blocks of columns at most; where eight blocks share a group of tiles, half as many if a step has them.
template <typename W, bool kSplit>
constexpr int kStageBlocks = kSplit && Packing<W>::kBlocks <= 2 ? 2 : 4;
template <typename W, bool kSplit>
constexpr int kStageSteps = kStageBlocks<W, kSplit> / Packing<W>::kBlocks;

// By eight rows of x, as `multiply_rows` leaves them.
template <int kRows>
using RowSums = float[kRows / 8][4];

// A block's weights of a tile as operands: of the first and of the second half of its columns.
struct Operands {
  uint32_t of[2][4];
};

template <typename T, typename W, int kWords>
__device__ __forceinline__ Operands widened(const uint32_t (&words)[2][kWords], const uint32_t (&offset)[2]) {
  uint32_t w[2][4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kWords == 1) {
      unpack_int4<T>(words[half][0], offset[half], w[half]);
    } else if constexpr (kWords == 2) {
      unpack_int8<T>(words[half][0], w[half][0], w[half][1]);
      unpack_int8<T>(words[half][1], w[half][2], w[half][3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[half][i] = words[half][i];
    }
  }
  return {{{w[0][0], w[1][0], w[0][1], w[1][1]}, {w[0][2], w[1][2], w[0][3], w[1][3]}}};
}

template <typename T, int kRows, int kBlocks>
__device__ __forceinline__ void multiply_blocks(const Operands (&w)[kBlocks], const uint8_t* x, RowSums<kRows>& sums, bool add) {
  begin_products();
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply_rows<T, kRows>(sums, w[i].of[half], x + i * kRows * kPanelRowBytes, half, add || i + half > 0);
  wait_for_products();
}

// 16-bit weights, of x's type, and int8.
template <typename T, typename W, int kRows>
struct ManyStep {
  static constexpr int kBlocks = Packing<W>::kBlocks, kWords = 4 / kBlocks;

  // A whole stage of kSteps steps.
  template <int kSteps>
  static __device__ __forceinline__ void whole(const uint8_t* weights, const uint8_t* x, int lane, RowSums<kRows>& sums,
                                               bool add) {
    constexpr uint32_t kNoOffset[2] = {};
#pragma unroll
    for (int first = 0; first < kSteps * kBlocks; first += kBlocksAhead) {
      Operands w[kBlocksAhead];
#pragma unroll
      for (int i = 0; i < kBlocksAhead; ++i) {
        const int step = (first + i) / kBlocks, block = (first + i) % kBlocks;
        uint32_t all[2][4];
        load_step(weights + step * kFullStep<W>, lane, all);
        uint32_t words[2][kWords];
        pick_words<kWords>(all, block, words);
        w[i] = widened<T, W>(words, kNoOffset);
      }
      multiply_blocks<T, kRows>(w, x + first * kRows * kPanelRowBytes, sums, add || first > 0);
    }
  }

  // A step of which `blocks` are there.
  static __device__ __forceinline__ void some(const uint8_t* step, const uint8_t* x, int blocks, int lane,
                                              RowSums<kRows>& sums, bool add) {
    constexpr uint32_t kNoOffset[2] = {};
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      uint32_t words[2][kWords];
      load_words<kWords>(step, blocks, block, lane, words);
      const Operands w[1] = {widened<T, W>(words, kNoOffset)};
      multiply_blocks<T, kRows>(w, x + block * kRows * kPanelRowBytes, sums, add || block > 0);
    }
  }
};

// int4: the sums of a group's products are scaled, not its weights.
template <typename T, int kGroup, bool kZero, int kRows>
struct ManyStep<T, Int4<kGroup, kZero>, kRows> {
  using W = Int4<kGroup, kZero>;
  static constexpr int kBlocks = 4, kGroupBlocks = kGroup / kBlockColumns;

  template <int kSteps>
  static __device__ __forceinline__ void whole(const uint8_t* weights, const uint8_t* x, int lane, RowSums<kRows>& sums,
                                               bool add) {
    static_assert(kSteps == 1, "a step of int4 fills a stage");
    step<true>(weights, x, kBlocks, lane, sums, add);
  }

  static __device__ __forceinline__ void some(const uint8_t* weights, const uint8_t* x, int blocks, int lane,
                                              RowSums<kRows>& sums, bool add) {
    step<false>(weights, x, blocks, lane, sums, add);
  }

 private:
  template <bool kWhole>
  static __device__ __forceinline__ void step(const uint8_t* weights, const uint8_t* x, int blocks, int lane,
                                              RowSums<kRows>& sums, bool add) {
    const int g = lane / 4;
    const uint8_t* scales = weights + blocks * (kStepBytes / kBlocks);
    const uint8_t* zeros = scales + (blocks + kGroupBlocks - 1) / kGroupBlocks * kTileRows * 2;
    uint32_t all[2][4];
    if constexpr (kWhole) load_step(weights, lane, all);
    RowSums<kRows> part;
#pragma unroll
    for (int group = 0; group < kBlocks / kGroupBlocks; ++group) {
      if (!kWhole && group * kGroupBlocks >= blocks) break;
      uint32_t offset[2] = {int4_offset<T>(8), int4_offset<T>(8)};
      if constexpr (kZero) {
#pragma unroll
        for (int half = 0; half < 2; ++half) offset[half] = int4_offset<T>(zeros[group * kTileRows + 8 * half + g]);
      }
      constexpr int kAtOnce = kWhole && kGroupBlocks > 1 ? kBlocksAhead : 1;
#pragma unroll
      for (int in = 0; in < kGroupBlocks; in += kAtOnce) {
        const int first = group * kGroupBlocks + in;
        if (!kWhole && first >= blocks) break;
        Operands w[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          uint32_t words[2][1];
          if constexpr (kWhole) {
            pick_words<1>(all, first + i, words);
          } else {
            load_words<1>(weights, blocks, first + i, lane, words);
          }
          w[i] = widened<T, W>(words, offset);
        }
        multiply_blocks<T, kRows>(w, x + first * kRows * kPanelRowBytes, part, in > 0);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const auto* at = reinterpret_cast<const __nv_bfloat16*>(scales + (group * kTileRows + 8 * side + g) * 2);
        const float scale = Format<__nv_bfloat16>::widen(*at);
#pragma unroll
        for (int eight = 0; eight < kRows / 8; ++eight)
#pragma unroll
          for (int i = 2 * side; i < 2 * side + 2; ++i)
            sums[eight][i] = fmaf(scale, part[eight][i], add || group > 0 ? sums[eight][i] : 0.0f);
      }
    }
  }
};

}  // namespace cai
