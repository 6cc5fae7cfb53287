#include "trace/symmetries.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "tensor/fail.h"

namespace lockstep {
namespace {

// Calls `before` on every tensor, then the fault, then `after`; asks for the inner sites of `inner`.
class Watcher : public Observer {
 public:
  using Hook = std::function<void(int layer, Site, Tensor&)>;

  Watcher(Observer* fault, std::vector<Site> inner) : fault_(fault), inner_(std::move(inner)) {}

  Hook before, after;

  Interest inner(Site site) const override {
    const Interest fault = fault_ == nullptr ? Interest::none : fault_->inner(site);
    if (fault != Interest::none) return fault;
    return std::ranges::find(inner_, site) == inner_.end() ? Interest::none : Interest::read;
  }
  void observe(int layer, Site site, Tensor& x) override {
    if (before) before(layer, site, x);
    if (fault_ != nullptr) fault_->observe(layer, site, x);
    if (after) after(layer, site, x);
  }

 private:
  Observer* fault_;
  std::vector<Site> inner_;
};

bool same(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

double norm(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * v;
  return std::sqrt(sum);
}

// Heads moved `by` places on, round and round. x: [T, heads, D].
void turn_heads(Tensor& x, int64_t by) {
  const int64_t heads = x.shape()[1], width = x.shape()[2];
  std::vector<float> row(static_cast<size_t>(heads * width));
  for (int64_t t = 0; t < x.shape()[0]; ++t) {
    std::copy_n(x.row(t), heads * width, row.begin());
    for (int64_t h = 0; h < heads; ++h)
      std::copy_n(row.begin() + h * width, width, x.row(t) + (h + by + heads) % heads * width);
  }
}

class Symmetries {
 public:
  Symmetries(const std::filesystem::path& path, ModelOptions options, KvType kv_type,
             std::span<const int32_t> ids, const std::string& fault)
      : path_(path), options_(std::move(options)), kv_type_(kv_type), ids_(ids), fault_(fault) {
    if (!fault.empty()) options_.config_patch = FaultObserver(fault, path).config_patch();
    model_ = Model::load(path, options_);
    caches_ = model_->cache_shape();
  }

  std::vector<CheckResult> all() {
    one_key();
    equal_tokens();
    groups();
    experts();
    window();
    greedy();
    return std::move(results_);
  }

 private:
  void add(std::string name, bool held) { results_.push_back({std::move(name), held}); }

  // One pass over `ids` with its hooks. -> the logits of every row.
  Tensor run(std::span<const int32_t> ids, std::vector<Site> inner, const Watcher::Hook& before,
             const Watcher::Hook& after) const {
    std::unique_ptr<FaultObserver> fault;
    if (!fault_.empty()) fault = std::make_unique<FaultObserver>(fault_, path_);
    Watcher watcher(fault.get(), std::move(inner));
    watcher.before = before;
    watcher.after = after;
    Taps taps(&watcher);
    return session(model_).append(ids, taps);
  }

  Session session(const std::shared_ptr<const Model>& model) const {
    SessionOptions options;
    options.kv_type = kv_type_;
    options.chunk = static_cast<int64_t>(ids_.size());
    return Session(model, options);
  }

  // A softmax over one score is 1, so each query head returns the value of its KV head as it is stored.
  void one_key() {
    bool held = true;
    Tensor value;  // [1, Hkv, D]
    run(ids_.first(1), {Site::k_cache, Site::v_cache}, {}, [&](int, Site site, Tensor& x) {
      if (site == Site::v_cache) value = x.clone();
      if (site != Site::attn_ctx) return;
      const int64_t group = x.shape()[1] / value.shape()[1], width = x.shape()[2];
      for (int64_t h = 0; h < x.shape()[1]; ++h) {
        held = held && same({x.row(0) + h * width, static_cast<size_t>(width)},
                            {value.row(0) + h / group * width, static_cast<size_t>(width)});
      }
    });
    add("attention to a single key returns its value, in every head", held);
  }

  // One token over and over: in layer 0 queries and keys differ by their rotation alone, so that a score
  // depends on the distance of two positions and on nothing else (Su et al. 2021, eq. 16).
  void equal_tokens() {
    const std::vector<int32_t> equal(ids_.size(), ids_[0]);
    const int64_t window = caches_.windows.at(0);
    double worst = 0, largest = 0;  // difference of two scores; largest product of two norms
    double query = 0;               // largest norm of a query head
    run(equal, {Site::k_cache, Site::v_cache, Site::scores, Site::probs}, {},
        [&](int layer, Site site, Tensor& x) {
          if (layer != 0) return;
          if (site == Site::q_rope || site == Site::k_rope) {
            double most = 0;
            const auto width = static_cast<size_t>(x.shape()[2]);
            for (int64_t h = 0; h < x.shape()[1]; ++h)
              most = std::max(most, norm({x.row(0) + h * x.shape()[2], width}));
            if (site == Site::q_rope)
              query = most;
            else
              largest = query * most / std::sqrt(static_cast<double>(width));
          }
          if (site == Site::scores) worst = worst_shift(x, window);
        });
    // The angle of position p is rounded to p 2^-24, keys to what the cache holds.
    const double bound = (static_cast<double>(ids_.size()) * 0x1p-22 + rounding_of(kv_type_)) * largest;
    add("equal tokens: a score depends on the distance of two positions alone", worst <= bound);
  }

  // The most that a score may lose to a cache, of the lengths of query and key.
  static double rounding_of(KvType type) {
    switch (type) {
      case KvType::f32: return 0;
      case KvType::f16: return 0x1p-10;
      case KvType::i16: return 0x1p-9;
      default: return 0x1p-5;
    }
  }

  // scores: [T, H, K], lower triangle.
  static double worst_shift(const Tensor& scores, int64_t window) {
    const int64_t rows = scores.shape()[0], heads = scores.shape()[1], keys = scores.shape()[2];
    double worst = 0;
    for (int64_t i = 0; i + 1 < rows; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const float* here = scores.row(i) + h * keys;
        const float* next = scores.row(i + 1) + h * keys + 1;
        for (int64_t j = window == 0 ? 0 : std::max<int64_t>(0, i - window + 1); j <= i; ++j)
          worst = std::max(worst, std::abs(static_cast<double>(here[j]) - next[j]));
      }
    }
    return worst;
  }

  // KV heads and their groups of query heads change places in every layer: nothing else may change.
  void groups() {
    const int64_t kv_heads = caches_.kv_heads;
    const int64_t group = model_->info().heads / kv_heads;
    if (kv_heads == 1) return;
    const Tensor plain = run(ids_, {}, {}, {});
    const Tensor turned = run(
        ids_, {},
        [&](int, Site site, Tensor& x) {
          if (site == Site::q_rope) turn_heads(x, group);
          if (site == Site::k_rope || site == Site::v_proj) turn_heads(x, 1);
        },
        [&](int, Site site, Tensor& x) {
          if (site == Site::attn_ctx) turn_heads(x, -group);
        });
    add("groups of query heads change places with their KV heads", same(plain.values(), turned.values()));
  }

  // What an expert makes of a row does not depend on which other rows it is given, and the rows get back
  // what is theirs: the weighted sum, here from the last expert to the first.
  void experts() {
    Tensor weights, usual;  // of layer 0: [T, E], [T, E, hidden]
    bool sums = true;
    const std::vector<Site> inner = {Site::expert_gate, Site::expert_up, Site::expert_act, Site::expert_down};
    run(ids_, inner, {}, [&](int layer, Site site, Tensor& x) {
      if (layer != 0) return;
      if (site == Site::router_weights) weights = x.clone();
      if (site == Site::expert_down) usual = x.clone();
      if (site == Site::moe_out) sums = is_weighted_sum(x, weights, usual);
    });
    if (weights.shape().rank() == 0) return;  // no experts
    add("rows get back the weighted sum of their own experts", sums);
    const int64_t experts = weights.shape()[1];
    const auto chosen =
        std::count_if(weights.row(0), weights.row(0) + experts, [](float w) { return w != 0; });
    bool held = true;
    for (int64_t first = 0; first < experts; first += chosen) {
      run(
          ids_, inner,
          [&](int layer, Site site, Tensor& x) {
            if (layer != 0 || site != Site::router_logits) return;
            for (int64_t t = 0; t < x.shape()[0]; ++t) {
              for (int64_t e = 0; e < experts; ++e)
                x.row(t)[e] = (e - first + experts) % experts < chosen ? 0.0F : -1e4F;
            }
          },
          [&](int layer, Site site, Tensor& x) {
            if (layer == 0 && site == Site::expert_down)
              held = held && agree(x, usual, weights, first, chosen);
          });
    }
    add("experts given every row make of each what they made of it among few", held);
  }

  static bool is_weighted_sum(const Tensor& out, const Tensor& weights, const Tensor& parts) {
    const int64_t experts = weights.shape()[1], width = out.row_size();
    std::vector<float> difference(static_cast<size_t>(width));
    for (int64_t t = 0; t < out.shape()[0]; ++t) {
      for (int64_t d = 0; d < width; ++d) {
        double sum = 0;
        for (int64_t e = experts - 1; e >= 0; --e)
          sum += static_cast<double>(weights.row(t)[e]) * parts.row(t)[e * width + d];
        difference[static_cast<size_t>(d)] = static_cast<float>(sum - out.row(t)[d]);
      }
      if (!(norm(difference) <= 1e-6 * norm({out.row(t), static_cast<size_t>(width)}))) return false;
    }
    return true;
  }

  // Rows whose usual experts include one of [first, first + chosen) have the same there. x, usual: [T, E, C].
  static bool agree(const Tensor& x, const Tensor& usual, const Tensor& weights, int64_t first,
                    int64_t chosen) {
    const int64_t experts = weights.shape()[1], width = x.shape()[2];
    for (int64_t t = 0; t < x.shape()[0]; ++t) {
      for (int64_t e = first; e < std::min(experts, first + chosen); ++e) {
        if (weights.row(t)[e] == 0) continue;
        if (!same({x.row(t) + e * width, static_cast<size_t>(width)},
                  {usual.row(t) + e * width, static_cast<size_t>(width)}))
          return false;
      }
    }
    return true;
  }

  void window() {
    if (std::ranges::all_of(caches_.windows, [](int64_t w) { return w == 0; }) ||
        !options_.config_patch.empty())
      return;
    const auto with = [&](const std::string& window) {
      ModelOptions patched = options_;
      patched.config_patch = "{\"sliding_window\": " + window + "}";
      return session(Model::load(path_, patched)).append(ids_);
    };
    add("a window as long as the text is none",
        same(with(std::to_string(ids_.size())).values(), with("null").values()));
  }

  void greedy() {
    constexpr int kTokens = 8;
    const auto reply = [&](const std::shared_ptr<const Model>& model) {
      Session timeline = session(model);
      std::vector<int32_t> all(ids_.begin(), ids_.begin() + static_cast<int64_t>(ids_.size()) / 2);
      for (int i = 0; i < kTokens && static_cast<int64_t>(all.size()) < timeline.context(); ++i) {
        const Tensor logits = timeline.sync(all);
        all.push_back(
            static_cast<int32_t>(std::ranges::max_element(logits.values()) - logits.values().begin()));
      }
      return all;
    };
    add("the same greedy tokens after loading anew", reply(model_) == reply(Model::load(path_, options_)));
  }

  const std::filesystem::path& path_;
  ModelOptions options_;
  KvType kv_type_;
  std::span<const int32_t> ids_;
  const std::string& fault_;
  std::shared_ptr<const Model> model_;
  CacheShape caches_;
  std::vector<CheckResult> results_;
};

}  // namespace

std::vector<CheckResult> check_symmetries(const std::filesystem::path& model, const ModelOptions& options,
                                          KvType kv_type, std::span<const int32_t> ids,
                                          const std::string& fault) {
  return Symmetries(model, options, kv_type, ids, fault).all();
}

}  // namespace lockstep
