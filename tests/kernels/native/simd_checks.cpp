// Every function of one Simd type, lane by lane. Compiled once per instruction set with its flags and -DCAI_SIMD_NEON,
// -DCAI_SIMD_AVX2, -DCAI_SIMD_AVX512 or none of them.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "checks.h"

#include "cpu/simd_generic.h"
#if defined(CAI_SIMD_NEON)
#include "cpu/simd_neon.h"
#define CAI_SIMD neon
#define CAI_CHECK check_simd_neon
#elif defined(CAI_SIMD_AVX2)
#include "cpu/simd_avx2.h"
#define CAI_SIMD avx2
#define CAI_CHECK check_simd_avx2
#elif defined(CAI_SIMD_AVX512)
#include "cpu/simd_avx512.h"
#define CAI_SIMD avx512
#define CAI_CHECK check_simd_avx512
#else
#define CAI_SIMD generic
#define CAI_CHECK check_simd_generic
#endif

namespace cai::check {
namespace {

using Simd = CAI_SIMD::Simd;
constexpr int kW = Simd::kWidth;

bool same_float(double got, double want) {
  return std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
}

// Loads of all 2^16 patterns (2^8 of int8), each in every lane.
template <class T>
void check_loads(Store store, Report& report) {
  const int64_t patterns = int64_t(1) << (8 * sizeof(T));
  Buffer<T> in(patterns + kW);
  for (int64_t i = 0; i < patterns + kW; ++i) {
    const auto bits = static_cast<uint16_t>(i % patterns);
    std::memcpy(&in[i], &bits, sizeof(T));  // the low byte first: little-endian, as both architectures are
  }
  bool right = true;
  for (int64_t i = 0; i < patterns; i += kW > 1 ? kW - 1 : 1) {
    float out[kW];
    Simd::store(out, Simd::load(in.data() + i));
    for (int lane = 0; lane < kW; ++lane) right &= same_float(out[lane], decode(store, &in[i + lane]));
  }
  report.expect(right, std::string("load ") + name(store), "an element is not what its bits mean");
}

template <int J>
void check_half_byte(const Buffer<uint32_t>& words, Report& report) {
  const float unit = J < 7 ? std::ldexp(1.0f, 4 * J) : 1.0f;
  bool right = true;
  for (size_t i = 0; i + kW <= words.size(); ++i) {
    float codes[kW];
    Simd::store(codes, Simd::template half_byte<J>(Simd::load_words(words.data() + i)));
    for (int lane = 0; lane < kW; ++lane) right &= codes[lane] == static_cast<float>(words[i + lane] >> 4 * J & 15) * unit;
  }
  report.expect(right, "int4", "half byte " + std::to_string(J) + " of a word is another");
}

void check_int4(Report& report) {
  Random random(13);
  Buffer<uint32_t> words(256);
  for (uint32_t& w : words) w = static_cast<uint32_t>(random.next());
  words[3] = 0xffffffffu;
  words[4] = 0x80000000u;
  check_half_byte<0>(words, report);
  check_half_byte<1>(words, report);
  check_half_byte<2>(words, report);
  check_half_byte<3>(words, report);
  check_half_byte<4>(words, report);
  check_half_byte<5>(words, report);
  check_half_byte<6>(words, report);
  check_half_byte<7>(words, report);
}

// A group of 16 columns against 16 rows, with the extremes, and the codes that it takes.
void check_int8(Report& report) {
  Random random(12);
  for (int round = 0; round < 200; ++round) {
    constexpr int kRows = Simd::kQuadsTileM, kVectors = 16 / Simd::kWidth;
    int8_t codes[kRows * 16];
    uint8_t w[256];
    CodeShare shares[kRows];
    for (int m = 0; m < kRows; ++m) {
      float x[16];
      Simd::V v[kVectors];
      for (float& number : x)
        number = round < 2 ? 254.0f * static_cast<float>(round) - 127 : static_cast<float>(random.between(-254, 254)) / 2;
      for (int p = 0; p < kVectors; ++p) v[p] = Simd::load(x + p * Simd::kWidth);
      const int32_t sum = Simd::store_codes(codes + m * 16, v);
      int32_t want = 0;
      for (int k = 0; k < 16; ++k) {
        report.expect(codes[m * 16 + k] == std::nearbyint(x[k]), "codes", "not rounded to even");
        want += codes[m * 16 + k];
      }
      report.expect(sum == want, "codes", "not the sum of the codes");
      shares[m] = {1.0f, -128 * sum};
    }
    for (uint8_t& code : w) code = static_cast<uint8_t>(round < 4 ? 255 * (round / 2) : random.between(0, 255));
    Simd::V total[kRows][kVectors];
    for (auto& row : total)
      for (Simd::V& part : row) part = Simd::zero();
    for (int step = 0; step < 3; ++step) Simd::add_group<kRows>(total, w, codes, shares);
    for (int m = 0; m < kRows; ++m) {
      float sums[16];
      for (int p = 0; p < kVectors; ++p) Simd::store(sums + p * Simd::kWidth, total[m][p]);
      for (int r = 0; r < 16; ++r) {
        int32_t want = 0;
        for (int k = 0; k < 16; ++k) want += codes[m * 16 + k] * (w[k / 4 * 64 + r * 4 + k % 4] - 128);
        report.expect(sums[r] == static_cast<float>(3 * want), "int8", "not the sum of the products");
      }
    }
  }
}

template <class T>
void check_store(Store store, Report& report) {
  Random random(7);
  Buffer<float> in = {0.0f, -0.0f, 1.0f, 65504.0f, 65519.9f, 65520.0f, -65536.0f, 3.4e38f, 1e-8f, -5.9604645e-8f,
                           2.9802322e-8f, 6.1e-5f, 1e-40f, INFINITY, -INFINITY, NAN};
  for (int i = 0; i < 4096; ++i) {
    const auto bits = static_cast<uint32_t>(random.next());
    float f;
    std::memcpy(&f, &bits, 4);
    in.push_back(f);
    in.push_back(random.uniform(-2, 2));
  }
  bool right = true;
  for (size_t i = 0; i + kW <= in.size(); i += kW) {
    T out[kW], want;
    Simd::store(out, Simd::load(in.data() + i));
    for (int lane = 0; lane < kW; ++lane) {
      encode(store, in[i + lane], &want);
      right &= std::isnan(in[i + lane]) ? std::isnan(decode(store, &out[lane])) : std::memcmp(&want, &out[lane], sizeof want) == 0;
    }
  }
  report.expect(right, std::string("store ") + name(store), "not rounded to nearest, ties to even");
}

void check_part_loads(Report& report) {
  for (int n = 1; n <= kW + 2; ++n) {
    Buffer<float> in(n < kW ? n : kW);  // exactly the floats that may be read
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i) + 1;
    float out[kW];
    Simd::store(out, Simd::load_part(in.data(), n));
    for (int lane = 0; lane < kW; ++lane)
      report.expect(out[lane] == (lane < n ? lane + 1 : 0), "load_part", "not the first n floats and zeros");
  }
}

void check_arithmetic(Report& report) {
  Random random(8);
  for (int round = 0; round < 500; ++round) {
    const Buffer<float> a = random.floats(kW, -100, 100), b = random.floats(kW, -100, 100), c = random.floats(kW);
    const auto va = Simd::load(a.data()), vb = Simd::load(b.data()), vc = Simd::load(c.data());
    auto each = [&](Simd::V v, const char* what, auto f) {
      float out[kW];
      Simd::store(out, v);
      for (int i = 0; i < kW; ++i) report.expect(out[i] == f(i), what, "wrong in a lane");
    };
    each(Simd::add(va, vb), "add", [&](int i) { return a[i] + b[i]; });
    each(Simd::sub(va, vb), "sub", [&](int i) { return a[i] - b[i]; });
    each(Simd::mul(va, vb), "mul", [&](int i) { return a[i] * b[i]; });
    each(Simd::div(va, vb), "div", [&](int i) { return a[i] / b[i]; });
    each(Simd::max(va, vb), "max", [&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
    each(Simd::min(va, vb), "min", [&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
    each(Simd::round(va), "round", [&](int i) { return std::nearbyint(a[i]); });
    each(Simd::set1(a[0]), "set1", [&](int) { return a[0]; });
    each(Simd::zero(), "zero", [](int) { return 0.0f; });
    float fused[kW];
    Simd::store(fused, Simd::fma(va, vb, vc));
    for (int i = 0; i < kW; ++i) {
      const double want = static_cast<double>(a[i]) * b[i] + c[i];
      report.value("fma", fused[i], want, std::fabs(want) + std::fabs(static_cast<double>(a[i]) * b[i]), 1.2e-7);
    }
    double total = 0, size = 0;
    float top = a[0], sums[4];
    for (float f : a) {
      total += f;
      size += std::fabs(f);
      top = f > top ? f : top;
    }
    report.value("sum", Simd::sum(va), total, size, 3e-7);
    report.expect(Simd::maximum(va) == top, "maximum", "not the largest lane");
    Simd::sum4(va, vb, vc, Simd::mul(va, vc), sums);
    const float single[4] = {Simd::sum(va), Simd::sum(vb), Simd::sum(vc), Simd::sum(Simd::mul(va, vc))};
    for (int i = 0; i < 4; ++i) report.value("sum4", sums[i], single[i], size * 2, 3e-7);
  }
  for (float tie : {0.5f, 1.5f, -0.5f, -2.5f}) {
    float out[kW];
    Simd::store(out, Simd::round(Simd::set1(tie)));
    report.expect(out[0] == std::nearbyint(tie), "round", "a tie does not go to even");
  }
  for (int n = -126; n <= 127; ++n) {
    float out[kW];
    Simd::store(out, Simd::pow2i(Simd::set1(static_cast<float>(n))));
    for (float f : out) report.expect(f == std::ldexp(1.0, n), "pow2i", "not a power of two");
  }
}

}  // namespace

void CAI_CHECK(Report& report) {
  check_loads<Simd::Bf16>(Store::kBf16, report);
  check_loads<Simd::Fp16>(Store::kFp16, report);
  check_loads<int8_t>(Store::kInt8, report);
  check_int4(report);
  check_int8(report);
  check_store<Simd::Bf16>(Store::kBf16, report);
  check_store<Simd::Fp16>(Store::kFp16, report);
  check_part_loads(report);
  check_arithmetic(report);
}

}  // namespace cai::check
