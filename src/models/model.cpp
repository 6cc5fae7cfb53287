#include "lockstep/model.h"

#include <array>
#include <cctype>
#include <string>
#include <system_error>

#include "kernels/kernels.h"
#include "lockstep/checkpoint.h"
#include "models/architecture.h"
#include "models/binder.h"
#include "models/config_keys.h"
#include "tensor/fail.h"
#include "thread/pool.h"

namespace lockstep {

struct Model::State {
  ModelInfo info;
  std::unique_ptr<Pool> pool;
  nn::Runtime runtime;
  std::unique_ptr<Architecture> architecture;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::vector<int32_t> end_ids;
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

ModelInfo describe(const Checkpoint& checkpoint, const Binder& binder) {
  const Config& config = checkpoint.config();
  ModelInfo info;
  info.architecture = checkpoint.architecture();
  info.format = checkpoint.format();
  info.layers = config.integer("num_hidden_layers");
  info.hidden = config.integer("hidden_size");
  info.heads = config.integer("num_attention_heads");
  info.vocab = config.integer("vocab_size");
  info.context = config.integer("max_position_embeddings", 2048);
  const Binder::Account& account = binder.account();
  info.parameters = account.parameters;
  info.stored_bytes = account.stored_bytes;
  info.token_bytes = static_cast<int64_t>(account.row_bytes);
  info.row_weights = static_cast<int64_t>(account.row_weights);
  info.head_weights = account.head_weights;
  return info;
}

}  // namespace

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::~Model() = default;

std::shared_ptr<const Model> Model::load(const std::filesystem::path& path, const ModelOptions& options) {
  Checkpoint checkpoint = Checkpoint::open(path);
  if (!options.config_patch.empty()) checkpoint.patch_config(options.config_patch);
  const ArchitectureEntry* entry = find_architecture(checkpoint.architecture());
  if (entry == nullptr) {
    std::string names;
    for (std::string_view name : architecture_names())
      names += (names.empty() ? "" : ", ") + std::string(name);
    fail(ErrorCode::unsupported, "[{}] architecture: expected one of {}, got {}", path.string(), names,
         checkpoint.architecture());
  }
  auto state = std::make_unique<State>();
  state->pool = std::make_unique<Pool>(options.threads);
  state->runtime = {&kernels::select(options.isa), state->pool.get(), options.precision};
  Binder binder(checkpoint, state->runtime, options.progress);
  state->architecture = entry->make(binder);
  // It takes as long as the weights of a small model.
  binder.finish([&] {
    if (checkpoint.has_tokenizer()) state->tokenizer = std::make_unique<Tokenizer>(checkpoint.tokenizer());
  });
  state->info = describe(checkpoint, binder);
  state->info.unread_keys = check_unread_keys(checkpoint.config());
  state->end_ids = checkpoint.end_ids();
  if (state->tokenizer && state->tokenizer->chat_template()) {
    state->chat_template = std::make_unique<ChatTemplate>(*state->tokenizer);
  }
  return std::shared_ptr<const Model>(new Model(std::move(state)));
}

const ModelInfo& Model::info() const { return state_->info; }
CacheShape Model::cache_shape() const { return state_->architecture->cache_shape(); }
Precision Model::precision() const { return state_->runtime.precision; }
std::string_view Model::isa() const { return state_->runtime.kernels->isa; }
int Model::threads() const { return state_->pool->threads(); }

const Tokenizer& Model::tokenizer() const {
  if (!state_->tokenizer) {
    fail(ErrorCode::not_found,
         "[tokenizer] files: expected a tokenizer beside the weights, got none; without one only ids "
         "can be fed: lockstep logits --ids");
  }
  return *state_->tokenizer;
}
bool Model::has_tokenizer() const { return state_->tokenizer != nullptr; }
const ChatTemplate* Model::chat_template() const { return state_->chat_template.get(); }
const std::vector<int32_t>& Model::end_ids() const { return state_->end_ids; }

Tensor Model::forward(Batch& batch, Taps& taps) const { return state_->architecture->forward(batch, taps); }

}  // namespace lockstep
