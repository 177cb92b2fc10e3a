// What the checks of the kernel tables share: random numbers, matrices in every store with their exact values, and the
// report of errors against float64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace cai::check {

// Where kernels read and write. With `guard_pages` set (at the start, by --guard) memory ends where a page begins that no one
// may touch, so that an access past the end stops the program whatever the instruction: AddressSanitizer sees ordinary loads
// and stores, on both sides, but no masked ones.
extern bool guard_pages;
void* allocate_guarded(size_t bytes);
void release_guarded(void* p, size_t bytes);

template <class T>
struct Allocator {
  using value_type = T;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(guard_pages ? allocate_guarded(n * sizeof(T)) : ::operator new(n * sizeof(T)));
  }
  void deallocate(T* p, size_t n) {
    guard_pages ? release_guarded(p, n * sizeof(T)) : ::operator delete(p);
  }
  bool operator==(const Allocator&) const { return true; }
  bool operator!=(const Allocator&) const { return false; }
};
// To end where its memory does, a buffer is made of its final size.
template <class T>
using Buffer = std::vector<T, Allocator<T>>;

class Random {  // splitmix64 (Steele, Lea and Flood 2014): the same numbers on every machine
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % (high - low + 1)); }
  float uniform(float low, float high) { return low + (high - low) * static_cast<float>(next() >> 40) * 0x1p-24f; }
  Buffer<float> floats(int64_t n, float low = -1.0f, float high = 1.0f) {
    Buffer<float> values(n);
    for (float& v : values) v = uniform(low, high);
    return values;
  }
  Buffer<int32_t> permutation(int64_t n) { return choice(n, n); }
  Buffer<int32_t> choice(int64_t n, int64_t from);  // n different numbers below `from`, in any order

 private:
  uint64_t state_;
};

// Worst errors by kernel and store, and what failed.
class Report {
 public:
  explicit Report(std::string table) : table_(std::move(table)) {}
  // Fails unless |got - want| <= tolerance * size; `size` is what rounding errors are proportional to.
  void value(const std::string& kernel, double got, double want, double size, double tolerance);
  void expect(bool holds, const std::string& kernel, const std::string& what);
  void same(const Buffer<float>& a, const Buffer<float>& b, const std::string& kernel, const std::string& what) {
    expect(a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0), kernel,
           what);
  }
  int print() const;  // returns the number of failures

 private:
  struct Line {
    int64_t values = 0, checks = 0, failures = 0;
    double worst = 0, tolerance = 0;
  };
  void fail(Line& line, const std::string& kernel, const std::string& what);
  std::string table_;
  std::map<std::string, Line> lines_;
};

constexpr float kUntouched = -12345.678f;  // marks what a kernel must not write

const char* name(Store store);
int64_t element_size(Store store);                 // bytes; of a store whose elements have whole ones
double decode(Store store, const void* at);        // one element, exactly
void encode(Store store, double value, void* at);  // rounded to nearest, ties to even; int8 takes a whole number
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix as kernels.h packs it, each part in memory of exactly its size, and its values [rows, cols].
struct Matrix {
  Store store = Store::kFp32;
  int64_t rows = 0, cols = 0, group = 0;
  Buffer<uint8_t> data, zero;
  Buffer<float> scale;           // int8 and quads
  Buffer<uint16_t> group_scale;  // int4
  std::vector<double> values;
  std::vector<double> sizes;  // int4: (code + zero) * scale, as large as what is summed and taken off again

  double size(int64_t i) const { return sizes.empty() ? std::fabs(values[i]) : sizes[i]; }
  PackedMatrix packed() const {
    const void* scales = nullptr;
    if (!scale.empty()) scales = scale.data();
    if (!group_scale.empty()) scales = group_scale.data();
    return {data.data(), scales, store, rows, cols, zero.empty() ? nullptr : zero.data(), group};
  }
};
// extreme: codes of int8 are the least or the greatest there is.
Matrix random_matrix(Random& random, Store store, int64_t rows, int64_t cols, bool extreme = false);
constexpr Store kStores[] = {Store::kFp32, Store::kBf16, Store::kFp16, Store::kInt8, Store::kInt4};
constexpr Store kCacheStores[] = {Store::kFp32, Store::kBf16, Store::kFp16};

void check_linear(const KernelTable& table, Report& report);
void check_linear_int8(const KernelTable& table, Report& report);
void check_quantize_rows(const KernelTable& table, Report& report);
void check_gather(const KernelTable& table, Report& report);
void check_rms_norm(const KernelTable& table, Report& report);
void check_layer_norm(const KernelTable& table, Report& report);
void check_gelu(const KernelTable& table, Report& report);
void check_swiglu(const KernelTable& table, Report& report);
void check_rotate(const KernelTable& table, Report& report);
void check_write_kv(const KernelTable& table, Report& report);
void check_attention(const KernelTable& table, Report& report);
void check_full_attention(const KernelTable& table, Report& report);
void check_sampling(const KernelTable& table, Report& report);

// Each lane-wise function of one Simd type (simd_checks.cpp, compiled once per instruction set).
void check_simd_generic(Report& report);
#if defined(__x86_64__)
void check_simd_avx2(Report& report);
void check_simd_avx512(Report& report);
#elif defined(__aarch64__)
void check_simd_neon(Report& report);
#endif

}  // namespace cai::check
