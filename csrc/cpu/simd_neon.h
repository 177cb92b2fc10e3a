// Four lanes of NEON (ARMv8-A, AArch64). Only what every 64-bit ARM processor has: no dot product, bf16 or fp16 arithmetic
// extension, so nothing to detect at run time.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace cai::neon {

struct Simd {
  static constexpr int kWidth = 4;
  static constexpr int kTileM = 4;  // 4 x 4 accumulators, 4 rows of x and of w; at 5 x 4 GCC spills
  static constexpr const char* kName = "neon";

  using V = float32x4_t;
  struct Bf16 {
    uint16_t bits;
  };
  struct Fp16 {
    uint16_t bits;
  };

  static void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }
  static V zero() { return vdupq_n_f32(0.0f); }
  static V set1(float s) { return vdupq_n_f32(s); }
  static V load(const float* p) { return vld1q_f32(p); }
  static V load_part(const float* p, int n) {  // the first n floats, zero beyond
    if (n >= 4) return vld1q_f32(p);
    V v = vdupq_n_f32(0.0f);
    if (n == 3) v = vld1q_lane_f32(p + 2, v, 2);
    if (n >= 2) return vcombine_f32(vld1_f32(p), vget_high_f32(v));
    return n == 1 ? vld1q_lane_f32(p, v, 0) : v;
  }
  static void store(float* p, V v) { vst1q_f32(p, v); }
  // Whole numbers of 32 bits (see sampling.inl).
  using Whole = int32x4_t;
  static Whole whole(V v) { return vcvtq_s32_f32(v); }  // the fractions cut off
  static Whole whole1(int32_t s) { return vdupq_n_s32(s); }
  static Whole load_whole(const int32_t* p) { return vld1q_s32(p); }
  static void store_whole(int32_t* p, Whole w) { vst1q_s32(p, w); }
  static Whole add(Whole a, Whole b) { return vaddq_s32(a, b); }
  static Whole max(Whole a, Whole b) { return vmaxq_s32(a, b); }
  static bool any_from(Whole w, Whole lowest) { return vmaxvq_u32(vcgeq_s32(w, lowest)) != 0; }
  // Writes the lanes of w that are at least `lowest`, and their ids; returns how many. Both outputs have room for all.
  static int keep_from(Whole w, Whole lowest, Whole id, int32_t* ids, int32_t* kept) {
    int32_t values[4], numbers[4];
    uint32_t keep[4];
    vst1q_s32(values, w);
    vst1q_s32(numbers, id);
    vst1q_u32(keep, vshrq_n_u32(vcgeq_s32(w, lowest), 31));
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) {  // without a branch, which would be mispredicted
      ids[found] = numbers[i];
      kept[found] = values[i];
      found += keep[i];
    }
    return static_cast<int>(found);
  }
  // Sums of lanes as unsigned numbers, in 64 bits.
  using Sums = uint64x2_t;
  static Sums sums_zero() { return vdupq_n_u64(0); }
  static Sums sums_add(Sums sums, Whole w) { return vpadalq_u32(sums, vreinterpretq_u32_s32(w)); }
  static int64_t sums_total(Sums sums) { return static_cast<int64_t>(vaddvq_u64(sums)); }
  // v times 2^n, where n is in the low bits of the float `shifted` = 1.5 x 2^23 + n. v and the product are normal numbers.
  static V times_pow2(V v, V shifted) {
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(v), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23)));
  }

  // Four bytes to the tops of four 32-bit lanes, zeros below (an index past the table gives zero).
  static uint32x4_t bytes_at_top(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, sizeof four);
    const uint8x16_t bytes = vreinterpretq_u8_u32(vsetq_lane_u32(four, vdupq_n_u32(0), 0));
    const uint8x16_t to_top = {16, 16, 16, 0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3};
    return vreinterpretq_u32_u8(vqtbl1q_u8(bytes, to_top));
  }
  // The conversion divides by 2^24: two instructions where widening twice and converting takes three, and exact.
  static V load(const int8_t* p) { return vcvtq_n_f32_s32(vreinterpretq_s32_u32(bytes_at_top(p)), 24); }
  // int4: words of eight half bytes (see int4.inl).
  static constexpr int kInt4Chains = 8, kInt4Units = 2, kInt4TileM = 4;
  using Words = uint32x4_t;
  static Words load_words(const uint32_t* p) { return vld1q_u32(p); }
  // Half byte J of each word times 16^J; of J = 7 as it is.
  template <int J>
  static V half_byte(Words w) {
    if constexpr (J == 7) return vcvtq_f32_u32(vshrq_n_u32(w, 28));
    return vcvtq_f32_u32(vandq_u32(w, vdupq_n_u32(15u << (J % 7 * 4))));
  }
  static V load(const Bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static V load(const Fp16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static void store(Bf16* p, V v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  static void store(Fp16* p, V v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }
  static void hold(V&) {}
  static V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static V add(V a, V b) { return vaddq_f32(a, b); }
  static V sub(V a, V b) { return vsubq_f32(a, b); }
  static V mul(V a, V b) { return vmulq_f32(a, b); }
  static V div(V a, V b) { return vdivq_f32(a, b); }
  static V max(V a, V b) { return vmaxq_f32(a, b); }
  static V min(V a, V b) { return vminq_f32(a, b); }
  static V round(V a) { return vrndnq_f32(a); }
  static V pow2i(V n) {  // 2^n for whole n in [-126, 127]
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  static float sum(V a) {  // (0 + 1) + (2 + 3), as sum4
    const V pairs = vpaddq_f32(a, a);
    return vgetq_lane_f32(vpaddq_f32(pairs, pairs), 0);
  }
  static float maximum(V a) { return vmaxvq_f32(a); }
  static void maximum4(V a, V b, V c, V d, float out[4]) {
    vst1q_f32(out, vpmaxq_f32(vpmaxq_f32(a, b), vpmaxq_f32(c, d)));
  }
  // sum4 of a and of b.
  static void sum8(const V a[4], const V b[4], float* sums_a, float* sums_b) {
    sum4(a[0], a[1], a[2], a[3], sums_a);
    sum4(b[0], b[1], b[2], b[3], sums_b);
  }
  static void sum4(V a, V b, V c, V d, float out[4]) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }

  // int8 activations (int8_rows.inl). Rounds 16 numbers from -127 to 127 to codes; returns the codes' sum.
  static int32_t store_codes(int8_t* p, const V v[4]) {
    const int16x8_t low = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(v[0])), vmovn_s32(vcvtnq_s32_f32(v[1])));
    const int16x8_t high = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(v[2])), vmovn_s32(vcvtnq_s32_f32(v[3])));
    const int8x16_t codes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    vst1q_s8(p, codes);
    return vaddlvq_s8(codes);
  }
  static constexpr int kQuadsTileM = 2;
  // Adds one group of MT rows of x times 16 rows of weights: four times four vectors of quads.
  template <int MT>
  static void add_group(V (&total)[MT][4], const uint8_t* w, const int8_t* codes, const CodeShare* shares) {
    int32x4_t sum[MT][4];
    for (int m = 0; m < MT; ++m)
      for (int p = 0; p < 4; ++p) sum[m][p] = vdupq_n_s32(0);
    for (int q = 0; q < 4; ++q) {
      for (int p = 0; p < 4; ++p) {
        const int8x16_t weights = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + q * 64 + p * 16), vdupq_n_u8(128)));
        for (int m = 0; m < MT; ++m) {
          int32_t four;
          std::memcpy(&four, codes + m * kCodeGroup + q * 4, sizeof four);
          const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
          // Two products of a row, at most 127 * 128 each, are added once more as 32 bits.
          const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(weights)), high = vmull_high_s8(x, weights);
          sum[m][p] = vaddq_s32(sum[m][p], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
        }
      }
    }
    for (int m = 0; m < MT; ++m)
      for (int p = 0; p < 4; ++p) total[m][p] = vfmaq_n_f32(total[m][p], vcvtq_f32_s32(sum[m][p]), shares[m].scale);
  }
};

}  // namespace cai::neon
