// Eight lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace cai::avx2 {

// For each set of lanes, as bits: the numbers of its lanes in order, then zeros.
struct LaneOrder {
  uint8_t lanes[256][8];
};
constexpr LaneOrder lane_order() {
  LaneOrder order{};
  for (int set = 0; set < 256; ++set)
    for (int lane = 0, place = 0; lane < 8; ++lane)
      if (set >> lane & 1) order.lanes[set][place++] = static_cast<uint8_t>(lane);
  return order;
}

struct Simd {
  static constexpr int kWidth = 8;
  static constexpr int kTileM = 3;  // 3 x 4 accumulators, 3 rows of x and one of w fill the 16 registers
  static constexpr const char* kName = "avx2";

  using V = __m256;
  struct Bf16 {
    uint16_t bits;
  };
  struct Fp16 {
    uint16_t bits;
  };

  static void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T1); }
  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float s) { return _mm256_set1_ps(s); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load_part(const float* p, int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  // Whole numbers of 32 bits (see sampling.inl).
  using Whole = __m256i;
  static Whole whole(V v) { return _mm256_cvttps_epi32(v); }  // the fractions cut off
  static Whole whole1(int32_t s) { return _mm256_set1_epi32(s); }
  static Whole load_whole(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_whole(int32_t* p, Whole w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w); }
  static Whole add(Whole a, Whole b) { return _mm256_add_epi32(a, b); }
  static Whole max(Whole a, Whole b) { return _mm256_max_epi32(a, b); }
  static constexpr LaneOrder kOrder = lane_order();
  static bool any_from(Whole w, Whole lowest) { return lanes_from(w, lowest) != 0; }
  static int lanes_from(Whole w, Whole lowest) {
    return ~_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(lowest, w))) & 0xff;
  }
  // Writes the lanes of w that are at least `lowest`, and their ids; returns how many. Both outputs have room for all.
  static int keep_from(Whole w, Whole lowest, Whole id, int32_t* ids, int32_t* kept) {
    const int lanes = lanes_from(w, lowest);
    const auto* order = reinterpret_cast<const __m128i*>(kOrder.lanes[lanes]);
    const __m256i to_front = _mm256_cvtepu8_epi32(_mm_loadl_epi64(order));
    store_whole(ids, _mm256_permutevar8x32_epi32(id, to_front));
    store_whole(kept, _mm256_permutevar8x32_epi32(w, to_front));
    return __builtin_popcount(static_cast<unsigned>(lanes));
  }
  // Sums of lanes as unsigned numbers, in 64 bits.
  using Sums = __m256i;
  static Sums sums_zero() { return _mm256_setzero_si256(); }
  static Sums sums_add(Sums sums, Whole w) {
    const __m256i low = _mm256_blend_epi32(w, _mm256_setzero_si256(), 0xaa);
    return _mm256_add_epi64(_mm256_add_epi64(sums, low), _mm256_srli_epi64(w, 32));
  }
  static int64_t sums_total(Sums sums) {
    const __m128i s = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_cvtsi128_si64(s) + _mm_extract_epi64(s, 1);
  }
  // v times 2^n, where n is in the low bits of the float `shifted` = 1.5 x 2^23 + n. v and the product are normal numbers.
  static V times_pow2(V v, V shifted) {
    const __m256i exponents = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponents));
  }
  static V load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // int4: words of eight half bytes (see int4.inl).
  static constexpr int kInt4Chains = 8, kInt4Units = 3, kInt4TileM = 4;  // the words of 4 units overflow the registers
  using Words = __m256i;
  static Words load_words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  // Half byte J of each word times 16^J; of J = 7 as it is.
  template <int J>
  static V half_byte(Words w) {
    if constexpr (J == 7) return _mm256_cvtepi32_ps(_mm256_srli_epi32(w, 28));
    return _mm256_cvtepi32_ps(_mm256_and_si256(w, _mm256_set1_epi32(15 << (J % 7 * 4))));
  }
  // int8 activations (int8_rows.inl). Rounds 16 numbers from -127 to 127 to codes; returns the codes' sum.
  static int32_t store_codes(int8_t* p, const V v[2]) {
    const __m256i halves = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
    const __m256i order = _mm256_permute4x64_epi64(halves, 0xd8);
    const __m128i codes = _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(codes, _mm_set1_epi8(-128)), _mm_setzero_si128());
    return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128;
  }
  static constexpr int kQuadsTileM = 3;
  // Adds one group of MT rows of x times 16 rows of weights: four times two vectors of quads. The instruction's first operand is
  // unsigned: |w| and x with w's sign give the same products. Two of them, at most 127 * 128 each, fit 16 bits.
  template <int MT>
  static void add_group(V (&total)[MT][2], const uint8_t* w, const int8_t* codes, const CodeShare* shares) {
    const __m256i ones = _mm256_set1_epi16(1), shift = _mm256_set1_epi8(-128);
    __m256i sum[MT][2];
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const auto* at = reinterpret_cast<const __m256i*>(w + q * 64 + p * 32);
        const __m256i weights = _mm256_xor_si256(_mm256_loadu_si256(at), shift), magnitude = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
        for (int m = 0; m < MT; ++m) {
          int32_t four;
          std::memcpy(&four, codes + m * kCodeGroup + q * 4, sizeof four);
          const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(_mm256_set1_epi32(four), weights));
          sum[m][p] = _mm256_add_epi32(sum[m][p], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < MT; ++m)
      for (int p = 0; p < 2; ++p)
        total[m][p] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m][p]), _mm256_set1_ps(shares[m].scale), total[m][p]);
  }
  static V load(const Bf16* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static V load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(Bf16* p, V v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  static void store(Fp16* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Keeps v in a register: the compiler would rather read it from memory again for every product, and two loads a cycle are
  // the limit then.
  static void hold(V& v) { asm("" : "+x"(v)); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V pow2i(V n) {
    __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  }
  static float sum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float maximum(V a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static void maximum4(V a, V b, V c, V d, float out[4]) {
    const auto pair = [](V v, V w) { return _mm256_max_ps(_mm256_unpacklo_ps(v, w), _mm256_unpackhi_ps(v, w)); };
    const V abcd = pair(pair(a, c), pair(b, d));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
  // sum4 of a and of b.
  static void sum8(const V a[4], const V b[4], float* sums_a, float* sums_b) {
    sum4(a[0], a[1], a[2], a[3], sums_a);
    sum4(b[0], b[1], b[2], b[3], sums_b);
  }
  static void sum4(V a, V b, V c, V d, float out[4]) {
    __m256 ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d);
    __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
  }
};

}  // namespace cai::avx2
