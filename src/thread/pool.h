// Worker threads that share out small chunks of one job at a time.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace lockstep {

/// A fixed set of threads. Chunks are taken from a shared counter, so a thread that the system
/// interrupts costs its current chunk and no more. Which thread computes a chunk never matters to
/// the result: chunks write disjoint outputs.
class Pool {
 public:
  /// `threads` includes the calling one; 0 chooses from the machine (affinity, cgroup quota).
  /// Error `invalid_argument` if the system does not allow as many.
  explicit Pool(int threads = 0);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Calls job(chunk) for every chunk in [0, chunks), in any order, and returns when all are done.
  /// Jobs of several callers run one after the other. An exception of a chunk is rethrown here.
  void run(int64_t chunks, const std::function<void(int64_t)>& job);

 private:
  void work(const std::function<void(int64_t)>& job, int64_t chunks);
  void worker_loop();
  void stop();

  std::vector<std::thread> workers_;
  std::mutex callers_;  // one job at a time
  // The job. `generation_` is odd while it is open to workers; `active_` counts those inside.
  const std::function<void(int64_t)>* job_ = nullptr;
  int64_t chunks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> active_{0};
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

/// Threads that are worth using here: the processors this process may run on, bounded by the
/// cgroup's CPU quota.
int usable_threads();

}  // namespace lockstep
