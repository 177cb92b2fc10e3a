// One step of a tile times the rows of x, on the tensor cores. The instruction's 16 rows are the tile's, its eight columns
// rows of x; of every block of 32 columns the first instruction takes columns 8 t to 8 t + 3 of each lane t, the second the
// rest. Weights are widened in registers, exactly.
#pragma once

#include "packed.cuh"
#include "unpack.cuh"

namespace cai {

// Sums by x's row and tile's row as the instruction leaves them, see `multiply_accumulate`; a half has eight rows of x.
template <int kHalves>
struct Sums {
  float of[kHalves][4] = {};
};

// What a lane reads of x: rows g and g + 8, from column 8 t of a block on.
template <int kHalves>
struct Operand {
  const uint8_t* row[kHalves];

  __device__ __forceinline__ void forward(int columns) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) row[half] += 2 * columns;
  }
};

template <typename T, int kHalves>
__device__ __forceinline__ void multiply_block(const uint32_t (&w)[2][4], const Operand<kHalves>& x, int block,
                                               Sums<kHalves>& sums) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const uint4 v = *reinterpret_cast<const uint4*>(x.row[half] + block * kBlockColumns * 2);
    const uint32_t first[4] = {w[0][0], w[1][0], w[0][1], w[1][1]}, second[4] = {w[0][2], w[1][2], w[0][3], w[1][3]};
    multiply_accumulate<T>(sums.of[half], first, v.x, v.y);
    multiply_accumulate<T>(sums.of[half], second, v.z, v.w);
  }
}

// The words of a lane's columns in one block, of rows g and g + 8: kWords of each. A step with all its blocks has a lane's
// words of all of them side by side; so has a shorter one, which has fewer.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* step, int blocks, int block, int lane, uint32_t (&words)[2][kWords]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* at = step + ((half * 32 + lane) * blocks + block) * kWords * 4;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[half][i] = *reinterpret_cast<const uint32_t*>(at + 4 * i);
  }
}

// A lane's words of a step with all its blocks, and of those one block's.
__device__ __forceinline__ void load_step(const uint8_t* step, int lane, uint32_t (&all)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 v = *reinterpret_cast<const uint4*>(step + (half * 32 + lane) * 16);
    all[half][0] = v.x, all[half][1] = v.y, all[half][2] = v.z, all[half][3] = v.w;
  }
}
template <int kWords>
__device__ __forceinline__ void pick_words(const uint32_t (&all)[2][4], int block, uint32_t (&words)[2][kWords]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[half][i] = all[half][block * kWords + i];
}

// 16-bit weights, of x's type, and int8.
template <typename T, typename W>
struct Step {
  // kWhole: all blocks are there, known to the compiler, which reads a lane's words at once.
  template <bool kWhole, int kHalves>
  static __device__ __forceinline__ void multiply(const uint8_t* step, int blocks, int lane, const Operand<kHalves>& x,
                                                  Sums<kHalves>& sums) {
    constexpr int kBlocks = Packing<W>::kBlocks, kWords = 4 / kBlocks;
    uint32_t all[2][4];
    if constexpr (kWhole) load_step(step, lane, all);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (!kWhole && block >= blocks) break;
      uint32_t words[2][kWords], w[2][4];
      if constexpr (kWhole) {
        pick_words<kWords>(all, block, words);
      } else {
        load_words<kWords>(step, blocks, block, lane, words);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (is_same<W, int8_t>) {
          unpack_int8<T>(words[half][0], w[half][0], w[half][1]);
          unpack_int8<T>(words[half][1], w[half][2], w[half][3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) w[half][i] = words[half][i];
        }
      }
      multiply_block<T, kHalves>(w, x, block, sums);
    }
  }
};

// int4: the sums of a group's products are scaled, not its weights.
template <typename T, int kGroup, bool kZero>
struct Step<T, Int4<kGroup, kZero>> {
  template <bool kWhole, int kHalves>
  static __device__ __forceinline__ void multiply(const uint8_t* step, int blocks, int lane, const Operand<kHalves>& x,
                                                  Sums<kHalves>& sums) {
    constexpr int kBlocks = 4, kBlocksOfGroup = kGroup / kBlockColumns, kBlockBytes = kStepBytes / kBlocks;
    const int g = lane / 4;
    const uint8_t* scales = step + blocks * kBlockBytes;
    const uint8_t* zeros = scales + (blocks + kBlocksOfGroup - 1) / kBlocksOfGroup * kTileRows * 2;
    uint32_t all[2][4];
    if constexpr (kWhole) load_step(step, lane, all);
    Sums<kHalves> part;
    uint32_t offset[2] = {int4_offset<T>(8), int4_offset<T>(8)};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (!kWhole && block >= blocks) break;
      const int group = block / kBlocksOfGroup;
      if (kZero && block % kBlocksOfGroup == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) offset[half] = int4_offset<T>(zeros[group * kTileRows + 8 * half + g]);
      }
      uint32_t words[2][1], w[2][4];
      if constexpr (kWhole) {
        pick_words<1>(all, block, words);
      } else {
        load_words<1>(step, blocks, block, lane, words);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) unpack_int4<T>(words[half][0], offset[half], w[half]);
      multiply_block<T, kHalves>(w, x, block, part);
      if ((block + 1) % kBlocksOfGroup != 0 && (kWhole || block + 1 < blocks)) continue;
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const auto* at = reinterpret_cast<const __nv_bfloat16*>(scales + (group * kTileRows + 8 * side + g) * 2);
        const float scale = Format<__nv_bfloat16>::widen(*at);
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int i = 2 * side; i < 2 * side + 2; ++i) {
            sums.of[half][i] = fmaf(scale, part.of[half][i], sums.of[half][i]);
            part.of[half][i] = 0.0f;
          }
      }
    }
  }
};

}  // namespace cai
