// Sixteen lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cai::avx512 {

struct Simd {
  static constexpr int kWidth = 16;
  static constexpr int kTileM = 6;  // 6 x 4 accumulators, four rows of w and one of x in 32 registers
  static constexpr const char* kName = "avx512";

  using V = __m512;
  struct Bf16 {
    uint16_t bits;
  };
  struct Fp16 {
    uint16_t bits;
  };

  static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }
  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float s) { return _mm512_set1_ps(s); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load_part(const float* p, int n) {
    return _mm512_maskz_loadu_ps(n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1u), p);
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  // Whole numbers of 32 bits (see sampling.inl).
  using Whole = __m512i;
  static Whole whole(V v) { return _mm512_cvttps_epi32(v); }  // the fractions cut off
  static Whole whole1(int32_t s) { return _mm512_set1_epi32(s); }
  static Whole load_whole(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_whole(int32_t* p, Whole w) { _mm512_storeu_si512(p, w); }
  static Whole add(Whole a, Whole b) { return _mm512_add_epi32(a, b); }
  static Whole max(Whole a, Whole b) { return _mm512_max_epi32(a, b); }
  static bool any_from(Whole w, Whole lowest) { return _mm512_cmpge_epi32_mask(w, lowest) != 0; }
  // Writes the lanes of w that are at least `lowest`, and their ids; returns how many. Both outputs have room for all.
  static int keep_from(Whole w, Whole lowest, Whole id, int32_t* ids, int32_t* kept) {
    const __mmask16 keep = _mm512_cmpge_epi32_mask(w, lowest);
    // Compressed in a register, not to memory: that is microcode on Zen 4.
    _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(keep, id));
    _mm512_storeu_si512(kept, _mm512_maskz_compress_epi32(keep, w));
    return __builtin_popcount(keep);
  }
  // Sums of lanes as unsigned numbers, in 64 bits.
  using Sums = __m512i;
  static Sums sums_zero() { return _mm512_setzero_si512(); }
  static Sums sums_add(Sums sums, Whole w) {
    const __m512i low = _mm512_and_si512(w, _mm512_set1_epi64(0xffffffff));
    return _mm512_add_epi64(_mm512_add_epi64(sums, low), _mm512_srli_epi64(w, 32));
  }
  static int64_t sums_total(Sums sums) { return _mm512_reduce_add_epi64(sums); }
  // v times 2^n, where n is in the low bits of the float `shifted` = 1.5 x 2^23 + n. v and the product are normal numbers.
  static V times_pow2(V v, V shifted) {
    const __m512i exponents = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), exponents));
  }
  static V load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // int4: words of eight half bytes (see int4.inl).
  static constexpr int kInt4Chains = 8, kInt4Units = 8, kInt4TileM = 8;  // more rows are slower: a load per FMA
  using Words = __m512i;
  static Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  // Half byte J of each word times 16^J; of J = 7 as it is.
  template <int J>
  static V half_byte(Words w) {
    if constexpr (J == 7) return _mm512_cvtepi32_ps(_mm512_srli_epi32(w, 28));
    return _mm512_cvtepi32_ps(_mm512_and_si512(w, _mm512_set1_epi32(15 << (J % 7 * 4))));
  }
  // int8 activations (int8_rows.inl). Rounds 16 numbers from -127 to 127 to codes; returns the codes' sum.
  static int32_t store_codes(int8_t* p, const V v[1]) {
    const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v[0]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    const __m128i halves = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(_mm_add_epi32(halves, _mm_unpackhi_epi64(halves, halves))) - 16 * 128;
  }
  static constexpr int kQuadsTileM = 12;
  // Adds one group of MT rows of x times 16 rows of weights: four vectors of quads.
  template <int MT>
  static void add_group(V (&total)[MT][1], const uint8_t* w, const int8_t* codes, const CodeShare* shares) {
    struct Quad {
      int8_t code[4];
    };
    __m512i quads[4];
    for (int q = 0; q < 4; ++q) quads[q] = _mm512_loadu_si512(w + q * 64);
#pragma GCC unroll 16
    for (int m = 0; m < MT; ++m) {
      const auto* x = reinterpret_cast<const Quad*>(codes + m * kCodeGroup);
      __m512i sum = _mm512_set1_epi32(shares[m].start);
      // Not the intrinsic: GCC 12 copies every sum before it and spills the copies.
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(quads[q]), "m"(x[q]));
      total[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(shares[m].scale), total[m][0]);
    }
  }
  static V load(const Bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static V load(const Fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(Bf16* p, V v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
  }
  static void store(Fp16* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void hold(V&) {}
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V pow2i(V n) {
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
  }
  static __m256 fold(V a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static float sum(V a) {
    __m256 f = fold(a);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float maximum(V a) { return _mm512_reduce_max_ps(a); }
  static void maximum4(V a, V b, V c, V d, float out[4]) {
    const auto fold = [](V v) { return _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    const auto pair = [](__m256 v, __m256 w) { return _mm256_max_ps(_mm256_unpacklo_ps(v, w), _mm256_unpackhi_ps(v, w)); };
    const __m256 ac = pair(fold(a), fold(c)), bd = pair(fold(b), fold(d)), abcd = pair(ac, bd);
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  // sum4 of a and of b, with the same tree of sums and fewer instructions.
  static void sum8(const V a[4], const V b[4], float* sums_a, float* sums_b) {
    // The upper half of each vector onto the lower: a's sums in the lower half, b's in the upper.
    const auto halves = [](V low, V high) {
      return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, low, high), _mm512_shuffle_f32x4(low, high, 0x4e));
    };
    const auto neighbours = [](V low, V high) {
      return _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
    };
    const V pairs01 = neighbours(halves(a[0], b[0]), halves(a[1], b[1]));
    const V pairs23 = neighbours(halves(a[2], b[2]), halves(a[3], b[3]));
    const V quarters = neighbours(pairs01, pairs23);
    const V sums = _mm512_add_ps(quarters, _mm512_shuffle_f32x4(quarters, quarters, 0xb1));
    _mm_storeu_ps(sums_a, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(sums_b, _mm512_extractf32x4_ps(sums, 2));
  }
  static void sum4(V a, V b, V c, V d, float out[4]) {
    __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
    __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
};

}  // namespace cai::avx512
