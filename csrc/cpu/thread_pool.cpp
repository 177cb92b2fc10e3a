#include "thread_pool.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
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

// Spins, then yields the processor: with fewer processors than threads the one waited for must get to run.
template <class Done>
inline void spin_until(Done done) {
  for (int i = 0; !done(); ++i) {
    if (i < 4096) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

constexpr auto kSpinTime = std::chrono::microseconds(200);

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), owner_(getpid()) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    if (owner_ != getpid()) {  // after a fork the threads exist in the parent only
      for (auto& w : workers_) w.detach();
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      epoch_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  int threads() const { return threads_; }
  pid_t owner() const { return owner_; }

  void run(int threads, RegionFunction f, void* context) {
    Region region(threads);
    if (threads == 1) {
      f(context, region, 0);
      return;
    }
    f_ = f;
    context_ = context;
    region_ = &region;
    active_ = threads;
    running_.store(threads_ - 1, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    f(context, region, 0);
    spin_until([&] { return running_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      wait_for_work(seen);
      seen = epoch_.load(std::memory_order_acquire);
      if (stop_) return;
      if (index < active_) f_(context_, *region_, index);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_work(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpinTime;
    for (int i = 0;; ++i) {
      if (epoch_.load(std::memory_order_acquire) != seen) return;
      relax();
      if (i % 64 == 63 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen; });
    sleeping_.fetch_sub(1, std::memory_order_relaxed);
  }

  const int threads_;
  const pid_t owner_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  alignas(64) std::atomic<uint64_t> epoch_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<int> sleeping_{0};
  bool stop_ = false;
  RegionFunction f_ = nullptr;
  void* context_ = nullptr;
  Region* region_ = nullptr;
  int active_ = 0;
};

struct State {
  std::mutex mutex;  // one region at a time
  std::unique_ptr<Pool> pool;
  std::atomic<int> wanted{0};
};

State& state() {
  // Never destroyed: worker threads may outlive the library's static objects at exit.
  static State* s = new State;
  return *s;
}

int default_threads() {
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

}  // namespace

void Region::sync() {
  if (threads_ == 1) return;
  const int generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
  } else {
    spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
  }
}

void run_region(int threads, RegionFunction f, void* context) {
  State& s = state();
  if (threads == 1) {
    Region region(1);
    f(context, region, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(s.mutex);
  const int wanted = num_threads();
  if (!s.pool || s.pool->threads() != wanted || s.pool->owner() != getpid()) {
    if (s.pool && s.pool->owner() != getpid()) s.pool.release();  // its threads stayed behind in the parent
    s.pool.reset();
    s.pool = std::make_unique<Pool>(wanted);
  }
  s.pool->run(threads <= 0 || threads > wanted ? wanted : threads, f, context);
}

void set_num_threads(int n) { state().wanted.store(n < 1 ? 1 : n); }

int num_threads() {
  const int n = state().wanted.load();
  return n > 0 ? n : default_threads();
}

}  // namespace cai
