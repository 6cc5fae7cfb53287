#include <atomic>
#include <csignal>

#include "cli.h"

namespace lockstep::cli {
namespace {

std::atomic<bool> seen{false};
static_assert(std::atomic<bool>::is_always_lock_free);  // or a handler may not touch it

void note(int) { seen = true; }
void note_once(int) {
  seen = true;
  std::signal(SIGINT, SIG_DFL);
}

}  // namespace

void catch_interrupts(bool once) { std::signal(SIGINT, once ? note_once : note); }
bool interrupted() { return seen; }
bool take_interrupt() { return seen.exchange(false); }

}  // namespace lockstep::cli
