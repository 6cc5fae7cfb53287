// One view of a model's files, whatever their format: a config with Hugging Face's keys and
// tensors with Hugging Face's names, memory-mapped and read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/tensor.h"
#include "lockstep/text.h"

namespace lockstep {

/// A tensor as it lies in the file. Nothing is copied: the spans point into the mapped file and
/// live as long as the Checkpoint they came from.
struct StoredTensor {
  std::string name;    ///< Hugging Face's name, e.g. "model.layers.0.self_attn.q_proj.weight"
  std::string source;  ///< "file.gguf: blk.0.attn_q.weight", for messages
  DType dtype = DType::f32;
  Shape shape;                      ///< logical: [out, in], [experts, out, in] or [width]
  std::span<const std::byte> data;  ///< elements or blocks, rows one after the other
  /// MLX affine: one scale and one bias per group of `group_size` codes of a row.
  int64_t group_size = 0;
  DType scale_dtype = DType::f16;
  std::span<const std::byte> scales;  ///< [.., out, in / group_size]
  std::span<const std::byte> biases;  ///< as scales
  /// > 0: the rows (of a vector: the elements) are stored in the order of interleaved RoPE for that
  /// many heads, as llama.cpp's converter leaves them; `stored_row` undoes it.
  int64_t interleaved_heads = 0;

  /// Product of all axes but the last; a vector counts as one row.
  int64_t rows() const;
  /// Extent of the last axis; 1 of a scalar.
  int64_t columns() const { return shape.rank() == 0 ? 1 : shape[-1]; }
  /// Where row `row` of the split-half order lies in the file.
  int64_t stored_row(int64_t row) const;
  /// Bytes of one stored row (MLX: of its codes).
  int64_t row_bytes() const;
  /// All bytes that hold the tensor, scales and biases included.
  int64_t stored_bytes() const;
  /// Expert `index` of a stacked tensor [experts, out, in], as a view [out, in].
  StoredTensor slice(int64_t index) const;
  /// Rows [first, first + count) of a plain matrix, as a view [count, in].
  StoredTensor row_range(int64_t first, int64_t count) const;
};

/// A model's config: typed access to the keys of config.json, which remembers what was read. A key
/// that is present with the JSON value null counts as absent.
class Config {
 public:
  /// Parses a JSON object; `where` names the file in messages.
  Config(std::string_view json, std::string where);
  ~Config();
  Config(Config&&) noexcept;
  Config& operator=(Config&&) noexcept;

  bool has(std::string_view key) const;
  /// Present, with the value null: for the few keys where that differs from being absent.
  bool is_null(std::string_view key) const;
  /// Without a fallback an absent key is an Error; a value of another type always is.
  int64_t integer(std::string_view key, std::optional<int64_t> fallback = {}) const;
  double number(std::string_view key, std::optional<double> fallback = {}) const;
  bool boolean(std::string_view key, std::optional<bool> fallback = {}) const;
  std::string text(std::string_view key, std::optional<std::string> fallback = {}) const;
  /// A number or a list of numbers, as a list; empty if absent.
  std::vector<int64_t> integers(std::string_view key) const;
  std::vector<std::string> texts(std::string_view key) const;
  /// A nested object, e.g. "rope_scaling"; nullptr if absent. Reads inside it are accounted too.
  const Config* object(std::string_view key) const;
  /// Declares a key known and without influence on the maths.
  void ignore(std::string_view key) const;
  /// Paths ("rope_scaling.factor") of the keys that nothing has read.
  std::vector<std::string> unread() const;
  /// The JSON text, as read.
  std::string json() const;
  const std::string& where() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// An opened model: the one interface to GGUF files, Hugging Face folders and MLX folders.
class Checkpoint {
 public:
  /// Opens a `.gguf` file or a directory holding config.json and safetensors. Headers are read and
  /// checked, tensor data is only mapped. Throws Error naming file and byte offset.
  static Checkpoint open(const std::filesystem::path& path);
  ~Checkpoint();
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;

  /// "gguf", "safetensors" or "mlx".
  const std::string& format() const;
  const std::filesystem::path& path() const;
  /// Name of the architecture in lockstep: "llama", "mixtral", "qwen2".
  const std::string& architecture() const;
  const Config& config() const;
  /// Replaces keys by those of a JSON merge patch (RFC 7396); null removes one.
  void patch_config(std::string_view merge_patch);
  const std::vector<StoredTensor>& tensors() const;
  /// nullptr if there is none of that name.
  const StoredTensor* find(std::string_view name) const;
  /// Files that hold tensor data, for checksums and reports.
  std::vector<std::filesystem::path> weight_files() const;

  /// Builds the tokenizer from tokenizer.json or the GGUF's metadata; Error if there is none.
  Tokenizer tokenizer() const;
  bool has_tokenizer() const;
  /// Every id that ends a reply: eos of generation_config.json and config.json; eos, eot, eom of
  /// a GGUF. Sorted, without repeats.
  std::vector<int32_t> end_ids() const;

  /// Maps pages of `part` of a tensor's data, scales or biases, so that `fetch` waits for fewer. Safe from
  /// several threads. Error `io` if the file has become shorter.
  void map(std::span<const std::byte> part) const;
  /// Brings `part` of a tensor's data, scales or biases into the caches. Safe from several threads. Error
  /// `io` if the file has become shorter.
  void fetch(std::span<const std::byte> part) const;
  /// Lets go of its pages, which the system counts as this process's memory from when they are first read.
  void release(std::span<const std::byte> part) const;

  struct State;  // src/format/checkpoint_state.h

 private:
  explicit Checkpoint(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

/// A tensor to be written: its bytes are the caller's.
struct NamedTensor {
  std::string name;
  DType dtype = DType::f32;
  Shape shape;
  std::span<const std::byte> data;

  static NamedTensor of(std::string name, const Tensor& tensor);
};
/// Writes a safetensors file, under a temporary name first. Error `io`.
void save_tensors(const std::filesystem::path& path, std::span<const NamedTensor> tensors,
                  const std::map<std::string, std::string>& metadata = {});

}  // namespace lockstep
