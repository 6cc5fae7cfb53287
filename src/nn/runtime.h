// What every operation of a model runs on, chosen once when the model is loaded.
#pragma once

#include <algorithm>
#include <functional>

#include "kernels/kernels.h"
#include "lockstep/model.h"
#include "thread/pool.h"

namespace lockstep::nn {

struct Runtime {
  const kernels::Table* kernels = nullptr;
  Pool* pool = nullptr;
  Precision precision = Precision::exact;

  /// Calls rows(begin, end) for parts of [0, count), in parallel where `work` (operations a row)
  /// makes it worth a thread's while.
  void for_rows(int64_t count, int64_t work, const std::function<void(int64_t, int64_t)>& rows) const {
    constexpr int64_t kWorthwhile = 16384;
    const int64_t step = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(work, 1));
    const int64_t parts = (count + step - 1) / step;
    pool->run(parts, [&](int64_t part) { rows(part * step, std::min(count, (part + 1) * step)); });
  }
};

}  // namespace lockstep::nn
