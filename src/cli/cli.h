// The command line: shared flags, and one function a verb that declares it.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lockstep/generate.h"
#include "lockstep/model.h"
#include "lockstep/session.h"

namespace lockstep::cli {

/// Which model, and how it is computed: flags that most verbs share.
struct ModelFlags {
  std::string model;  // empty: the default model
  int threads = 0;
  std::string precision = "exact";
  std::string isa;
  std::string kv_type;  // empty: by precision
  int64_t context = 0;

  /// Declares the flags on a verb. `with_context`: also -c, for verbs whose sessions are as long as is asked
  /// for.
  void declare(CLI::App& verb, bool with_context = true);
  /// The same without -c, for verbs that judge computations: unless told otherwise everything is in f32.
  void declare_f32(CLI::App& verb);
  /// What the flags say of how the model computes.
  ModelOptions options() const;
  /// Loads the model, with a progress bar on a terminal.
  std::shared_ptr<const Model> load(Packing packing = Packing::at_load,
                                    const std::string& config_patch = {}) const;
  KvType kv() const;
  SessionOptions session_options() const;
};

/// Error `invalid_argument` if a file that is to be written is one of the model's own.
void require_other_file(const std::string& output, const std::filesystem::path& model);

/// A model to look at or to encode texts with: its weights are not packed before a pass uses them.
std::shared_ptr<const Model> open_model(const std::filesystem::path& path);

/// How text is generated.
struct GenerateFlags {
  GenerateOptions options;

  void declare(CLI::App& verb);
};

/// How --help of all verbs is laid out.
std::shared_ptr<CLI::FormatterBase> help_formatter();

void declare_generate(CLI::App& app);
void declare_chat(CLI::App& app);
void declare_tokenize(CLI::App& app);
void declare_logits(CLI::App& app);
void declare_perplexity(CLI::App& app);
void declare_inspect(CLI::App& app);
void declare_pull(CLI::App& app);
void declare_bench(CLI::App& app);
void declare_trace(CLI::App& app);
void declare_diff(CLI::App& app);
void declare_replay(CLI::App& app);
void declare_bisect(CLI::App& app);
void declare_floor(CLI::App& app);
void declare_check(CLI::App& app);
void declare_selftest(CLI::App& app);

/// Why a reply ended before the model ended it, for whoever reads it; empty: it did not.
std::string cut_short(const Generation& reply, const GenerateOptions& options);
/// "1 thread", "2 threads".
std::string counted(int64_t count, const std::string& what);
/// A file's contents; "-" reads standard input. Error if it cannot be read.
std::string read_text(const std::string& path);
/// "1,2,3" as ids. Error naming what is not a number.
std::vector<int32_t> parse_ids(const std::string& text);
/// A share of something long, drawn on stderr if that is a terminal. `share` is 0..1; 1 hides it.
void show_progress(const std::string& what, double share);
/// Frees the line of what is drawn, if anything is.
void hide_progress();
/// Draws the share of work that Ctrl-C may end wherever it tells of it: then the verb ends, with nothing half
/// drawn or half written, as a process does that SIGINT ended. Of any other work Ctrl-C is left to the
/// system.
std::function<void(double)> interruptible(const std::string& what);
/// How much of a prompt is computed; false once Ctrl-C was pressed (GenerateOptions::on_prompt).
bool show_prompt(int64_t done, int64_t all);

/// From here on Ctrl-C does not end the process. once: but the second does.
void catch_interrupts(bool once);
/// Whether it was pressed.
bool interrupted();
/// The same, and forgets it.
bool take_interrupt();

}  // namespace lockstep::cli
