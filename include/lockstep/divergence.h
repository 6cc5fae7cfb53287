// Where two engines part: traces, their comparison, replay, and the faults it is tested with.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lockstep/session.h"
#include "lockstep/tensor.h"
#include "lockstep/trace.h"

namespace lockstep {

/// What a trace keeps of each row along the last axis: all, `count` columns drawn with the seed, or `count`
/// random sums of all, which keep the relative size of differences. Router sites and shorter rows are kept
/// whole.
struct TraceStorage {
  enum class Kind { full, sample, sketch };
  Kind kind = Kind::full;
  int64_t count = 0;
  uint64_t seed = 0;
  bool operator==(const TraceStorage&) const = default;
};

/// "full", "sample:64" or "sketch:64". Error `invalid_argument`.
TraceStorage parse_storage(const std::string& text, uint64_t seed);

/// One tensor of a trace: what a site held for some rows of one sequence in one pass.
struct TraceEvent {
  int step = 0;   ///< 0: prefill; n: the n-th decode step
  int chunk = 0;  ///< of the prefill
  int row = 0;    ///< sequence of the batch
  int layer = kNoLayer;
  std::string site;
  int64_t first_position = 0;
  Shape shape;        ///< [T, ...], as kept
  std::string axes;   ///< "T H D", "T C", "T E", "T H K", "T E C"
  int64_t width = 0;  ///< of the last axis before it was reduced; 0: it was not
  std::string hash;   ///< of the bytes; equal bytes, equal hash within one engine
  std::span<const float> values;

  /// "L00.q_rope"; without a layer the site alone.
  std::string name() const;
};

/// What an engine computed, and under which conditions.
class Trace {
 public:
  struct Sequence {
    std::vector<int32_t> ids;  ///< prompt
    std::vector<int32_t> fed;  ///< one token a decode step
  };
  /// A choice of experts of the engine's that was set aside for the one of the reference it followed.
  struct Tie {
    int step = 0, row = 0, layer = 0;
    int64_t position = 0;
    std::vector<int> experts;  ///< chosen, ascending
  };
  std::string engine;  ///< "transformers 5.23.0"
  std::string architecture;
  std::string precision = "f32";
  std::string kv_type = "f32";
  int64_t layers = 0;
  int level = 2;
  TraceStorage storage;
  std::string where;  ///< its directory, or what else to call it
  std::vector<Sequence> sequences;
  std::vector<Tie> ties;           ///< in causal order
  std::vector<std::string> sites;  ///< declared
  std::string config;              ///< JSON, as the engine read it
  std::vector<std::string> unread_keys;
  std::map<std::string, std::string> weights_sha256;

  /// Reads a directory written by lockstep or python/lockstep/capture. Error `not_found` or `format`: not a
  /// trace, cut short, another version, unknown sites, an event twice or none for a declared site.
  static Trace open(const std::filesystem::path& directory);
  /// Writes the directory; tensors are written in shards of 64 MB as `save` goes. Error `io`.
  void save(const std::filesystem::path& directory) const;

  const std::vector<TraceEvent>& events() const { return events_; }
  /// Copies the values of an event and keeps them.
  void add(TraceEvent event, std::span<const float> values);
  /// Takes over the events of another trace.
  void take_events(Trace&& other);
  void drop_events() { events_.clear(), storage_.clear(); }

 private:
  std::vector<TraceEvent> events_;
  std::vector<std::shared_ptr<const void>> storage_;
};

/// A named way to compute wrongly, hung on the taps or on the config. Catalogue: docs/faults.md.
struct Fault {
  std::string name;
  int kind = 0;  ///< number in the catalogue
  std::string summary;
  std::string site;          ///< where its error begins
  bool decode_only = false;  ///< acts when one token a sequence is computed
  std::string heads;         ///< "all", "1-" (all but the first), "some": decided by the model; "" none
  int row = 0;               ///< first sequence it touches
};
/// All there are, by class.
const std::vector<Fault>& faults();
/// "NAME", or "NAME@layer=3" for one layer only. Error `invalid_argument` naming those there are.
Fault find_fault(const std::string& name);

/// How far correct implementations are apart, by phase and site.
class Floor {
 public:
  /// Reads floor.json for a policy such as "f32/f32". Error `not_found` or `format`; `invalid_argument` for a
  /// policy it does not have.
  Floor(const std::filesystem::path& file, const std::string& policy);
  /// Of one site, in both phases.
  Floor(const std::string& name, double value);
  Floor() = default;
  /// Never below 2^-23 sqrt(width), the rounding of one sum of that length; sixteen times that where nothing
  /// was measured.
  double at(bool decode, const std::string& name, int64_t width) const;
  /// Whether a site was measured; without a policy all stand at the least.
  bool knows(bool decode, const std::string& name) const;
  /// Why it was measured on another model than a trace is of; empty: it may be the same.
  std::string other_model(const Trace& trace) const;
  const std::string& policy() const { return policy_; }
  /// The other policies of the same file.
  std::vector<Floor> others() const;

 private:
  struct Table {
    std::map<std::string, double> prefill, decode;
  };
  std::string policy_;
  std::map<std::string, Table> tables_;
  std::string architecture_;  // of the model, where the file says so
  int64_t layers_ = 0;
  std::map<std::string, std::string> weights_sha256_;
};
/// As a reference chose experts, so are ties of our router settled; both must outlive what is recorded by
/// them.
struct TieRule {
  const Trace* reference = nullptr;
  const Floor* floor = nullptr;
};

/// What is computed and what is kept of it.
struct TraceOptions {
  std::vector<Trace::Sequence> sequences;  ///< `fed` empty: greedy tokens
  int64_t steps = 0;                       ///< decode steps, where nothing is fed
  int64_t chunk = 0;                       ///< most rows of a sequence in one pass of prefill; 0: all
  int level = 2;
  TraceStorage storage;                       ///< of what is written to disk
  std::optional<std::pair<int, int>> layers;  ///< only the sites of these, first and last
  ModelOptions model{
      .precision = Precision::f32, .isa = {}, .threads = 0, .config_patch = {}, .progress = {}};
  KvType kv_type = KvType::f32;
  std::string fault;            ///< one to inject, as find_fault reads it; empty: none
  std::optional<TieRule> ties;  ///< of a reference of the same tokens
  bool checksums = false;  ///< note those of the weight files, so that other weights are told from faults
  std::function<void(double)> progress;  ///< share of the rows and layers computed; may throw, which ends it
};
/// Runs our engine and keeps every site of the level.
Trace record_trace(const std::filesystem::path& model, const TraceOptions& options);
/// The same, written as it is made: memory holds no more than 64 MB of it. Returns the number of tensors.
int64_t record_trace_to(const std::filesystem::path& directory, const std::filesystem::path& model,
                        const TraceOptions& options);
/// Computes wrongly while text is generated: an observer for one session, and the patch its model must be
/// loaded with (ModelOptions::config_patch).
class FaultObserver : public Observer {
 public:
  FaultObserver(const std::string& fault, const std::filesystem::path& model);
  ~FaultObserver() override;
  const std::string& config_patch() const;
  void observe(int layer, Site site, Tensor& tensor) override;
  Interest inner(Site site) const override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Whether a fault can act on this model and these sequences, and if not, why.
std::optional<std::string> cannot_act(const Fault& fault, const std::filesystem::path& model,
                                      const TraceOptions& options);
/// Error `invalid_argument` with the reason if it cannot: a run without effect would pass for a clean one.
/// `fault`: as find_fault reads it; empty: none.
void require_acting(const std::string& fault, const std::filesystem::path& model,
                    const TraceOptions& options);

/// "f32/f16" in words.
std::string policy_summary(const std::string& policy);

/// inconclusive: what the two share, or the floor, is not enough to say.
enum class Verdict { within, divergent, inconclusive };

/// One site of one pass, compared.
struct SiteScore {
  int step = 0;
  int row = 0;
  int layer = kNoLayer;
  std::string site;
  int64_t width = 1;       ///< columns of a row, kept or not
  double error = 0;        ///< largest relative L2 error of a row
  bool of_choice = false;  ///< the error is the margin of a choice of experts, divided by their logits' size
  double floor = 0;        ///< by which it is judged: no more than kMostFloor
  double score = 0;        ///< error / floor
  int64_t token = 0;       ///< position where it is largest
  int64_t first_bad = -1;  ///< first position beyond the band; -1: none
  std::vector<double> heads;  ///< largest score of each head, if the site has heads
  std::vector<int> bad_heads;
  std::string finding;  ///< what the layout solver found: "equal after interleaving"

  std::string name() const;
};

/// error / floor of one site, by position and head (or expert).
struct HeadGrid {
  std::vector<int64_t> positions;
  std::vector<std::vector<double>> scores;  ///< [positions][heads]; one column where there are no heads
};

/// A site that only one side has, or that cannot be judged.
struct Unmatched {
  std::string phase;  ///< "step 0"
  std::string name;   ///< "L01.scores"
  std::string why;    ///< "only in the reference"

  /// "step 0, L01.scores: only in the reference"
  std::string text() const { return phase + ", " + name + ": " + why; }
};

/// What a comparison found, and of how much.
struct DiffReport {
  Verdict verdict = Verdict::within;
  std::string reason;              ///< one line
  std::optional<SiteScore> first;  ///< first injected error
  std::vector<SiteScore> scores;   ///< in causal order
  std::vector<Unmatched> unmatched;
  int64_t compared = 0, expected = 0;
  int64_t rows = 0, left_out = 0;  ///< of the sites compared; of these, after ties of the router
  int64_t skipped = 0;             ///< sites before the first error that were not compared
  int64_t inherited = 0;           ///< later sites beyond the band
  std::optional<int64_t> alone;    ///< of a replay, which inherits nothing: the same
  std::string subject, reference;  ///< engines
  std::vector<std::string> hints;  ///< of the first error, the likeliest first, with what was observed
  HeadGrid grid;                   ///< of the first error
  std::vector<std::string> notes;
};

/// Beyond this many times the floor a site is divergent (noisy from 1, suspicious from 4).
inline constexpr double kBand = 16;
/// A site is judged by no larger floor, so that an error of half its size is always beyond the band.
inline constexpr double kMostFloor = 0.5 / kBand;
/// Where the floor is larger than this, correct computations are too far apart to judge by: half the size is
/// then less than twice as far.
inline constexpr double kCoarsestFloor = 0.25;

/// floor.json of one policy: for each site the largest error of the variants, all of them correct
/// computations; what looks otherwise is said under `warnings`. Error `invalid_argument` if they are of other
/// tokens.
std::string measure_floor(const Trace& truth, std::span<const Trace> variants, const std::string& policy);

/// The first tensor whose bits differ between two runs of one engine on the same tokens; nothing: none does.
std::optional<TraceEvent> first_change(const Trace& one, const Trace& other);

/// An invariant that needs no reference, on a model: "threads: 1 and 2", held or not.
struct CheckResult {
  std::string name;
  bool held = false;
};
/// Bit-identity of repeated runs, and of the logits for threads, chunks, batches, reused prefixes, forks,
/// decode against prefill; and what attention, RoPE, grouped queries, experts and windows promise by
/// definition. `length`: tokens of the random text they are tried on. `fault`: injected into the repeated
/// runs and the latter. `told`: called with each as soon as it is known.
std::vector<CheckResult> check_model(const std::filesystem::path& model, const ModelOptions& options,
                                     KvType kv_type, int64_t length, const std::string& fault = {},
                                     const std::function<void(const CheckResult&)>& told = {});

/// Compares `subject` with `reference`, teacher-forced: both must have been fed the same tokens.
DiffReport diff(const Trace& subject, const Trace& reference, const Floor& floor);
/// The same with a second reference: where the two disagree nothing can be concluded, but who stands alone.
DiffReport diff(const Trace& subject, const Trace& reference, const Trace& second, const Floor& floor);

/// Feeds the reference's tensors to every operation of ours: the errors are those each injects by itself.
/// `site`: only this one, "L00.q_rope"; empty: all.
DiffReport replay(const std::filesystem::path& model, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, const std::string& site = {});

/// Compares ours with a reference between layers only, then the first layer where they part as fine as the
/// reference goes. `graft`: also finds the last layer that is wrong, by halving, with the reference's
/// residual entering ours after a layer; two different layers are two faults.
DiffReport bisect(const std::filesystem::path& model, const TraceOptions& options, const Trace& reference,
                  const Floor& floor, bool graft);

/// One operation of a reference's trace in one safetensors file: inputs, stored weight, expected output,
/// floor; enough to run it again anywhere. Error `invalid_argument` for a site whose inputs the trace lacks.
void write_bundle(const std::filesystem::path& file, const std::filesystem::path& model,
                  const Trace& reference, const SiteScore& site, const std::string& policy);
/// Runs our operation on what a bundle holds.
DiffReport replay_bundle(const std::filesystem::path& file, const ModelOptions& options);

/// One screen: the verdict and a table like the one of the case that started the project.
std::string report_text(const DiffReport& report, bool colour);
/// One JSON object (docs/diff.schema.json).
std::string report_json(const DiffReport& report);
/// One HTML file that needs no other.
std::string report_html(const DiffReport& report);
/// Writes text, such as a report, to a file, which is whole or not there. Error `io`.
void save_text(const std::filesystem::path& file, const std::string& text);

/// How many faults were found, and where they are.
struct SelftestResult {
  struct Case {
    std::string fault;  ///< empty: a clean run
    std::string model;
    bool can_act = true;
    bool detected = false;
    bool localised = false;
    std::string outcome;
  };
  std::vector<Case> cases;
  int64_t faults = 0;   ///< distinct names run where they act
  double detected = 0;  ///< fraction of those runs
  double localised = 0;
  int64_t clean_runs = 0;  ///< faults where they cannot act included
  int64_t false_alarms = 0;
};
/// Injects every fault into tiny checkpoints and scores the verdicts against traces of transformers in `data`
/// (tests/data). `progress`: share done.
SelftestResult selftest(const std::filesystem::path& data, const std::function<void(double)>& progress = {});

}  // namespace lockstep
