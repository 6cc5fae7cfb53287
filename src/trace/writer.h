// Writing a trace while it is made: memory holds no more than a shard.
#pragma once

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "lockstep/divergence.h"

namespace lockstep {

/// Of the values' bits: equal tensors, equal hash.
std::string trace_hash(std::span<const float> values);

class TraceWriter {
 public:
  /// Error `io`.
  TraceWriter(std::filesystem::path directory, std::string precision, TraceStorage storage);
  /// Copies the values, reduced as the storage says; hash and statistics are of all.
  void add(const TraceEvent& event);
  /// Writes the manifest, which makes the trace whole; `facts` need hold no events.
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

  std::filesystem::path directory_;
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
