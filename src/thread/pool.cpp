#include "thread/pool.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <system_error>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// Spins before sleeping: about the time between two operations of a decode step.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int usable_threads() {
  cpu_set_t set;
  int count = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof(set), &set) == 0) count = CPU_COUNT(&set);
  // cgroup v2: "quota period" in microseconds, or "max period".
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (file >> quota >> period && quota != "max" && period > 0) {
    count = std::min(count, static_cast<int>(std::lround(std::stod(quota) / period)));
  }
  return std::max(count, 1);
}

Pool::Pool(int threads) {
  const int count = threads > 0 ? threads : usable_threads();
  try {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { worker_loop(); });
  } catch (const std::system_error&) {
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
  for (auto& worker : workers_) worker.join();
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

void Pool::worker_loop() {
  uint32_t seen = 0;
  while (true) {
    for (int spin = 0; spin < kSpins && generation_.load() == seen; ++spin) pause();
    generation_.wait(seen);
    seen = generation_.load();
    if (stop_) return;
    if (seen % 2 == 0) continue;
    // Enter first, then look again: either this sees the job closed, or the caller sees it inside.
    active_.fetch_add(1);
    if (generation_.load() == seen) work(*job_, chunks_);
    if (active_.fetch_sub(1) == 1) active_.notify_one();
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
    generation_.fetch_add(1);  // odd: open
    generation_.notify_all();
    work(job, chunks);
    generation_.fetch_add(1);  // even: closed; a worker that has not come yet stays out
    int inside = active_.load();
    for (int spin = 0; inside != 0 && spin < kSpins; ++spin) {
      pause();
      inside = active_.load();
    }
    for (; inside != 0; inside = active_.load()) active_.wait(inside);
  }
  if (error_) std::rethrow_exception(error_);
}

}  // namespace lockstep
