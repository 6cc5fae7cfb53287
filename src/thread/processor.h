// Where the system runs the threads of this process.
#pragma once

#include <sched.h>
#include <sys/types.h>

#include <cstdint>

namespace lockstep {

/// Threads that are worth using here: the processors this process may run on, bounded by the
/// cgroup's CPU quota.
int usable_threads();

/// Nanoseconds that thread `id` (gettid) of this process has run; -1 if there is none.
int64_t run_time(pid_t id);

/// Processors on which thread `id` may run; none if there is no such thread.
cpu_set_t allowed_processors(pid_t id);

/// Lets thread `id` run on these only. No processor at all, or none that the system permits, changes nothing.
void allow_processors(pid_t id, const cpu_set_t& allowed);

/// Keeps thread `id` on `processor`.
void keep_thread(pid_t id, int processor);

/// Moves thread `id` to `processor`, from where the system may move it on as before.
void move_thread(pid_t id, int processor);

}  // namespace lockstep
