#include "lockstep/model.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "kernels/kernels.h"
#include "lockstep/checkpoint.h"
#include "models/architecture.h"
#include "models/binder.h"
#include "models/config_keys.h"
#include "tensor/fail.h"
#include "tensor/memory_map.h"
#include "thread/pool.h"

namespace lockstep {

namespace {

// The files of a model whose weights are not all packed yet.
class Stored {
 public:
  Stored(const std::filesystem::path& path, std::function<void(double)> progress)
      : checkpoint(Checkpoint::open(path)), progress_(std::move(progress)) {
    for (const StoredTensor& tensor : checkpoint.tensors()) bytes_ += tensor.stored_bytes();
  }

  // What is read twice counts twice.
  quant::Source source() {
    return {.fetch =
                [this](std::span<const std::byte> part) {
                  checkpoint.fetch(part);
                  const int64_t read = read_ += std::ssize(part);
                  tell(std::min(0.99, static_cast<double>(read) / static_cast<double>(bytes_)));
                },
            .release = [this](std::span<const std::byte> part) { checkpoint.release(part); }};
  }
  // Does `first`, and as long as it takes the other threads map pages for the first pass.
  void map_beside(Pool& pool, const std::function<void()>& first) {
    constexpr size_t kPiece = size_t{1} << 20;  // bytes
    std::vector<std::span<const std::byte>> pieces;
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      for (size_t at = 0; at < tensor.data.size(); at += kPiece)
        pieces.push_back(tensor.data.subspan(at, std::min(kPiece, tensor.data.size() - at)));
    }
    std::atomic<bool> ended{false};
    pool.run(std::ssize(pieces) + 1, [&](int64_t index) {
      if (index > 0) {
        if (!ended) checkpoint.map(pieces[static_cast<size_t>(index - 1)]);
        return;
      }
      try {
        first();
      } catch (...) {
        ended = true;
        throw;
      }
      ended = true;
    });
  }
  // Only from the thread that opened the files.
  void tell(double share) const {
    if (progress_ && std::this_thread::get_id() == thread_) progress_(share);
  }
  // From here on a reply may be on the screen.
  void end_progress() {
    tell(1);
    progress_ = {};
  }
  int64_t bytes() const { return bytes_; }

  Checkpoint checkpoint;
  quant::Packer packer;

 private:
  std::function<void(double)> progress_;
  std::thread::id thread_ = std::this_thread::get_id();
  int64_t bytes_ = 0;
  std::atomic<int64_t> read_{0};
};

// Whether files of `bytes` can be expected to stay in memory beside what is made of them.
bool stays_in_memory(int64_t bytes) { return bytes <= usable_memory() / 4; }

}  // namespace

struct Model::State {
  ModelInfo info;
  std::unique_ptr<Pool> pool;
  nn::Runtime runtime;
  TransformerSizes sizes;
  std::unique_ptr<Architecture> architecture;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::vector<int32_t> end_ids;

  // Until all weights are packed, passes take turns.
  std::atomic<bool> packed{false};
  std::mutex turn;
  std::unique_ptr<Stored> stored;  // with what is not packed; null once all is
  bool passed = false;             // one of them

  void pack(const std::function<void()>& beside = {}) {
    stored->packer.run(*pool, beside);
    stored->tell(1);
    stored.reset();
    packed = true;
  }
};

std::string_view precision_name(Precision precision) {
  switch (precision) {
    case Precision::f32: return "f32";
    case Precision::exact: return "exact";
    default: return "fast";
  }
}

Precision parse_precision(std::string_view name) {
  for (const Precision precision : {Precision::f32, Precision::exact, Precision::fast}) {
    if (precision_name(precision) == name) return precision;
  }
  fail(ErrorCode::invalid_argument, "[precision] name: expected f32, exact or fast, got {}", name);
}

void check_isa(std::string_view name) { kernels::select(name); }

namespace {

ModelInfo describe(const Checkpoint& checkpoint, const TransformerSizes& sizes, const Binder& binder) {
  ModelInfo info;
  info.architecture = checkpoint.architecture();
  info.format = checkpoint.format();
  info.layers = sizes.layers;
  info.hidden = sizes.hidden;
  info.heads = sizes.heads;
  info.vocab = sizes.vocab;
  info.experts = sizes.experts;
  info.experts_per_token = sizes.experts_per_token;
  info.context = checkpoint.config().integer("max_position_embeddings", 2048);
  const Binder::Account& account = binder.account();
  info.parameters = account.parameters;
  info.stored_bytes = account.stored_bytes;
  info.token_bytes = static_cast<int64_t>(account.row_bytes);
  info.row_weights = static_cast<int64_t>(account.row_weights);
  info.logits_weights = static_cast<int64_t>(account.logits_weights);
  info.integers = 2 * account.integer_weights > account.row_weights;
  return info;
}

}  // namespace

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::~Model() = default;

std::shared_ptr<const Model> Model::load(const std::filesystem::path& path, const ModelOptions& options) {
  auto state = std::make_unique<State>();
  state->stored = std::make_unique<Stored>(path, options.progress);
  Checkpoint& checkpoint = state->stored->checkpoint;
  if (!options.config_patch.empty()) checkpoint.patch_config(options.config_patch);
  const ArchitectureEntry& entry = architecture_of(checkpoint);
  state->sizes = entry.sizes(checkpoint.config());
  state->pool = std::make_unique<Pool>(options.threads);
  state->runtime = {&kernels::select(options.isa), state->pool.get(), options.precision};
  Binder binder(checkpoint, state->runtime, state->stored->source());
  state->architecture = entry.make(binder, state->sizes);
  state->stored->packer = binder.finish();
  state->info = describe(checkpoint, state->sizes, binder);
  state->info.unread_keys = check_unread_keys(checkpoint.config());
  state->end_ids = checkpoint.end_ids();
  const auto make_tokenizer = [&] {
    if (checkpoint.has_tokenizer()) state->tokenizer = std::make_unique<Tokenizer>(checkpoint.tokenizer());
  };
  // The tokenizer takes as long as the weights of a small model.
  if (options.packing == Packing::on_use) {
    make_tokenizer();
  } else if (options.packing == Packing::second_pass && stays_in_memory(state->stored->bytes())) {
    state->stored->map_beside(*state->pool, make_tokenizer);
  } else {
    state->pack(make_tokenizer);
  }
  if (state->tokenizer && state->tokenizer->chat_template()) {
    state->chat_template = std::make_unique<ChatTemplate>(*state->tokenizer);
  }
  return std::shared_ptr<const Model>(new Model(std::move(state)));
}

const ModelInfo& Model::info() const { return state_->info; }
CacheShape Model::cache_shape() const { return state_->sizes.cache_shape(); }
Precision Model::precision() const { return state_->runtime.precision; }
std::string_view Model::isa() const { return state_->runtime.kernels->isa; }
int Model::threads() const { return state_->pool->threads(); }

const Tokenizer& Model::tokenizer() const {
  if (!state_->tokenizer) {
    fail(ErrorCode::not_found,
         "[tokenizer] files: expected a tokenizer beside the weights, got none; without one only ids "
         "can be fed: --ids of lockstep logits and trace");
  }
  return *state_->tokenizer;
}
bool Model::has_tokenizer() const { return state_->tokenizer != nullptr; }
const ChatTemplate* Model::chat_template() const { return state_->chat_template.get(); }
const std::vector<int32_t>& Model::end_ids() const { return state_->end_ids; }

void Model::pack() const {
  if (state_->packed) return;
  const std::lock_guard lock(state_->turn);
  if (state_->stored) state_->pack();
}

Tensor Model::forward(const Batch& batch, Taps& taps) const {
  State& state = *state_;
  if (state.packed) return state.architecture->forward(batch, taps);
  const std::lock_guard lock(state.turn);
  if (state.stored && state.passed) state.pack();
  Tensor logits = state.architecture->forward(batch, taps);
  if (state.stored && !std::exchange(state.passed, true)) state.stored->end_progress();
  return logits;
}

}  // namespace lockstep
