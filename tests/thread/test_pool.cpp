// The pool beside a neighbour that takes its processors away.
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "thread/pool.h"
#include "thread/processor.h"

namespace lockstep {
namespace {

bool same(const cpu_set_t& a, const cpu_set_t& b) { return CPU_EQUAL(&a, &b) != 0; }

// Jobs of short chunks, one after the other, for some time; every chunk has to be computed once.
void work_for(Pool& pool, std::chrono::milliseconds time) {
  constexpr int64_t kChunks = 8;
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
    std::atomic<int64_t> sum{0};
    pool.run(kChunks, [&](int64_t chunk) {
      volatile int64_t spin = 0;
      while (spin < 5000) spin = spin + 1;
      sum += chunk + 1;
    });
    ASSERT_EQ(sum, kChunks * (kChunks + 1) / 2);
  }
}

TEST(Pool, ComputesBesideNeighboursAndLeavesThreadsWhereTheyMayRun) {
  const cpu_set_t allowed = allowed_processors(0);
  Pool pool(2);
  {
    std::atomic<bool> stop{false};
    std::vector<std::jthread> neighbours;
    for (int i = 0; i < CPU_COUNT(&allowed) && i < 8; ++i) {
      neighbours.emplace_back([&] {
        while (!stop) continue;
      });
    }
    work_for(pool, std::chrono::milliseconds(500));
    stop = true;
  }
  // Workers that were kept on one processor are let go after the first job that comes a while later; other
  // processes may get in between.
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (bool everywhere = false; !everywhere;) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << "a thread is still kept on a processor";
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    work_for(pool, std::chrono::milliseconds(1));
    std::atomic<int> present{0}, free{0};
    pool.run(2, [&](int64_t) {  // one chunk for each thread
      ++present;
      while (present < 2) std::this_thread::yield();
      free += same(allowed_processors(0), allowed);
    });
    everywhere = free == 2;
  }
  EXPECT_TRUE(same(allowed_processors(0), allowed));
}

TEST(Pool, RunTimeGrowsWhileAThreadRuns) {
  const pid_t self = gettid();
  const int64_t before = run_time(self);
  ASSERT_GE(before, 0);
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  while (std::chrono::steady_clock::now() < end) continue;
  EXPECT_GT(run_time(self), before);
  EXPECT_EQ(run_time(4194303), -1);  // the last number there is, which no thread has
}

TEST(Pool, ExceptionOfAChunkReachesTheCaller) {
  Pool pool(2);
  EXPECT_THROW(pool.run(100,
                        [](int64_t chunk) {
                          if (chunk == 42) throw std::runtime_error("chunk");
                        }),
               std::runtime_error);
  work_for(pool, std::chrono::milliseconds(1));
}

}  // namespace
}  // namespace lockstep
