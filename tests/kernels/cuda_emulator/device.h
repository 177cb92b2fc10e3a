// Enough of a CUDA device on a CPU to run a kernel and hold its results against a reference. The threads of a cluster of blocks
// are fibers that run in turn, each until it has to wait, so a missing or divergent barrier gives wrong numbers or an error,
// every time alike. Bulk copies are made when they are waited for, or at once where `eager` is set, when the last
// block runs as far ahead as it can: a missing wait is seen in the one case, a slot that is filled again too early in the other.
//
// The tensor cores add 16 products and the sum so far as Hopper's were found to (MMA-Sim, arXiv:2511.10909): each cut off at 25
// bits below the largest one's exponent, the result cut off to float32. A warp group's products are made when they are waited
// for, from what their registers and shared memory hold then.
//
// Include before the kernel. Supports one-dimensional blocks, clusters, dynamic shared memory, __syncthreads, __syncwarp,
// __shfl_xor_sync and, in its place, the functions of csrc/cuda/device.cuh.
#pragma once
#define CAI_DEVICE_FUNCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

#include "cuda/panels.cuh"

namespace emulator {

inline bool eager = false;
inline bool warp_groups = true;  // as Hopper, else warp by warp
// What the kernel ahead does, last of all: run when all that is left to do is to wait for it.
inline std::function<void()> previous;

// All of a number of threads arrive, then all go on.
struct Meeting {
  int arrived = 0, phase = 0;

  void arrive(int threads) {
    if (++arrived < threads) return;
    arrived = 0;
    ++phase;
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// An mbarrier: its arrivals and the bytes they announce end a phase.
struct Barrier {
  int arrivals = 1, arrived = 0, phase = 0, announced = 0;
  std::vector<Copy> copies;

  bool complete() const {
    int bytes = 0;
    for (const Copy& c : copies) bytes += c.bytes;
    if (arrived == arrivals && bytes > announced) throw std::runtime_error("copies bring more than was announced");
    return arrived == arrivals && bytes == announced;
  }
};

// c += a b, of a warp, with b in shared memory; see `multiply_rows`.
struct RowProduct {
  float (*c)[4];
  const uint32_t* a;
  uint64_t b;
  int rows;
  bool add;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::function<bool()> ready;  // empty: runs
  int block = 0, thread = 0, turn = 0;
  int clusters_met = 0;  // how often it has waited for its cluster
  std::vector<RowProduct> products;  // not waited for yet
  void (*multiply)(const RowProduct&) = nullptr;
  bool began = false;
};

constexpr int kStackBytes = 64 << 10;

using Words = std::array<uint32_t, 8>;

struct Block {
  std::vector<uint8_t> shared;
  std::vector<Words> mail[2];  // words in exchange within a warp, two sets taken in turn
  std::vector<Meeting> warps;
  Meeting whole;

  uint8_t* start() { return shared.data() + (1024 - reinterpret_cast<uintptr_t>(shared.data()) % 1024) % 1024; }
};

struct Cluster {
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::map<const void*, Barrier> barriers;
  Meeting meeting;
  ucontext_t scheduler;
  int threads = 0, running = 0, first_block = 0;
  std::function<void()> body;
  std::exception_ptr failure;
};

inline Cluster* current = nullptr;
inline uint3 thread_index, block_index, grid_size;

inline Fiber& fiber() { return current->fibers[current->running]; }
inline Block& block() { return current->blocks[fiber().block]; }

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  fiber().ready = std::move(ready);
  swapcontext(&fiber().context, &current->scheduler);
}

inline void wait_for(Meeting& meeting, int threads) {
  const int phase = meeting.phase;
  meeting.arrive(threads);
  wait_until([&meeting, phase] { return meeting.phase != phase; });
}

inline void enter() {
  try {
    current->body();
  } catch (...) {
    current->failure = std::current_exception();
  }
  fiber().done = true;
}

inline void run(Cluster& cluster, int fiber_number) {
  Fiber& f = cluster.fibers[fiber_number];
  cluster.running = fiber_number;
  thread_index = {static_cast<unsigned>(f.thread), 0, 0};
  block_index = {static_cast<unsigned>(cluster.first_block + f.block), 0, 0};
  f.ready = nullptr;
  swapcontext(&cluster.scheduler, &f.context);
  if (cluster.failure) std::rethrow_exception(cluster.failure);
}

inline void run_cluster(int first_block, int blocks, int threads, int shared_bytes, std::function<void()> body) {
  Cluster cluster;
  cluster.body = std::move(body);
  cluster.threads = threads;
  cluster.first_block = first_block;
  cluster.blocks.resize(blocks);
  for (Block& b : cluster.blocks) {
    b.shared.assign(shared_bytes + 1024, 0xff);  // NaN until it is written
    b.warps.resize((threads + 31) / 32);
    for (auto& set : b.mail) set.assign(threads, Words{});
  }
  cluster.fibers.resize(blocks * threads);
  current = &cluster;
  for (int i = 0; i < blocks * threads; ++i) {
    Fiber& f = cluster.fibers[i];
    f.block = i / threads;
    f.thread = i % threads;
    f.stack.reset(new char[kStackBytes]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &cluster.scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (int left = blocks * threads; left > 0;) {
    bool moved = false;
    // Block by block. Eagerly the last ones first, of each the last threads, and no block goes on while one after it can: so
    // blocks are as far apart as they ever may be.
    for (int n = 0; n < blocks && !(moved && eager); ++n)
      for (int m = 0; m < threads; ++m) {
        const int i = eager ? (blocks - 1 - n) * threads + threads - 1 - m : n * threads + m;
        Fiber& f = cluster.fibers[i];
        if (f.done || (f.ready && !f.ready())) continue;
        moved = true;
        run(cluster, i);
        left -= f.done;
      }
    if (moved) continue;
    if (previous == nullptr) throw std::runtime_error("threads wait for what will not happen: a barrier that not all reach, or a copy");
    previous();
    previous = nullptr;
  }
  for (const auto& [at, barrier] : cluster.barriers)
    if (!barrier.copies.empty()) throw std::runtime_error("a block ended before its copies were waited for");
  for (const Fiber& f : cluster.fibers)
    if (!f.products.empty()) throw std::runtime_error("a block ended before its products were waited for");
  current = nullptr;
}

// Run `kernel()` for every thread of every block.
inline void launch(int blocks, int threads, const std::function<void()>& kernel, int cluster = 1, int shared_bytes = 0) {
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  if (blocks % cluster != 0) throw std::runtime_error("the grid is not whole clusters");
  for (int b = 0; b < blocks; b += cluster) run_cluster(b, cluster, threads, shared_bytes, kernel);
}

// Every thread of the warp hands in words; afterwards each may read those of all, until it exchanges twice more.
inline const Words* exchange(const Words& words) {
  Fiber& f = fiber();
  auto& set = block().mail[f.turn];
  f.turn ^= 1;
  set[f.thread] = words;
  wait_for(block().warps[f.thread / 32], 32);
  return &set[f.thread / 32 * 32];
}

inline void bring(uint8_t* to, const void* from, int bytes, const void* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("a bulk copy is not aligned");
  if (bytes <= 0 || bytes % 16) throw std::runtime_error("a bulk copy is not whole 16 bytes");
  Barrier& b = current->barriers.at(barrier);
  if (eager) std::memcpy(to, from, bytes);
  b.copies.push_back({to, eager ? nullptr : from, bytes});
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait_for(emulator::block().whole, emulator::current->threads); }
inline void __syncwarp() { emulator::wait_for(emulator::block().warps[emulator::fiber().thread / 32], 32); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  emulator::Words words{};
  std::memcpy(words.data(), &value, sizeof value);
  const int lane = emulator::fiber().thread % 32;
  const emulator::Words* all = emulator::exchange(words);
  std::memcpy(&value, all[lane ^ lanes].data(), sizeof value);
  return value;
}

namespace cai {

inline uint8_t* shared_memory() { return emulator::block().start(); }

inline void wait_for_previous_kernel() {
  emulator::wait_until([] { return emulator::previous == nullptr; });
}
inline void let_next_kernel_start() {}

using CopyBarrier = uint64_t;

inline void init_barrier(CopyBarrier* barrier, int arrivals = 1) {
  emulator::Barrier made;
  made.arrivals = arrivals;
  if (!emulator::current->barriers.emplace(barrier, made).second) throw std::runtime_error("a barrier is made twice");
}
inline void publish_barriers() {}

inline void arrive_at(CopyBarrier* barrier) {
  emulator::Barrier& b = emulator::current->barriers.at(barrier);
  if (b.arrived == b.arrivals) throw std::runtime_error("more arrive at a barrier than it waits for");
  ++b.arrived;
  if (b.copies.empty() && b.complete()) b.arrived = 0, ++b.phase;
}

inline void arrive_in_block(CopyBarrier* barrier, int rank) {
  const auto at = reinterpret_cast<uint8_t*>(barrier) - shared_memory();
  if (emulator::current->meeting.phase < 1) throw std::runtime_error("another block's barrier is used before it is made");
  arrive_at(reinterpret_cast<CopyBarrier*>(emulator::current->blocks.at(rank).start() + at));
}

inline void expect_bytes(CopyBarrier* barrier, int bytes) {
  emulator::Barrier& b = emulator::current->barriers.at(barrier);
  if (b.arrived == b.arrivals) throw std::runtime_error("a barrier is armed again before its phase has ended");
  ++b.arrived;
  b.announced += bytes;
}

template <bool kOnce>
inline void copy_bulk(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
  const auto& own = emulator::block().shared;
  if (static_cast<uint8_t*>(shared) < own.data() || static_cast<uint8_t*>(shared) + bytes > own.data() + own.size())
    throw std::runtime_error("a bulk copy leaves shared memory");
  emulator::bring(static_cast<uint8_t*>(shared), global, bytes, barrier);
}

inline void copy_bulk_to(void* shared, const void* global, int bytes, CopyBarrier* barrier, int blocks) {
  emulator::Cluster& cluster = *emulator::current;
  if (cluster.meeting.phase < 1) throw std::runtime_error("another block's memory is written before it is known to run");
  const auto to = static_cast<uint8_t*>(shared) - shared_memory(), at = reinterpret_cast<uint8_t*>(barrier) - shared_memory();
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    if ((blocks >> rank & 1) == 0) continue;
    uint8_t* start = cluster.blocks[rank].start();
    if (to < 0 || to + bytes > static_cast<int64_t>(cluster.blocks[rank].shared.size()))
      throw std::runtime_error("a bulk copy leaves shared memory");
    emulator::bring(start + to, global, bytes, start + at);
  }
  if (blocks >> cluster.blocks.size() != 0) throw std::runtime_error("a bulk copy to a block that there is not");
}

inline void wait_for_phase(CopyBarrier* barrier, uint32_t parity) {
  emulator::Barrier& b = emulator::current->barriers.at(barrier);
  emulator::wait_until([&b, parity] {
    if (b.phase % 2 == static_cast<int>(parity) && b.complete()) {
      for (const emulator::Copy& c : b.copies)
        if (c.from != nullptr) std::memcpy(c.to, c.from, c.bytes);
      b.copies.clear();
      b.arrived = b.announced = 0;
      ++b.phase;
    }
    return b.phase % 2 != static_cast<int>(parity);
  });
}

inline void arrive_at_cluster() {
  emulator::current->meeting.arrive(emulator::current->threads * static_cast<int>(emulator::current->blocks.size()));
}
inline void wait_for_cluster() {
  emulator::Cluster& cluster = *emulator::current;
  const int wanted = ++emulator::fiber().clusters_met;
  emulator::wait_until([&cluster, wanted] { return cluster.meeting.phase >= wanted; });
}

inline void store_in_block(float* shared, int rank, float value) {
  const auto offset = reinterpret_cast<uint8_t*>(shared) - shared_memory();
  emulator::Cluster& cluster = *emulator::current;
  if (cluster.meeting.phase < 1) throw std::runtime_error("another block's memory is written before it is known to run");
  std::memcpy(cluster.blocks.at(rank).start() + offset, &value, sizeof value);
}

template <typename T>
float number_of(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T number;
  std::memcpy(&number, &bits, 2);
  return static_cast<float>(number);
}

template <typename T>
uint32_t pair_of(float low, float high) {
  const T numbers[2] = {T(low), T(high)};
  uint32_t pair;
  std::memcpy(&pair, numbers, 4);
  return pair;
}

inline int exponent_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const int biased = static_cast<int>(bits >> 23 & 255);
  return biased != 0 ? biased - 127 : std::ilogb(v);
}

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return power;
}

// The sum of c and 16 products as the tensor cores form it; numbers that are not finite as float64 does.
inline float fused_sum(float c, const float (&left)[16], const float (&right)[16]) {
  double terms[17] = {c};
  double plain = c;
  int largest = c != 0 ? exponent_of(c) : INT_MIN;
  for (int i = 0; i < 16; ++i) {
    const double term = static_cast<double>(left[i]) * right[i];
    terms[i + 1] = term;
    plain += term;
    // A product's exponent is that of its factors together: its own may be one more.
    if (term != 0) largest = std::max(largest, exponent_of(left[i]) + exponent_of(right[i]));
  }
  if (!std::isfinite(plain) || largest == INT_MIN) return static_cast<float>(plain);
  const double scale = power_of_two(25 - largest);
  int64_t sum = 0;
  for (const double term : terms) sum += static_cast<int64_t>(term * scale);
  const double exact = static_cast<double>(sum) * power_of_two(largest - 25);
  const auto nearest = static_cast<float>(exact);
  return std::abs(static_cast<double>(nearest)) > std::abs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <typename T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulator::fiber().thread % 32, g = lane / 4, t = lane % 4;
  const emulator::Words* all = emulator::exchange({a[0], a[1], a[2], a[3], b0, b1});
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float left[16], right[16];
    for (int slot = 0; slot < 16; ++slot) {
      const int from = slot % 8 / 2, high = slot / 8;
      left[slot] = number_of<T>(all[row % 8 * 4 + from][row / 8 + 2 * high], slot % 2);
      right[slot] = number_of<T>(all[column * 4 + from][4 + high], slot % 2);
    }
    c[i] = fused_sum(c[i], left, right);
  }
}

// What a matrix descriptor says, read as the PTX ISA has it: bits 0-13 the start, 32-45 the distance between groups of eight rows,
// both in 16 bytes, 62-63 the swizzle, of which 2 is the one of 64 bytes: bits 4 and 5 of an address change by its bits 7 and 8.
inline const uint8_t* described(uint64_t descriptor, int row, int byte) {
  const uint32_t start = (descriptor & 0x3fff) << 4, groups = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 2 || (descriptor >> 49 & 7) != 0) throw std::runtime_error("not the swizzle that panels have");
  uint32_t address = start + row / 8 * groups + row % 8 * 64 + byte;
  address ^= (address >> 7 & 3) << 4;
  return emulator::block().start() + address;
}

constexpr int kBlocksAhead = 2;

inline void begin_products() { emulator::fiber().began = true; }

template <typename T, int kRows>
void multiply_rows(float (&c)[kRows / 8][4], const uint32_t (&a)[4], const uint8_t* block, int half, bool add) {
  emulator::Fiber& f = emulator::fiber();
  if (!f.began) throw std::runtime_error("products begin without a fence");
  const auto place = static_cast<uint32_t>(block - emulator::block().start());
  if (place % 512 != 0) throw std::runtime_error("a block of a panel does not begin where its pattern does");
  f.products.push_back({c, a, panel_descriptor(place, half), kRows, add});
  f.multiply = [](const emulator::RowProduct& p) {
    const int lane = emulator::fiber().thread % 32, g = lane / 4, t = lane % 4;
    for (int eight = 0; eight < p.rows / 8; ++eight) {
      uint32_t b[2];
      for (int high = 0; high < 2; ++high) std::memcpy(&b[high], described(p.b, 8 * eight + g, 16 * high + 4 * t), 4);
      float (&sums)[4] = p.c[eight];
      if (!p.add) std::fill(sums, sums + 4, 0.0f);
      multiply_accumulate<T>(sums, {p.a[0], p.a[1], p.a[2], p.a[3]}, b[0], b[1]);
    }
  };
  if (!emulator::warp_groups) {  // one after another, as they come
    f.multiply(f.products.back());
    f.products.pop_back();
  }
}

inline void wait_for_products() {
  emulator::Fiber& f = emulator::fiber();
  for (const emulator::RowProduct& p : f.products) f.multiply(p);
  f.products.clear();
  f.began = false;
}

template <int kRegisters>
void keep_registers() {}
template <int kRegisters>
void take_registers() {}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t picks) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (picks >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}

inline uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) { return (a & mask) | bits; }

template <typename T>
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  return pair_of<T>(number_of<T>(a, 0) - number_of<T>(b, 0), number_of<T>(a, 1) - number_of<T>(b, 1));
}

inline uint32_t multiply_bfloat16_pairs(uint32_t a, uint32_t b) {
  using T = __nv_bfloat16;
  return pair_of<T>(number_of<T>(a, 0) * number_of<T>(b, 0), number_of<T>(a, 1) * number_of<T>(b, 1));
}

inline float gated(float gate, float up) { return gate / (1.0f + std::exp(-gate)) * up; }
inline float inverse_root(float v) { return 1.0f / std::sqrt(v); }

}  // namespace cai
