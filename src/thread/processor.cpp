#include "thread/processor.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>

namespace lockstep {

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

int64_t run_time(pid_t id) {
  // What pthread_getcpuclockid makes of a thread, which may have ended here.
  const auto clock = static_cast<clockid_t>(~static_cast<unsigned>(id) << 3 | 6);
  timespec time{};
  if (clock_gettime(clock, &time) != 0) return -1;
  return time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

cpu_set_t allowed_processors(pid_t id) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(id, sizeof(set), &set) != 0) CPU_ZERO(&set);
  return set;
}

void allow_processors(pid_t id, const cpu_set_t& allowed) {
  sched_setaffinity(id, sizeof(allowed), &allowed);
}

void keep_thread(pid_t id, int processor) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  allow_processors(id, one);
}

void move_thread(pid_t id, int processor) {
  static std::mutex one_at_a_time;  // or one would take what the other does meanwhile for what was allowed
  const std::lock_guard lock(one_at_a_time);
  const cpu_set_t allowed = allowed_processors(id);
  keep_thread(id, processor);
  allow_processors(id, allowed);
}

}  // namespace lockstep
