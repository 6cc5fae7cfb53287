// The passes of a trace, and what each site holds.
#include "trace/passes.h"

#include <algorithm>

#include "tensor/fail.h"

namespace lockstep {

std::string axes_of(Site site) {
  switch (site) {
    case Site::q_proj:
    case Site::k_proj:
    case Site::v_proj:
    case Site::q_norm:
    case Site::k_norm:
    case Site::q_rope:
    case Site::k_rope:
    case Site::k_cache:
    case Site::v_cache:
    case Site::attn_ctx: return "T H D";
    case Site::scores:
    case Site::probs: return "T H K";
    case Site::expert_gate:
    case Site::expert_up:
    case Site::expert_act:
    case Site::expert_down: return "T E C";
    case Site::router_logits:
    case Site::router_weights: return "T E";
    default: return "T C";
  }
}

bool in_level(Site site, int level) {
  switch (site) {
    case Site::logits: return true;
    case Site::embed:
    case Site::attn_resid:
    case Site::ffn_resid:
    case Site::final_norm: return level >= 1;
    case Site::scores:
    case Site::probs:
    case Site::expert_gate:
    case Site::expert_up:
    case Site::expert_act:
    case Site::expert_down: return level >= 3;
    default: return level >= 2;
  }
}

namespace {

// Tells how much is computed, layer by layer, before another observer looks.
class Telling : public Observer {
 public:
  Telling(Observer& observer, const std::function<void(double)>& progress, const PassRows& rows,
          int64_t layers, int64_t all_rows)
      : observer_(observer),
        progress_(progress),
        rows_(rows),
        layers_(static_cast<double>(layers)),
        all_rows_(static_cast<double>(all_rows)) {}

  Interest inner(Site site) const override { return observer_.inner(site); }

  void observe(int layer, Site site, Tensor& tensor) override {
    if (site == Site::embed) {
      before_ += now_;
      now_ = static_cast<double>(rows_.positions.size());
    }
    if (site == Site::embed || layer != kNoLayer)
      progress_((before_ + now_ * std::max(layer, 0) / layers_) / all_rows_);
    observer_.observe(layer, site, tensor);
  }

 private:
  Observer& observer_;
  const std::function<void(double)>& progress_;
  const PassRows& rows_;
  double layers_, all_rows_;
  double before_ = 0, now_ = 0;  // rows of the passes done, of the one that is computed
};

}  // namespace

std::vector<Trace::Sequence> run_passes(const std::shared_ptr<const Model>& model,
                                        const TraceOptions& options, PassRows& rows, Observer& observer) {
  std::vector<Trace::Sequence> done;
  std::vector<Session> sessions;
  SessionOptions session;
  session.kv_type = options.kv_type;
  int64_t steps = options.steps;
  for (const Trace::Sequence& sequence : options.sequences) {
    sessions.emplace_back(model, session);
    done.push_back({sequence.ids, {}});
    if (!sequence.fed.empty()) steps = static_cast<int64_t>(sequence.fed.size());
  }
  std::vector<std::vector<int32_t>> next;
  for (const Trace::Sequence& sequence : options.sequences) next.push_back(sequence.ids);
  std::vector<Tensor> logits(next.size());  // of the last pass of each
  for (const Trace::Sequence& sequence : options.sequences) {
    if (!sequence.fed.empty() && static_cast<int64_t>(sequence.fed.size()) != steps) {
      fail(ErrorCode::invalid_argument,
           "[trace] fed: expected as many tokens for each sequence, got {} and {}", steps,
           sequence.fed.size());
    }
    if (sequence.ids.empty())
      fail(ErrorCode::invalid_argument, "[trace] ids: expected at least one for each sequence, got none");
  }
  int64_t all_rows = 0;
  for (const auto& ids : next) all_rows += std::ssize(ids) + steps;
  Telling telling(observer, options.progress, rows, model->info().layers, all_rows);
  Taps taps(options.progress ? &telling : &observer);
  // One pass over up to `most` rows of each sequence, from row `begin` of what it is given.
  const auto pass = [&](int64_t step, size_t begin, size_t most) {
    rows = {static_cast<int>(step), static_cast<int>(begin / most), {}, {}};
    std::vector<std::span<const int32_t>> parts;
    std::vector<Session*> pointers;
    std::vector<size_t> taking;
    for (size_t s = 0; s < next.size(); ++s) {
      if (begin >= next[s].size()) continue;
      parts.push_back(
          std::span<const int32_t>(next[s]).subspan(begin, std::min(most, next[s].size() - begin)));
      pointers.push_back(&sessions[s]);
      taking.push_back(s);
      for (size_t i = 0; i < parts.back().size(); ++i) {
        rows.positions.push_back(static_cast<int32_t>(sessions[s].length() + static_cast<int64_t>(i)));
        rows.sequences.push_back(static_cast<int>(s));
      }
    }
    std::vector<Tensor> made = append_together(pointers, parts, taps);
    for (size_t i = 0; i < made.size(); ++i) logits[taking[i]] = std::move(made[i]);
  };
  for (int64_t step = 0; step <= steps; ++step) {
    size_t longest = 0;
    for (const auto& ids : next) longest = std::max(longest, ids.size());
    const size_t most = options.chunk > 0 ? static_cast<size_t>(options.chunk) : longest;
    for (size_t begin = 0; begin < longest; begin += most) pass(step, begin, most);
    if (step == steps) break;
    for (size_t s = 0; s < next.size(); ++s) {
      const Tensor& mine = logits[s];
      const float* last = mine.row(mine.shape()[0] - 1);
      const auto& fed = options.sequences[s].fed;
      const int32_t id = fed.empty()
                             ? static_cast<int32_t>(std::max_element(last, last + mine.row_size()) - last)
                             : fed.at(static_cast<size_t>(step));
      next[s] = {id};
      done[s].fed.push_back(id);
    }
  }
  if (options.progress) options.progress(1);
  return done;
}

}  // namespace lockstep
