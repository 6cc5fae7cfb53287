#include "thread/pool.h"

#include <sched.h>
#include <unistd.h>

#include <system_error>

#include "tensor/fail.h"
#include "thread/processor.h"

namespace lockstep {
namespace {

// Spins before sleeping: about the time between two operations of a decode step.
constexpr int kSpins = 2000;
// How long a worker stays on the processor that it shares with a neighbour after it was last held up there.
constexpr std::chrono::milliseconds kKept{100};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Whether thread `id` stands still while `waits`: the system has given its processor to another process.
// Takes some microseconds.
template <typename Waits>
bool stands_still(pid_t id, const Waits& waits) {
  const int64_t before = run_time(id);
  for (int spin = 0; spin < kSpins / 4 && waits(); ++spin) pause();
  return waits() && before >= 0 && run_time(id) == before;
}

}  // namespace

Pool::Pool(int threads) {
  const int count = threads > 0 ? threads : usable_threads();
  try {
    for (int i = 1; i < count; ++i) {
      Worker& worker = workers_.emplace_back();
      worker.thread = std::thread([this, &worker] { worker_loop(worker); });
    }
  } catch (const std::system_error&) {
    workers_.pop_back();
    const int made = this->threads();
    stop();
    fail(ErrorCode::invalid_argument, "[threads] number: expected one that the system allows, got {} of {}",
         made, count);
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_ = true;
  generation_.fetch_add(2);
  generation_.notify_all();
  for (Worker& worker : workers_) worker.thread.join();
}

void Pool::work(const std::function<void(int64_t)>& job, int64_t chunks) {
  for (int64_t chunk; (chunk = next_.fetch_add(1)) < chunks;) {
    try {
      job(chunk);
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
}

void Pool::worker_loop(Worker& self) {
  self.id = gettid();
  uint32_t seen = 0;
  while (true) {
    for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) pause();
    if (generation_.load() == seen) change_places(self, seen);
    generation_.wait(seen);
    seen = generation_.load();
    if (stop_) return;
    if (seen % 2 == 0) continue;
    // Enter first, then look again: either this sees the job closed, or the caller sees it inside.
    active_.fetch_add(1);
    self.processor = sched_getcpu();
    self.inside = true;
    if (generation_.load() == seen) work(*job_, chunks_);
    self.inside = false;
    if (active_.fetch_sub(1) == 1) active_.notify_one();
    const std::lock_guard lock(self.mutex);
    if (self.guest) {
      self.guest = false;
      keep_thread(self.id, self.processor);
    } else if (self.kept && Clock::now() > self.kept_until) {
      self.kept = false;
      allow_processors(self.id, self.allowed);
    }
  }
}

// Keeps a worker on `processor` for a while. Its mutex is held.
void Pool::keep(Worker& worker, int processor) {
  if (!worker.kept) worker.allowed = allowed_processors(worker.id);
  if (CPU_COUNT(&worker.allowed) == 0) return;  // more processors than a cpu_set_t holds: no way back
  worker.kept = true;
  worker.kept_until = Clock::now() + kKept;
  keep_thread(worker.id, processor);
}

void Pool::change_places(Worker& self, uint32_t seen) {
  const pid_t caller = caller_;
  if (!stands_still(caller, [&] { return generation_.load() == seen; })) return;
  const int here = sched_getcpu();
  const int there = caller_processor_.exchange(-1);  // one worker is enough
  if (there < 0 || there == here) return;
  move_thread(caller, here);
  const std::lock_guard lock(self.mutex);
  keep(self, there);
}

void Pool::lend_processor() {
  for (Worker& worker : workers_) {
    const auto inside = [&] { return worker.inside.load(); };
    if (!inside() || !stands_still(worker.id, inside)) continue;
    const std::lock_guard lock(worker.mutex);
    const int here = sched_getcpu();
    if (!worker.inside || worker.processor == here) continue;
    worker.guest = true;
    keep(worker, here);
    return;
  }
}

void Pool::run(int64_t chunks, const std::function<void(int64_t)>& job) {
  if (chunks <= 0) return;
  const std::lock_guard lock(callers_);
  error_ = nullptr;
  next_.store(0);
  if (chunks == 1 || workers_.empty()) {
    work(job, chunks);
  } else {
    job_ = &job;
    chunks_ = chunks;
    caller_ = gettid();
    caller_processor_ = sched_getcpu();
    generation_.fetch_add(1);  // odd: open
    generation_.notify_all();
    work(job, chunks);
    generation_.fetch_add(1);  // even: closed; a worker that has not come yet stays out
    int inside = active_.load();
    for (int spin = 0; inside != 0 && spin < kSpins; ++spin) {
      pause();
      inside = active_.load();
    }
    if (inside != 0) lend_processor();
    for (inside = active_.load(); inside != 0; inside = active_.load()) active_.wait(inside);
  }
  if (error_) std::rethrow_exception(error_);
}

}  // namespace lockstep
