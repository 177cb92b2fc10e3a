// A small pool for parallel regions of microseconds. The caller takes part; workers spin for a short while after a region,
// since the next one of the same forward pass follows at once, and then sleep.
//
// Nobody waits for a worker that has not begun: work is dealt in pieces, the caller does what no one else has claimed, and
// only pieces that were claimed are waited for. So a worker whose processor is busy with something else costs its help, not
// the region's time.
#pragma once

#include <atomic>
#include <cstdint>

namespace cai {

// What a region's threads share.
class Region {
 public:
  // Claims pieces of a phase (0 or 1) until `total` are gone, and runs f(piece) on each.
  template <class F>
  void deal(int phase, int64_t total, F&& f) {
    for (int64_t p = claimed_[phase].value.fetch_add(1, std::memory_order_relaxed); p < total;
         p = claimed_[phase].value.fetch_add(1, std::memory_order_relaxed)) {
      f(p);
      finished_[phase].value.fetch_add(1, std::memory_order_release);
    }
  }
  // Until every piece of a phase is finished, by whomever.
  void wait(int phase, int64_t total) const;

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  Counter claimed_[2], finished_[2];
};

using RegionFunction = void (*)(void* context, Region& region);

// Runs f on the caller and on up to `threads` - 1 workers, and returns when all that began have finished. Regions of several
// callers take turns.
void run_region(int threads, RegionFunction f, void* context);

template <class F>
void parallel(int threads, F&& f) {
  run_region(threads, [](void* context, Region& region) { (*static_cast<F*>(context))(region); }, &f);
}

void set_num_threads(int n);  // at least 1; takes effect at the next region
int num_threads();

}  // namespace cai
