// The thread pool under stress: regions of one to six phases from several callers at once, of more and fewer pieces than
// threads, some with a piece that throws, with the number of threads changed between. The pieces write plain memory, so
// that ThreadSanitizer sees every hand-over that the pool does not order. Usage: pool_stress [REGIONS] (per caller).
// --race: pieces that write one place without order, which ThreadSanitizer must report. Exits 1 on a wrong result.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

namespace {

std::atomic<int> failures{0};
std::atomic<int64_t> helped{0};  // phases that a worker was there for

void expect(bool holds, const char* what) {
  if (!holds && failures.fetch_add(1) < 5) std::printf("FAILED %s\n", what);
}

int64_t sum_of_squares(int64_t n) { return (n - 1) * n * (2 * n - 1) / 6; }  // of 0 to n - 1

// A chain of phases, each reading all that the one before wrote, whichever thread wrote it. Every piece is to run once.
void chain(int threads, const std::vector<int64_t>& pieces, bool slow) {
  std::vector<std::vector<int64_t>> sums(pieces.size());
  std::vector<std::vector<int>> runs(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    sums[i].assign(pieces[i], 0);
    runs[i].assign(pieces[i], 0);
  }
  cai::parallel(threads, static_cast<int64_t>(pieces.size()), [&](cai::Team& team) {
    expect(team.rank() >= 0 && team.rank() < team.threads() && team.threads() <= threads, "a rank that is none");
    for (size_t i = 0; i < pieces.size(); ++i) {
      team.deal(pieces[i], [&](int64_t p) {
        // Time for the workers to come, or they would never be seen at work.
        if (slow && i == 0 && p == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
        ++runs[i][p];
        if (i == 0) {
          sums[i][p] = p * p;
        } else {
          for (int64_t s : sums[i - 1]) sums[i][p] += s;
        }
      });
      if (team.rank() != 0) helped.fetch_add(1, std::memory_order_relaxed);
      int64_t meanwhile = 0;
      if (i % 2) {
        team.sync([&] { ++meanwhile; });
      } else {
        team.sync();
      }
    }
  });
  int64_t want = sum_of_squares(pieces[0]);
  for (size_t i = 0; i < pieces.size(); ++i) {
    for (int64_t p = 0; p < pieces[i]; ++p) {
      expect(runs[i][p] == 1, "a piece did not run exactly once");
      expect(sums[i][p] == (i == 0 ? p * p : want), "a phase ran without all of the one before");
    }
    if (i > 0) want *= pieces[i];
  }
}

// One phase whose results the caller alone reads, after the region and without a sync.
void one_phase(int threads, int64_t pieces) {
  std::vector<int> runs(pieces, 0);
  cai::parallel(threads, 1, [&](cai::Team& team) { team.deal(pieces, [&](int64_t p) { ++runs[p]; }); });
  for (int n : runs) expect(n == 1, "a piece did not run exactly once");
}

// A piece that throws, on whichever thread runs it: the caller gets the exception, and no thread waits for that piece.
void failing(int threads, int64_t pieces, int64_t bad) {
  bool caught = false;
  try {
    cai::parallel(threads, 2, [&](cai::Team& team) {
      team.deal(pieces, [&](int64_t p) {
        if (p == bad) throw std::bad_alloc();
      });
      team.sync();
      team.deal(pieces, [](int64_t) {});
      team.sync();
    });
  } catch (const std::bad_alloc&) {
    caught = true;
  }
  expect(caught, "the exception of a piece was lost");
}

void caller(int number, int regions) {
  uint32_t state = 12345u + 977u * number;
  auto below = [&](uint32_t n) { return (state = state * 1664525u + 1013904223u) / 65536 % n; };
  for (int i = 0; i < regions; ++i) {
    const int threads = 1 + static_cast<int>(below(5));
    if (below(10) == 0) {
      const int64_t pieces = 1 + below(12);
      failing(threads, pieces, below(static_cast<uint32_t>(pieces)));
    } else if (below(3) == 0) {
      one_phase(threads, below(40));
    } else {
      std::vector<int64_t> pieces(1 + below(6));
      for (int64_t& n : pieces) n = below(8) == 0 ? 0 : 1 + below(12);
      chain(threads, pieces, below(4) == 0);
    }
    if (below(25) == 0) cai::set_num_threads(static_cast<int>(below(5)));  // 0 asks for 1
    // Now and then long enough for the workers to fall asleep.
    if (below(50) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void race() {
  int64_t total = 0;
  for (int i = 0; i < 200; ++i) {
    cai::parallel(3, 1, [&](cai::Team& team) {
      team.deal(30, [&](int64_t p) {
        total += p;
        std::this_thread::sleep_for(std::chrono::microseconds(10));
      });
    });
  }
  std::printf("%lld\n", static_cast<long long>(total));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--race") == 0) {
    cai::set_num_threads(3);
    race();
    return 0;
  }
  const int regions = argc > 1 ? std::atoi(argv[1]) : 1000;
  cai::set_num_threads(3);
  expect(cai::num_threads() == 3, "num_threads is not what was set");
  std::vector<std::thread> callers;
  for (int n = 0; n < 3; ++n) callers.emplace_back(caller, n, regions);
  for (auto& c : callers) c.join();
  expect(helped > 0, "no worker ever helped: nothing was tested");
  std::printf("%d regions, workers there for %lld phases, %d failures\n", 3 * regions,
              static_cast<long long>(helped.load()), failures.load());
  return failures ? 1 : 0;
}
