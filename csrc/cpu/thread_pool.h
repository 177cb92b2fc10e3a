// A small pool for parallel regions of microseconds to milliseconds: one operation, or a whole recorded forward pass.
//
// Every thread of a region runs the same function and meets the same sequence of phases. A phase is divided into
// pieces. Each thread has its own run of pieces, so it streams contiguous memory; after that it helps with the other
// threads' runs. The caller takes part; workers spin for a short while after a region, since the next one often follows
// at once, and then sleep.
//
// The threads wait only for claimed pieces, and a late worker skips the phases that are over. So a worker whose
// processor is busy does not delay the region.
//
// An exception in any thread ends the region: the other threads leave at their next wait, and run_region throws the first
// exception in its caller. A forked child starts a pool of its own; fork() waits for the region that runs.
#pragma once

#include <atomic>
#include <cstdint>

namespace cai {

// A count for one region. The high half holds the region's number, so no counter must be reset between regions.
class TaggedCounter {
 public:
  // Adds one and returns the count before, unless it has reached `limit`: then returns `limit`.
  int64_t claim(uint32_t region, int64_t limit) {
    uint64_t seen = value_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t count = count_of(seen, region);
      if (count >= limit) return limit;
      if (value_.compare_exchange_weak(seen, tagged(region, count + 1), std::memory_order_relaxed)) return count;
    }
  }
  void add(uint32_t region) {
    uint64_t seen = value_.load(std::memory_order_relaxed);
    while (!value_.compare_exchange_weak(seen, tagged(region, count_of(seen, region) + 1), std::memory_order_acq_rel,
                                         std::memory_order_relaxed)) {
    }
  }
  int64_t count(uint32_t region) const { return count_of(value_.load(std::memory_order_acquire), region); }

 private:
  static int64_t count_of(uint64_t value, uint32_t region) { return value >> 32 == region ? value & 0xffffffffu : 0; }
  static uint64_t tagged(uint32_t region, int64_t count) {
    return static_cast<uint64_t>(region) << 32 | static_cast<uint64_t>(count);
  }
  alignas(64) std::atomic<uint64_t> value_{0};
};

// Thrown by a wait in a region in which another thread has failed. It only unwinds its own thread.
struct RegionFailed {};

// One thread's part in a region. failed: set when any thread of the region has thrown.
class Team {
 public:
  Team(int rank, int threads, uint32_t region, TaggedCounter* counters, int64_t phases, const std::atomic<bool>* failed)
      : rank_(rank), threads_(threads), region_(region), counters_(counters), phases_(phases), failed_(failed) {}

  int rank() const { return rank_; }
  int threads() const { return threads_; }

  // The first piece of this thread's own run of a phase of `total` pieces.
  int64_t own_begin(int64_t total) const { return run_begin(total, rank_); }
  int64_t own_end(int64_t total) const { return run_begin(total, rank_ + 1); }

  // The next phase: runs f(piece) on the pieces that this thread claims. If f reads what other threads wrote in the
  // last phase, call sync() first.
  template <class F>
  void deal(int64_t total, F&& f) {
    total_ = total;
    if (threads_ == 1) {
      for (int64_t p = 0; p < total; ++p) f(p);
      return;
    }
    TaggedCounter* c = next_phase();
    for (int k = 0; k < threads_; ++k) {
      const int owner = (rank_ + k) % threads_;
      const int64_t begin = run_begin(total, owner), size = run_begin(total, owner + 1) - begin;
      for (int64_t i = c[owner].claim(region_, size); i < size; i = c[owner].claim(region_, size)) {
        f(begin + i);
        c[threads_].add(region_);
      }
    }
  }

  // Spins until all pieces of the last phase are done; calls f() while spinning.
  template <class F>
  void sync(F&& meanwhile) {
    if (threads_ == 1) return;
    wait_for([&] {
      if (finished()) return true;
      meanwhile();
      return finished();
    });
  }
  void sync() {
    sync([] {});
  }

  // Counters that a region of so many phases needs.
  static int64_t counters(int threads, int64_t phases) { return phases * (threads + 1); }

 private:
  int64_t run_begin(int64_t total, int owner) const { return total * owner / threads_; }
  bool finished() const { return counters_[(phase_ - 1) * (threads_ + 1) + threads_].count(region_) >= total_; }
  TaggedCounter* next_phase();
  template <class Done>
  void wait_for(Done done) const {
    for (int i = 0; !done(); ++i) {
      if (failed_->load(std::memory_order_acquire)) throw RegionFailed{};  // a piece may never be finished
      pause(i);
    }
  }
  static void pause(int spins);

  const int rank_, threads_;
  const uint32_t region_;
  TaggedCounter* const counters_;  // per phase: one for each thread's run, then the finished pieces
  const int64_t phases_;
  const std::atomic<bool>* const failed_;
  int64_t phase_ = 0, total_ = 0;
};

using RegionFunction = void (*)(void* context, Team& team);

// Runs f on the caller and on up to `threads` - 1 workers, and returns when all that began have finished. At most `phases`
// phases. Regions of several callers take turns. Throws the first exception that a thread of the region threw.
void run_region(int threads, int64_t phases, RegionFunction f, void* context);

template <class F>
void parallel(int threads, int64_t phases, F&& f) {
  run_region(threads, phases, [](void* context, Team& team) { (*static_cast<F*>(context))(team); }, &f);
}

void set_num_threads(int n);  // at least 1; takes effect at the next region
int num_threads();

}  // namespace cai
