// A small pool for parallel regions of microseconds. The caller takes part as thread 0; workers spin for a short while
// after a region, since the next one of the same forward pass follows at once, and then sleep.
#pragma once

#include <atomic>
#include <cstdint>

namespace cai {

// What a region's threads share. `next` hands out work in small pieces; `sync` separates the phases.
class Region {
 public:
  explicit Region(int threads) : threads_(threads) {}
  int threads() const { return threads_; }
  // The next unclaimed piece of phase `phase` (0 to kPhases - 1); the caller stops at its own count of pieces.
  int64_t next(int phase) { return counters_[phase].value.fetch_add(1, std::memory_order_relaxed); }
  // Every thread of the region arrives, then all go on.
  void sync();
  static constexpr int kPhases = 4;

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  int threads_;
  Counter counters_[kPhases];
  alignas(64) std::atomic<int> arrived_{0};
  std::atomic<int> generation_{0};
};

using RegionFunction = void (*)(void* context, Region& region, int thread);

// Runs f on up to `threads` threads (0: all of the pool) and returns when each has finished. Regions of several callers
// take turns.
void run_region(int threads, RegionFunction f, void* context);

template <class F>
void parallel(int threads, F&& f) {
  run_region(
      threads, [](void* context, Region& region, int thread) { (*static_cast<F*>(context))(region, thread); }, &f);
}

void set_num_threads(int n);  // at least 1; takes effect at the next region
int num_threads();

}  // namespace cai
