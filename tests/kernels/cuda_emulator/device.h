// Enough of a CUDA device on a CPU to run a kernel and hold its results against a reference. The threads of a cluster of blocks
// are fibers that run in turn, each until it has to wait, so a missing or divergent barrier gives wrong numbers or an error,
// every time alike. Bulk copies are made when they are waited for, or at once where `eager` is set: a missing wait is seen in the
// one case, a slot that is filled again too early in the other.
//
// Include before the kernel. Supports one-dimensional blocks, clusters, dynamic shared memory, __syncthreads, __syncwarp,
// __shfl_xor_sync and, in its place, the functions of csrc/cuda/device.cuh.
#pragma once
#define CAI_DEVICE_FUNCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <array>
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

namespace emulator {

inline bool eager = false;
// What the kernel ahead does, last of all: run when the first thread waits for it.
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

// An mbarrier: one arrival and the bytes it expects end a phase.
struct Barrier {
  int phase = 0;
  bool armed = false;
  std::vector<Copy> copies;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  std::function<bool()> ready;  // empty: runs
  int block = 0, thread = 0, turn = 0;
  int clusters_met = 0;  // how often it has waited for its cluster
};

using Words = std::array<uint32_t, 8>;

struct Block {
  std::vector<uint8_t> shared;
  std::vector<Words> mail[2];  // words in exchange within a warp, two sets taken in turn
  std::vector<Meeting> warps;
  Meeting whole;

  uint8_t* start() { return shared.data() + (128 - reinterpret_cast<uintptr_t>(shared.data()) % 128) % 128; }
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
    b.shared.assign(shared_bytes + 128, 0xff);  // NaN until it is written
    b.warps.resize((threads + 31) / 32);
    for (auto& set : b.mail) set.assign(threads, Words{});
  }
  cluster.fibers.resize(blocks * threads);
  current = &cluster;
  for (int i = 0; i < blocks * threads; ++i) {
    Fiber& f = cluster.fibers[i];
    f.block = i / threads;
    f.thread = i % threads;
    f.stack.resize(64 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &cluster.scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (int left = blocks * threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < blocks * threads; ++i) {
      Fiber& f = cluster.fibers[i];
      if (f.done || (f.ready && !f.ready())) continue;
      moved = true;
      run(cluster, i);
      left -= f.done;
    }
    if (!moved) throw std::runtime_error("threads wait for what will not happen: a barrier that not all reach, or a copy");
  }
  for (const auto& [at, barrier] : cluster.barriers)
    if (barrier.armed) throw std::runtime_error("a block ended before its copies were waited for");
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

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait_for(emulator::block().whole, emulator::current->threads); }
inline void __syncwarp() { emulator::wait_for(emulator::block().warps[emulator::fiber().thread / 32], 32); }

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
  if (emulator::previous) emulator::previous();
  emulator::previous = nullptr;
}
inline void let_next_kernel_start() {}

using CopyBarrier = uint64_t;

inline void init_barrier(CopyBarrier* barrier) {
  if (!emulator::current->barriers.emplace(barrier, emulator::Barrier{}).second)
    throw std::runtime_error("a barrier is made twice");
}
inline void publish_barriers() {}

inline void copy_bulk(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    throw std::runtime_error("a bulk copy is not aligned");
  if (bytes <= 0 || bytes % 16) throw std::runtime_error("a bulk copy is not whole 16 bytes");
  const auto& own = emulator::block().shared;
  if (static_cast<uint8_t*>(shared) < own.data() || static_cast<uint8_t*>(shared) + bytes > own.data() + own.size())
    throw std::runtime_error("a bulk copy leaves shared memory");
  emulator::Barrier& b = emulator::current->barriers.at(barrier);
  if (b.armed) throw std::runtime_error("a barrier is armed again before its phase has ended");
  b.armed = true;
  if (emulator::eager) {
    std::memcpy(shared, global, bytes);
  } else {
    b.copies.push_back({shared, global, bytes});
  }
}

inline void wait_for_phase(CopyBarrier* barrier, uint32_t parity) {
  emulator::Barrier& b = emulator::current->barriers.at(barrier);
  emulator::wait_until([&b, parity] {
    if (b.phase % 2 == static_cast<int>(parity) && b.armed) {
      for (const emulator::Copy& c : b.copies) std::memcpy(c.to, c.from, c.bytes);
      b.copies.clear();
      b.armed = false;
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

template <typename T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulator::fiber().thread % 32, g = lane / 4, t = lane % 4;
  const emulator::Words* all = emulator::exchange({a[0], a[1], a[2], a[3], b0, b1});
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = 0;
    for (int slot = 0; slot < 16; ++slot) {
      const int from = slot % 8 / 2, high = slot / 8;
      const float left = number_of<T>(all[row % 8 * 4 + from][row / 8 + 2 * high], slot % 2);
      const float right = number_of<T>(all[column * 4 + from][4 + high], slot % 2);
      sum += static_cast<double>(left) * right;
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}

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
