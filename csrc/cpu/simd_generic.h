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
  static constexpr int kTileM = 3;  // rows of x that a tile of four weight rows serves at once
  static constexpr const char* kName = "generic";

  struct V {
    float lane[8];
  };

  template <class F>
  static V each(F f) {
    V r;
    for (int i = 0; i < 8; ++i) r.lane[i] = f(i);
    return r;
  }
  static V zero() { return each([](int) { return 0.0f; }); }
  static V set1(float s) { return each([=](int) { return s; }); }
  static V load(const float* p) { return each([=](int i) { return p[i]; }); }
  static V load_part(const float* p, int n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
  static void store(float* p, V v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static V load(const int8_t* p) { return each([=](int i) { return static_cast<float>(p[i]); }); }
  struct Bf16 {
    uint16_t bits;
  };
  struct Fp16 {
    uint16_t bits;
  };
  static V load(const Bf16* p) { return each([=](int i) { return bf16_to_float(p[i].bits); }); }
  static V load(const Fp16* p) { return each([=](int i) { return fp16_to_float(p[i].bits); }); }
  static void store(Bf16* p, V v) {
    for (int i = 0; i < 8; ++i) p[i].bits = float_to_bf16(v.lane[i]);
  }
  static void store(Fp16* p, V v) {
    for (int i = 0; i < 8; ++i) p[i].bits = float_to_fp16(v.lane[i]);
  }
  static V fma(V a, V b, V c) { return each([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); }); }
  static V add(V a, V b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static V sub(V a, V b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static V mul(V a, V b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static V div(V a, V b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
  static V max(V a, V b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static V min(V a, V b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static V round(V a) { return each([&](int i) { return std::nearbyintf(a.lane[i]); }); }
  static V pow2i(V n) {  // 2^n for whole n in [-126, 127]
    return each([&](int i) {
      uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    });
  }
  static float sum(V a) {
    float s0 = (a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6]);
    float s1 = (a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]);
    return s0 + s1;
  }
  static float maximum(V a) {
    float m = a.lane[0];
    for (int i = 1; i < 8; ++i) m = a.lane[i] > m ? a.lane[i] : m;
    return m;
  }
  static void sum4(V a, V b, V c, V d, float out[4]) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
};

}  // namespace cai::generic
