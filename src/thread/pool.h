// Worker threads that share out small chunks of one job at a time.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

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
  using Clock = std::chrono::steady_clock;
  struct Worker {
    std::thread thread;
    std::atomic<pid_t> id{0};
    std::atomic<bool> inside{false};  // a job
    std::atomic<int> processor{0};    // where it came in
    std::mutex mutex;                 // of what follows
    bool guest = false;               // moved to the processor of the thread that waits for it
    bool kept = false;                // on one processor, until `kept_until`
    Clock::time_point kept_until;
    cpu_set_t allowed{};  // its processors, where it is kept on one
  };

  void work(const std::function<void(int64_t)>& job, int64_t chunks);
  void worker_loop(Worker& self);
  // Beside a neighbour that has a processor to itself half of the time, the system would leave the thread
  // that it has interrupted waiting there for milliseconds, and the other one waiting for it on a processor
  // that does nothing. A caller that waits lets an interrupted worker finish on its own processor; a worker
  // without work changes places with an interrupted caller, so that the neighbour costs the one that can be
  // done without.
  void lend_processor();
  void change_places(Worker& self, uint32_t seen);
  void keep(Worker& worker, int processor);
  void stop();

  std::deque<Worker> workers_;
  std::mutex callers_;  // one job at a time
  // The job. `generation_` is odd while it is open to workers; `active_` counts those inside.
  const std::function<void(int64_t)>* job_ = nullptr;
  int64_t chunks_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> active_{0};
  std::atomic<pid_t> caller_{0};
  std::atomic<int> caller_processor_{-1};  // where it started the job; -1 once a worker has looked after it
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
  std::mutex error_mutex_;
};

}  // namespace lockstep
