// Enough of a CUDA device on a CPU to run a kernel and hold its results against a reference: threads are fibers that run in
// turn until a barrier, so a missing or divergent barrier gives wrong numbers or an error, every time alike.
//
// Include before the kernel. Supports one-dimensional blocks, static shared memory, __syncthreads, __shfl_xor_sync.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <vector>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)
#define __forceinline__ inline

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int barrier = 0;  // which call it waits in: the kind, so that mixing them is seen
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int running = 0;
  std::vector<uint32_t> lanes[2];  // values in exchange, two sets taken in turn
  std::vector<int> turn;
  std::function<void()> body;
  std::exception_ptr failure;
};

inline Block* current = nullptr;
inline uint3 thread_index, block_index;

inline void wait_at(int kind) {
  Fiber& fiber = current->fibers[current->running];
  fiber.barrier = kind;
  swapcontext(&fiber.context, &current->scheduler);
}

inline void enter() {
  try {
    current->body();
  } catch (...) {
    current->failure = std::current_exception();
  }
  current->fibers[current->running].done = true;
}

inline void run_block(int threads, std::function<void()> body) {
  Block block;
  block.body = std::move(body);
  block.fibers.resize(threads);
  for (auto& set : block.lanes) set.assign(threads, 0);
  block.turn.assign(threads, 0);
  current = &block;
  for (Fiber& fiber : block.fibers) {
    fiber.stack.resize(256 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (;;) {
    int done = 0;
    for (int t = 0; t < threads; ++t) {
      if (!block.fibers[t].done) {
        block.running = t;
        thread_index = {static_cast<unsigned>(t), 0, 0};
        swapcontext(&block.scheduler, &block.fibers[t].context);
      }
      done += block.fibers[t].done;
    }
    if (block.failure) std::rethrow_exception(block.failure);
    if (done == threads) break;
    if (done != 0) throw std::runtime_error("some threads left while others wait at a barrier");
    for (const Fiber& fiber : block.fibers)
      if (fiber.barrier != block.fibers[0].barrier) throw std::runtime_error("threads wait at different barriers");
  }
  current = nullptr;
}

// Run `kernel()` for every thread of every block.
inline void launch(int blocks, int threads, const std::function<void()>& kernel) {
  for (int b = 0; b < blocks; ++b) {
    block_index = {static_cast<unsigned>(b), 0, 0};
    run_block(threads, kernel);
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)

inline void __syncthreads() { emulator::wait_at(1); }

inline float __shfl_xor_sync(unsigned, float value, int lanes) {
  emulator::Block& block = *emulator::current;
  const int thread = block.running;
  auto& set = block.lanes[block.turn[thread]];
  block.turn[thread] ^= 1;
  std::memcpy(&set[thread], &value, sizeof value);
  emulator::wait_at(2);
  float other;
  std::memcpy(&other, &set[thread ^ lanes], sizeof other);
  return other;
}

inline uint4 __ldcs(const uint4* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) throw std::runtime_error("a 16-byte load is not aligned");
  return *from;
}
