// One site of one pass, compared: rows joined by position, errors divided by the noise floor.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep {

/// step, layer (sites after the layers come last), place among the sites, name, sequence: causal order.
using Place = std::tuple<int, int, int, std::string, int>;
Place place_of(int step, int layer, const std::string& site, int row);

/// All rows of one site in one pass: chunks joined by position.
struct Joined {
  const TraceEvent* event = nullptr;  // the first of them
  std::map<int64_t, std::span<const float>> rows;
  std::vector<std::shared_ptr<const std::vector<float>>>
      reduced;  // what rows point to, where they were reduced or filled up
};
/// Rows kept whole are reduced to `storage`, so that they can be compared with those of a trace that was.
std::map<Place, Joined> join(const Trace& trace, const TraceStorage& storage = {});

/// Whether both have the same positions, and rows of the same width.
bool same_rows(const Joined& one, const Joined& other);

/// Whether rows of either were reduced when they were recorded.
bool is_reduced(const Joined& subject, const Joined& reference);

/// Columns of a row, kept or not.
int64_t row_width(const TraceEvent& event);

/// Of the heads or experts of a site; 0: it has none.
int64_t heads_of(const TraceEvent& event);

double norm(std::span<const float> x);

/// Sizes by which errors are divided: those of the row, but no less than a tenth of what is usual at the
/// site.
struct Sizes {
  double row = 0;   // usual norm of a row
  double head = 0;  // usual norm of a head's part
};
Sizes usual_sizes(const Joined& reference, int64_t heads);
/// |got - truth| / max(|truth|, usual / 10), L2.
double relative(std::span<const float> got, std::span<const float> truth, double usual);

/// Scores sites against the floor, leaving out rows whose experts were chosen by less than it.
class Comparison {
 public:
  Comparison(const Floor& floor, DiffReport& report) : floor_(floor), report_(report) {}

  /// Both must have the same rows.
  SiteScore score(const Joined& subject, const Joined& reference) const;
  /// Why a site cannot be judged by its floor; empty: it can.
  std::string unjudged(const TraceEvent& event) const;
  /// Whether all rows of a site follow ties; counts them as left out if so.
  bool left_out(const Joined& reference) const;
  /// Scores of each row and head, for a picture.
  HeadGrid grid(const Joined& subject, const Joined& reference) const;
  /// A token whose experts were chosen by less than the floor is a tie: it and what follows are left out. A
  /// choice of another number of experts, of one that is clearly worse, or of one that is worse by the
  /// subject's own logits (`own`, if it has them) is none.
  void leave_out_ties(const Joined& subject, const Joined* own, const Joined& weights, const Joined& logits);
  /// Choices that were settled as the reference's: those that were no ties count as errors of the weights.
  void judge_ties(std::span<const Trace::Tie> ties, const Joined& weights, const Joined& logits,
                  SiteScore& score);
  /// Notes where the likeliest token differs, and whether it is a tie.
  void note_argmax(const Joined& subject, const Joined& reference);

 private:
  double floor_of(const TraceEvent& event) const;
  bool excluded(int row, int64_t position) const;

  const Floor& floor_;
  DiffReport& report_;
  std::map<int, int64_t> excluded_;
};

/// Why nothing can be judged without a floor under this policy; empty: it can.
std::string no_floor(const Floor& floor, const std::string& policy);

/// Sets verdict, reason and the first error from the scores.
void conclude(DiffReport& report);

/// Whether the first error shows in what is computed from it. A tensor that differs and leaves its successors
/// as they were was not what they were computed from: its capture is wrong.
enum class Inheritance { shown, missing, unknown };
Inheritance inheritance(const DiffReport& report, const Floor& floor, const std::map<Place, Joined>& ours,
                        const std::map<Place, Joined>& theirs);
/// The first of the sites computed from the first error that differs too; nullptr: none was found to.
const SiteScore* differing_successor(const DiffReport& report);

/// What the error at the first wrong site looks like, the likeliest cause first, each with its observation.
std::vector<std::string> hints(const SiteScore& first, const Joined& subject, const Joined& reference);

/// Why two traces are not of the same model, whose engines may name it otherwise; empty: they may be.
std::string same_model(const Trace& subject, const Trace& reference);
struct ModelFacts;
std::string same_model(const ModelFacts& facts, const Trace& reference);
/// Why two traces are not of the same computation; empty: they are.
std::string same_inputs(const Trace& subject, const Trace& reference);
/// Why our model and a reference cannot be compared; empty: they can. Run before the model is.
std::string unusable(const std::filesystem::path& model, const TraceOptions& options, const Trace& reference,
                     const Floor& floor);
/// Sums of weight files that are named alike and differ; empty: none do.
std::string same_weights(const std::map<std::string, std::string>& sums, const Trace& reference);
/// What is wrong with a trace by itself; empty: nothing.
std::string self_check(const Trace& trace);

}  // namespace lockstep
