// Writing a trace while it is made: memory holds no more than a shard.
#pragma once

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep {

inline constexpr int kTraceVersion = 1;
/// How manifests name the rules of hashes that can be checked: FNV-1a over the words of a whole tensor, and
/// the first 16 digits of SHA-256 over the bytes that are kept.
inline constexpr std::string_view kWordHash = "fnv1a-64-f32", kByteHash = "sha256-16";
/// Of the values' bits: equal tensors, equal hash.
std::string trace_hash(std::span<const float> values);

class TraceWriter {
 public:
  /// Writes beside the directory until the trace is whole. Error `io`; `invalid_argument` for a directory of
  /// other files.
  TraceWriter(const std::filesystem::path& directory, std::string precision, TraceStorage storage);
  /// Removes what is not finished.
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;
  /// Copies the values, reduced as the storage says; hash and statistics are of all.
  void add(const TraceEvent& event);
  /// Writes the manifest, which makes the trace whole, and puts it in the place of an earlier one; `facts`
  /// need hold no events.
  void finish(const Trace& facts);
  int64_t events() const { return events_; }

 private:
  struct Pending {
    std::string key;
    Shape shape;
    std::vector<float> values;
  };
  std::string shard_name() const;
  void flush();
  void put_in_place();

  std::filesystem::path directory_, partial_;
  std::string precision_;
  TraceStorage storage_;
  std::ofstream lines_;
  std::vector<Pending> pending_;
  std::set<std::string> sites_;
  size_t bytes_ = 0;
  int shards_ = 0;
  int64_t events_ = 0;
};

}  // namespace lockstep
