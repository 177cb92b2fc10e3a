// Eight lanes in plain C++: the backend of processors without a hand-written one. The compiler vectorizes what it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cai::generic {
namespace {  // a copy for each translation unit, compiled with its own flags

inline float bf16_to_float(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // keep NaN a NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // subnormal: magnitude * 2^-24
    float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_fp16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past the largest finite value
  if (bits < 0x38800000u) {                                               // subnormal or zero
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(magnitude * 16777216.0f)));
  }
  uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

}  // namespace

struct Simd {
  static constexpr int kWidth = 8;
  static constexpr int kTileM = 2;
  static constexpr const char* kName = "generic";

  // The compilers' vector extension: whatever vector unit the target has, without its intrinsics.
  typedef float V __attribute__((vector_size(32), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(32), aligned(4), may_alias));
  typedef uint32_t U __attribute__((vector_size(32), aligned(4), may_alias));
  struct Bf16 {
    uint16_t bits;
  };
  struct Fp16 {
    uint16_t bits;
  };

  static void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }
  static V zero() { return V{}; }
  static V set1(float s) { return V{s, s, s, s, s, s, s, s}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static V load_part(const float* p, int n) {
    V v{};
    std::memcpy(&v, p, sizeof(float) * (n < 8 ? n : 8));
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
  // Whole numbers of 32 bits (see sampling.inl).
  using Whole = I;
  static Whole whole(V v) { return __builtin_convertvector(v, I); }  // the fractions cut off
  static Whole whole1(int32_t s) { return I{s, s, s, s, s, s, s, s}; }
  static Whole load_whole(const int32_t* p) {
    Whole w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static void store_whole(int32_t* p, Whole w) { std::memcpy(p, &w, sizeof w); }
  static Whole add(Whole a, Whole b) {  // modulo 2^32
    return reinterpret_cast<Whole>(reinterpret_cast<U>(a) + reinterpret_cast<U>(b));
  }
  static Whole max(Whole a, Whole b) { return a > b ? a : b; }
  static bool any_from(Whole w, Whole lowest) {
    bool any = false;
    for (int i = 0; i < 8; ++i) any |= w[i] >= lowest[i];
    return any;
  }
  // Writes the lanes of w that are at least `lowest`, and their ids; returns how many. Both outputs have room for all.
  static int keep_from(Whole w, Whole lowest, Whole id, int32_t* ids, int32_t* kept) {
    int found = 0;
    for (int i = 0; i < 8; ++i) {  // without a branch, which would be mispredicted
      ids[found] = id[i];
      kept[found] = w[i];
      found += w[i] >= lowest[i];
    }
    return found;
  }
  // Sums of lanes as unsigned numbers, in 64 bits.
  typedef uint64_t Sums __attribute__((vector_size(64), aligned(8)));
  static Sums sums_zero() { return Sums{}; }
  static Sums sums_add(Sums sums, Whole w) { return sums + __builtin_convertvector(reinterpret_cast<U>(w), Sums); }
  static int64_t sums_total(Sums sums) {
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i) total += sums[i];
    return static_cast<int64_t>(total);
  }
  // v times 2^n, where n is in the low bits of the float `shifted` = 1.5 x 2^23 + n. v and the product are normal numbers.
  static V times_pow2(V v, V shifted) {
    return reinterpret_cast<V>(reinterpret_cast<U>(v) + (reinterpret_cast<U>(shifted) << 23));
  }
  static V load(const int8_t* p) {
    I wide;
    for (int i = 0; i < 8; ++i) wide[i] = p[i];
    return __builtin_convertvector(wide, V);
  }
  // int4: words of eight half bytes (see int4.inl).
  static constexpr int kInt4Chains = 4;  // independent multiply-adds, for one row of x
  static constexpr int kInt4Units = 2;   // units at once, at most
  static constexpr int kInt4TileM = 2;   // rows of x at once
  using Words = I;
  static Words load_words(const uint32_t* p) {
    I w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  // Half byte J of each word times 16^J; of J = 7 as it is.
  template <int J>
  static V half_byte(Words w) {
    if constexpr (J == 7) return __builtin_convertvector((w >> 28) & 15, V);
    return __builtin_convertvector(w & (15 << (J % 7 * 4)), V);
  }
  // int8 activations (int8_rows.inl). Rounds 16 numbers from -127 to 127 to codes; returns the codes' sum.
  static int32_t store_codes(int8_t* p, const V v[2]) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i] = static_cast<int8_t>(std::nearbyintf(v[i / 8][i % 8]));
    return sum;
  }
  static constexpr int kQuadsTileM = 2;
  // Adds one group of MT rows of x times 16 rows of weights.
  template <int MT>
  static void add_group(V (&total)[MT][2], const uint8_t* w, const int8_t* codes, const CodeShare* shares) {
    for (int m = 0; m < MT; ++m)
      for (int r = 0; r < 16; ++r) {
        int32_t sum = 0;
        for (int k = 0; k < 16; ++k) sum += codes[m * kCodeGroup + k] * (w[k / 4 * 64 + r * 4 + k % 4] - 128);
        total[m][r / 8][r % 8] += static_cast<float>(sum) * shares[m].scale;
      }
  }
  static V load(const Bf16* p) {
    I bits;
    for (int i = 0; i < 8; ++i) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i].bits) << 16);
    V v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static V load(const Fp16* p) {
    V v;
    for (int i = 0; i < 8; ++i) v[i] = fp16_to_float(p[i].bits);
    return v;
  }
  static void store(Bf16* p, V v) {
    for (int i = 0; i < 8; ++i) p[i].bits = float_to_bf16(v[i]);
  }
  static void store(Fp16* p, V v) {
    for (int i = 0; i < 8; ++i) p[i].bits = float_to_fp16(v[i]);
  }
  static void hold(V&) {}
  // Not fused: where there is no instruction for it, a fused multiply-add is a slow library call.
  static V fma(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V round(V a) {
    for (int i = 0; i < 8; ++i) a[i] = std::nearbyintf(a[i]);
    return a;
  }
  static V pow2i(V n) {  // 2^n for whole n in [-126, 127]
    I bits = (__builtin_convertvector(n, I) + 127) << 23;
    V v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
  static float sum(V a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
  static float maximum(V a) {
    float m = a[0];
    for (int i = 1; i < 8; ++i) m = a[i] > m ? a[i] : m;
    return m;
  }
  static void maximum4(V a, V b, V c, V d, float out[4]) {
    out[0] = maximum(a);
    out[1] = maximum(b);
    out[2] = maximum(c);
    out[3] = maximum(d);
  }
  // sum4 of a and of b.
  static void sum8(const V a[4], const V b[4], float* sums_a, float* sums_b) {
    sum4(a[0], a[1], a[2], a[3], sums_a);
    sum4(b[0], b[1], b[2], b[3], sums_b);
  }
  static void sum4(V a, V b, V c, V d, float out[4]) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
};

}  // namespace cai::generic
