// Enough of a CUDA device on a CPU to run a kernel and hold its results against a reference: threads are fibers that run in
// turn until a barrier, so a missing or divergent barrier gives wrong numbers or an error, every time alike. Asynchronous
// copies are made when they are waited for, not before, so a missing wait is seen too.
//
// Include before the kernel. Supports one-dimensional blocks, static shared memory, __syncthreads, __syncwarp,
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
#include <deque>
#include <exception>
#include <functional>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

namespace emulator {

enum class Wait { kNothing, kWarp, kBlock };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  Wait wait = Wait::kNothing;
  int turn = 0;
  std::vector<Copy> asked;              // copies not yet in a group
  std::deque<std::vector<Copy>> groups;  // not yet made
};

using Words = std::array<uint32_t, 8>;

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int running = 0;
  std::vector<Words> mail[2];  // words in exchange within a warp, two sets taken in turn
  std::function<void()> body;
  std::exception_ptr failure;
};

inline Block* current = nullptr;
inline uint3 thread_index, block_index, grid_size;

inline Fiber& fiber() { return current->fibers[current->running]; }

inline void wait_at(Wait what) {
  fiber().wait = what;
  swapcontext(&fiber().context, &current->scheduler);
}

inline void enter() {
  try {
    current->body();
    for (const auto& group : fiber().groups)
      if (!group.empty()) throw std::runtime_error("a thread left before its copies were made");
    if (!fiber().asked.empty()) throw std::runtime_error("a thread left copies in no group");
  } catch (...) {
    current->failure = std::current_exception();
  }
  fiber().done = true;
}

// Runs the threads [first, first + 32) until all of them wait for the block or are done.
inline void run_warp(Block& block, int first) {
  const int end = first + 32 < static_cast<int>(block.fibers.size()) ? first + 32 : static_cast<int>(block.fibers.size());
  for (;;) {
    int waiting = 0;
    for (int t = first; t < end; ++t) {
      Fiber& f = block.fibers[t];
      if (!f.done && f.wait == Wait::kNothing) {
        block.running = t;
        thread_index = {static_cast<unsigned>(t), 0, 0};
        swapcontext(&block.scheduler, &f.context);
        if (block.failure) std::rethrow_exception(block.failure);
      }
      waiting += !f.done && f.wait == Wait::kWarp;
    }
    if (waiting == 0) return;
    if (waiting != end - first) throw std::runtime_error("threads of a warp wait at different barriers");
    for (int t = first; t < end; ++t) block.fibers[t].wait = Wait::kNothing;
  }
}

inline void run_block(int threads, std::function<void()> body) {
  Block block;
  block.body = std::move(body);
  block.fibers.resize(threads);
  for (auto& set : block.mail) set.assign(threads, Words{});
  current = &block;
  for (Fiber& f : block.fibers) {
    f.stack.resize(64 << 10);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = &block.scheduler;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    for (int first = 0; first < threads; first += 32) run_warp(block, first);
    int done = 0;
    for (Fiber& f : block.fibers) {
      done += f.done;
      f.wait = Wait::kNothing;
    }
    if (done == threads) break;
    if (done != 0) throw std::runtime_error("some threads left while others wait at a barrier");
  }
  current = nullptr;
}

// Run `kernel()` for every thread of every block.
inline void launch(int blocks, int threads, const std::function<void()>& kernel) {
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  for (int b = 0; b < blocks; ++b) {
    block_index = {static_cast<unsigned>(b), 0, 0};
    run_block(threads, kernel);
  }
}

// Every thread of the warp hands in words; afterwards each may read those of all, until it exchanges twice more.
inline const Words* exchange(const Words& words) {
  Fiber& f = fiber();
  auto& set = current->mail[f.turn];
  f.turn ^= 1;
  const int thread = current->running;
  set[thread] = words;
  wait_at(Wait::kWarp);
  return &set[thread / 32 * 32];
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::wait_at(emulator::Wait::kBlock); }
inline void __syncwarp() { emulator::wait_at(emulator::Wait::kWarp); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  emulator::Words words{};
  std::memcpy(words.data(), &value, sizeof value);
  const int lane = emulator::current->running % 32;
  const emulator::Words* all = emulator::exchange(words);
  std::memcpy(&value, all[lane ^ lanes].data(), sizeof value);
  return value;
}

inline uint4 __ldcs(const uint4* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) throw std::runtime_error("a 16-byte load is not aligned");
  return *from;
}

namespace cai {

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <int BYTES>
void copy_async(void* shared, const void* global, int valid) {
  if (reinterpret_cast<uintptr_t>(shared) % BYTES || reinterpret_cast<uintptr_t>(global) % BYTES)
    throw std::runtime_error("an asynchronous copy is not aligned");
  if (valid < 0 || valid > BYTES) throw std::runtime_error("an asynchronous copy of more than its width");
  emulator::fiber().asked.push_back({shared, global, BYTES, valid});
}

inline void commit_copies() {
  emulator::Fiber& f = emulator::fiber();
  f.groups.push_back(std::move(f.asked));
  f.asked.clear();
}

template <int N>
void wait_for_copies() {
  auto& groups = emulator::fiber().groups;
  while (groups.size() > N) {
    for (const emulator::Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      std::memcpy(c.to, c.from, c.valid);
    }
    groups.pop_front();
  }
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
  const int lane = emulator::current->running % 32, g = lane / 4, t = lane % 4;
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
