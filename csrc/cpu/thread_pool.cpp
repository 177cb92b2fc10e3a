#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace cai {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins, then yields the processor: with fewer processors than threads, the awaited thread must get to run.
inline void spin(int spins) {
  if (spins < 4096) {
    relax();
  } else {
    std::this_thread::yield();
  }
}

#if defined(__linux__)
int current_cpu() { return sched_getcpu(); }

// The scheduler often wakes a worker on the waker's processor and may leave both there for many milliseconds, though
// another processor is idle. The region then takes twice as long. Excluding that processor from this thread's affinity
// for a moment moves the thread.
void leave_cpu(int cpu) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || !CPU_ISSET(cpu, &allowed) || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(cpu, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
int current_cpu() { return -1; }
void leave_cpu(int) {}
#endif

constexpr auto kSpinTime = std::chrono::microseconds(200);  // Python between two regions takes less

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_.store(true);
      ticket_.store(((epoch_ + 1) & 0xffffffffu) << 32);  // a new epoch, not open
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  int threads() const { return threads_; }

  void run(int threads, int64_t phases, RegionFunction f, void* context) {
    const size_t wanted = static_cast<size_t>(Team::counters(threads, phases));
    if (counters_.size() < wanted) counters_ = std::vector<TaggedCounter>(wanted);
    f_ = f;
    context_ = context;
    team_threads_ = threads;
    phases_ = phases;
    caller_cpu_ = current_cpu();
    helpers_.store(static_cast<uint64_t>(threads - 1), std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    epoch_ = (epoch_ + 1) & 0xffffffffu;
    if (epoch_ == 0) epoch_ = 1;  // 0 is the tag of counters that were never used
    ticket_.store(epoch_ << 32 | kOpen, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take_part(0);
    const uint64_t joined = ticket_.fetch_and(~kOpen, std::memory_order_acq_rel) & kJoined;
    for (int i = 0; left_.load(std::memory_order_acquire) != joined; ++i) spin(i);
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // The ticket: epoch in the high half, then whether the region is open, then how many workers have joined it. A worker reads
  // the region only after it has counted itself in.
  static constexpr uint64_t kOpen = uint64_t(1) << 31;
  static constexpr uint64_t kJoined = kOpen - 1;

  // Runs the region's function as thread `rank`. Its exception is kept for the caller, which throws it in run().
  void take_part(int rank) {
    try {
      Team team(rank, team_threads_, static_cast<uint32_t>(ticket_.load(std::memory_order_relaxed) >> 32), counters_.data(),
                phases_, &failed_);
      f_(context_, team);
    } catch (const RegionFailed&) {  // the thread that failed first has kept its exception
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true, std::memory_order_release);
    }
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      const uint64_t epoch = wait_for_epoch(seen);
      if (stop_.load(std::memory_order_acquire)) return;
      seen = epoch;
      uint64_t t = ticket_.load(std::memory_order_acquire);
      while (t >> 32 == epoch && (t & kOpen) && (t & kJoined) < helpers_.load(std::memory_order_relaxed)) {
        if (ticket_.compare_exchange_weak(t, t + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          if (caller_cpu_ >= 0 && current_cpu() == caller_cpu_) leave_cpu(caller_cpu_);
          take_part(static_cast<int>(t & kJoined) + 1);
          left_.fetch_add(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  uint64_t wait_for_epoch(uint64_t seen) {
    auto now = [&] { return ticket_.load(std::memory_order_seq_cst) >> 32; };
    const auto until = std::chrono::steady_clock::now() + kSpinTime;
    for (int i = 0;; ++i) {
      if (const uint64_t epoch = now(); epoch != seen) return epoch;
      if (i < 512) {
        relax();
      } else {
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() > until) break;
      }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return now() != seen || stop_.load(); });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
    return now();
  }

  const int threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  uint64_t epoch_ = 0;  // the caller's own count
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint64_t> left_{0};
  std::atomic<uint64_t> helpers_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // the first of this region, under mutex_
  RegionFunction f_ = nullptr;
  void* context_ = nullptr;
  int team_threads_ = 1;
  int caller_cpu_ = -1;
  int64_t phases_ = 0;
  std::vector<TaggedCounter> counters_;  // grows between regions only
};

struct State {
  std::mutex mutex;  // one region at a time
  std::unique_ptr<Pool> pool;
  std::atomic<int> wanted{0};
};

// Never destroyed: worker threads may outlive the library's static objects at exit.
State& state() {
  static State* s = [] {
    // fork() takes the mutex, so no region runs in the moment of the fork, and the child finds the mutex in order. The
    // pool's threads exist in the parent only: the child leaves the pool's memory alone and makes a new one.
    pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                   [] {
                     static_cast<void>(state().pool.release());
                     state().mutex.unlock();
                   });
    return new State;
  }();
  return *s;
}

int default_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

}  // namespace

TaggedCounter* Team::next_phase() {
  if (phase_ >= phases_) std::abort();  // a region that counted its phases wrongly would write past the counters
  return counters_ + phase_++ * (threads_ + 1);
}

void Team::pause(int spins) { spin(spins); }

void run_region(int threads, int64_t phases, RegionFunction f, void* context) {
  State& s = state();
  if (threads == 1) {
    Team alone(0, 1, 0, nullptr, 0, nullptr);
    f(context, alone);
    return;
  }
  std::lock_guard<std::mutex> lock(s.mutex);
  const int wanted = num_threads();
  if (!s.pool || s.pool->threads() != wanted) {
    s.pool.reset();
    s.pool = std::make_unique<Pool>(wanted);
  }
  s.pool->run(threads < wanted ? threads : wanted, phases, f, context);
}

void set_num_threads(int n) { state().wanted.store(n < 1 ? 1 : n); }

int num_threads() {
  const int n = state().wanted.load();
  return n > 0 ? n : default_threads();
}

}  // namespace cai
