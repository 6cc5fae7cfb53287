#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>

#include "cli.h"
#include "errors.h"

namespace lockstep::cli {
namespace {

int shown = -1;  // percent; -1: no bar

}  // namespace

void show_progress(const std::string& what, double share) {
  constexpr int kWidth = 30;
  if (isatty(STDERR_FILENO) == 0) return;
  const int percent = static_cast<int>(std::clamp(share, 0.0, 1.0) * 100);
  if (percent == 100) return hide_progress();
  if (percent == shown) return;
  shown = percent;
  const int filled = percent * kWidth / 100;
  std::fprintf(stderr, "\r%s [%s%s] %3d %%", what.c_str(), std::string(filled, '#').c_str(),
               std::string(kWidth - filled, '.').c_str(), percent);
}

std::function<void(double)> interruptible(const std::string& what) {
  catch_interrupts(true);
  return [what](double share) {
    show_progress(what, share);
    if (!interrupted()) return;
    hide_progress();
    throw CLI::RuntimeError(kInterrupted);
  };
}

bool show_prompt(int64_t done, int64_t all) {
  show_progress("Reading the prompt", static_cast<double>(done) / static_cast<double>(all));
  return !interrupted();
}

void hide_progress() {
  if (shown >= 0) std::fprintf(stderr, "\r\033[K");
  shown = -1;
}

}  // namespace lockstep::cli
