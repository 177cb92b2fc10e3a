// Stored weights to pairs of 16-bit numbers for the tensor cores, exactly, by the bits of the formats: an integer below the
// first bit of the mantissa is or-ed into the power of two whose last place is worth one, which is then subtracted.
#pragma once

#include "device.cuh"
#include "arguments.cuh"

namespace cai {

// 128 in bfloat16 and 1024 in half, whose last places are worth one, in both halves of a register.
template <typename T>
constexpr uint32_t kOneInLastPlace = is_same<T, __nv_bfloat16> ? 0x43004300u : 0x64006400u;

// Four int8 in a word -> the pairs (0, 1) and (2, 3).
template <typename T>
__device__ __forceinline__ void unpack_int8(uint32_t word, uint32_t& low, uint32_t& high) {
  const uint32_t pairs[2] = {permute_bytes(word, 0, 0x4140), permute_bytes(word, 0, 0x4342)};  // a byte, then zero
  uint32_t unpacked[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (is_same<T, __nv_bfloat16>) {
      // Seven bits fit: 128 + the low seven, less 128, or 256 where the sign is set (the sign's place is the exponent's).
      const uint32_t seven = masked_or(pairs[i], 0x007f007fu, 0x43004300u);
      const uint32_t sign = masked_or(pairs[i], 0x00800080u, 0x43004300u);
      unpacked[i] = subtract_pairs<T>(seven, sign);
    } else {
      unpacked[i] = subtract_pairs<T>((pairs[i] ^ 0x00800080u) | 0x64006400u, 0x64806480u);  // 1024 + 128
    }
  }
  low = unpacked[0];
  high = unpacked[1];
}

// `zero` (0 to 15) as what `unpack_int4` subtracts.
template <typename T>
__device__ __forceinline__ uint32_t int4_offset(uint32_t zero) {
  return kOneInLastPlace<T> | zero | zero << 16;
}

// Eight codes in a word -> code - zero as the pairs (0, 1), (2, 3), (4, 5), (6, 7); see packed.cuh.
template <typename T>
__device__ __forceinline__ void unpack_int4(uint32_t word, uint32_t offset, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = subtract_pairs<T>(masked_or(word >> (4 * i), 0x000f000fu, kOneInLastPlace<T>), offset);
}

}  // namespace cai
