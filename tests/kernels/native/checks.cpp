#include "checks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <new>
#include <numeric>

namespace cai::check {

bool guard_pages = false;

namespace {

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}
size_t whole_pages(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

}  // namespace

void* allocate_guarded(size_t bytes) {
  const size_t inner = whole_pages(bytes);
  void* base = mmap(nullptr, inner + page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  char* end = static_cast<char*>(base) + inner;
  if (mprotect(end, page_bytes(), PROT_NONE) != 0) throw std::bad_alloc();
  return end - bytes;
}

void release_guarded(void* p, size_t bytes) {
  const size_t inner = whole_pages(bytes);
  munmap(static_cast<char*>(p) + bytes - inner, inner + page_bytes());
}

Buffer<int32_t> Random::choice(int64_t n, int64_t from) {
  std::vector<int32_t> p(from);
  std::iota(p.begin(), p.end(), 0);
  for (int64_t i = from - 1; i > 0; --i) std::swap(p[i], p[between(0, i)]);
  return {p.begin(), p.begin() + n};
}

void Report::fail(Line& line, const std::string& kernel, const std::string& what) {
  if (++line.failures <= 5) std::printf("FAILED %s %s: %s\n", table_.c_str(), kernel.c_str(), what.c_str());
}

void Report::value(const std::string& kernel, double got, double want, double size, double tolerance) {
  Line& line = lines_[kernel];
  ++line.values;
  line.tolerance = tolerance;
  const double error = got == want ? 0.0 : std::fabs(got - want) / size;
  if (!(error <= line.worst)) line.worst = error;
  if (!(error <= tolerance)) {
    char text[128];
    std::snprintf(text, sizeof text, "%.9g instead of %.9g, an error of %.2g", got, want, error);
    fail(line, kernel, text);
  }
}

void Report::expect(bool holds, const std::string& kernel, const std::string& what) {
  Line& line = lines_[kernel];
  ++line.checks;
  if (!holds) fail(line, kernel, what);
}

int Report::print() const {
  int64_t failures = 0;
  for (const auto& [kernel, line] : lines_) {
    std::printf("%-14s %-18s %8lld values, worst error %.1e of %.1e; %6lld exact checks; %lld failures\n", table_.c_str(),
                kernel.c_str(), static_cast<long long>(line.values), line.worst, line.tolerance,
                static_cast<long long>(line.checks), static_cast<long long>(line.failures));
    failures += line.failures;
  }
  return static_cast<int>(failures);
}

const char* name(Store store) {
  switch (store) {
    case Store::kFp32: return "fp32";
    case Store::kBf16: return "bf16";
    case Store::kFp16: return "fp16";
    case Store::kInt8: return "int8";
    case Store::kInt4: return "int4";
    case Store::kInt8Quads: return "quads";
  }
  return "unknown";
}

int64_t element_size(Store store) { return store == Store::kFp32 ? 4 : store == Store::kInt8 ? 1 : 2; }

namespace {

// A binary float of `fraction` stored bits whose smallest normal exponent is `lowest`.
double decode_float(uint32_t bits, int fraction, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> (fraction + exponent_bits) & 1 ? -1.0 : 1.0;
  const int exponent = static_cast<int>(bits >> fraction) & ((1 << exponent_bits) - 1);
  const double f = bits & ((1u << fraction) - 1);
  if (exponent == (1 << exponent_bits) - 1)
    return f != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(f, 1 - bias - fraction);
  return sign * std::ldexp(f + std::ldexp(1.0, fraction), exponent - bias - fraction);
}

uint32_t encode_float(double value, int fraction, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t sign = std::signbit(value) ? 1u << (fraction + exponent_bits) : 0;
  const uint32_t infinity = ((1u << exponent_bits) - 1) << fraction;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | infinity | 1u << (fraction - 1);
  if (magnitude == 0.0) return sign;
  const int exponent = std::isinf(magnitude) ? bias : std::max(std::ilogb(magnitude), 1 - bias);
  const double steps = std::nearbyint(std::ldexp(magnitude, fraction - exponent));  // of one unit in the last place
  if (std::ldexp(steps, exponent - fraction) >= std::ldexp(1.0, bias + 1)) return sign | infinity;
  // A normal number's leading one adds one to the exponent field; rounding up to the next power of two likewise.
  return sign | ((static_cast<uint32_t>(exponent + bias - 1) << fraction) + static_cast<uint32_t>(steps));
}

}  // namespace

double decode(Store store, const void* at) {
  if (store == Store::kFp32) {
    float f;
    std::memcpy(&f, at, 4);
    return f;
  }
  if (store == Store::kInt8) return *static_cast<const int8_t*>(at);
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return store == Store::kBf16 ? decode_float(bits, 7, 8) : decode_float(bits, 10, 5);
}

void encode(Store store, double value, void* at) {
  if (store == Store::kFp32) {
    const float f = static_cast<float>(value);
    std::memcpy(at, &f, 4);
  } else if (store == Store::kInt8) {
    *static_cast<int8_t*>(at) = static_cast<int8_t>(value);
  } else {
    const auto bits = static_cast<uint16_t>(store == Store::kBf16 ? encode_float(value, 7, 8) : encode_float(value, 10, 5));
    std::memcpy(at, &bits, 2);
  }
}

namespace {

// Codes, scales and zero points of int4. What pads a block is anything at all: no result may depend on it.
Matrix random_int4(Random& random, int64_t rows, int64_t cols) {
  Matrix w{Store::kInt4, rows, cols, int64_t(32) << random.between(0, 2), {}, {}, {}, {}, {}, {}};
  const int64_t blocks = round_up(rows, kLaneRows) / kLaneRows, groups = round_up(cols, w.group) / w.group;
  w.data.resize(blocks * kLaneRows * round_up(cols, kInt4Cols) / 2);
  for (uint8_t& b : w.data) b = static_cast<uint8_t>(random.next());
  w.group_scale.assign(blocks * groups * kLaneRows, 0xffff);
  if (random.between(0, 1)) w.zero.assign(w.group_scale.size(), 255);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t block = i / kLaneRows, r = i % kLaneRows;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = (block * groups + g) * kLaneRows + r;
      encode(Store::kBf16, random.uniform(0.01f, 0.2f), &w.group_scale[at]);
      if (!w.zero.empty()) w.zero[at] = static_cast<uint8_t>(random.between(0, 15));
    }
    for (int64_t j = 0; j < cols; ++j) {  // eight columns a word, the first in the lowest half byte
      const int64_t word = (block * round_up(cols, kInt4Cols) / 8 + j / 8) * kLaneRows + r;
      const int code = w.data[4 * word + j % 8 / 2] >> (j % 2 * 4) & 15;
      const int64_t at = (block * groups + j / w.group) * kLaneRows + r;
      const int zero = w.zero.empty() ? 8 : w.zero[at];
      const double scale = decode(Store::kBf16, &w.group_scale[at]);
      w.values.push_back((code - zero) * scale);
      w.sizes.push_back((code + zero) * scale);
    }
  }
  return w;
}

}  // namespace

Matrix random_matrix(Random& random, Store store, int64_t rows, int64_t cols, bool extreme) {
  if (store == Store::kInt4) return random_int4(random, rows, cols);
  Matrix w{store, rows, cols, 0, {}, {}, {}, {}, {}, {}};
  const bool quads = store == Store::kInt8Quads, codes = quads || store == Store::kInt8;
  const int64_t size = codes ? 1 : element_size(store), padded = round_up(cols, kBlockCols);
  w.data.assign(round_up(rows, quads ? kLaneRows : kBlockRows) * padded * size, quads ? 128 : 0);
  if (codes) w.scale = random.floats(rows, 0.001f, 0.02f);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t place = quads ? (i / kLaneRows * padded + j / 4 * 4) * kLaneRows + i % kLaneRows * 4 + j % 4
                                  : (i / kBlockRows * padded + j / kBlockCols * kBlockCols) * kBlockRows +
                                        i % kBlockRows * kBlockCols + j % kBlockCols;
      uint8_t* at = w.data.data() + place * size;
      if (codes) {
        const int64_t code = extreme ? (random.between(0, 9) ? -128 : 127) : random.between(-128, 127);
        *at = static_cast<uint8_t>(code + (quads ? 128 : 0));
        w.values.push_back(static_cast<double>(code) * w.scale[i]);
      } else {
        encode(store, random.uniform(-1.0f, 1.0f), at);
        w.values.push_back(decode(store, at));
      }
    }
  }
  return w;
}

}  // namespace cai::check
