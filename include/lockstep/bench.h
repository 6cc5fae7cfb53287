// Measuring: what a model reaches here, and what the machine allows.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "lockstep/session.h"

namespace lockstep {

/// What this machine can do with some number of threads, measured.
struct MachineLimits {
  double read_gbs = 0;   ///< streaming read of memory, 1e9 bytes/s
  double int8_gops = 0;  ///< products and sums of 8-bit integers, 1e9 operations/s; 0: no such kernel
  double bf16_gops = 0;  ///< of bf16 pairs; 0: the kernels in use have no such product
  double f32_gops = 0;   ///< fused multiply-adds in f32
};
/// Takes about a second. isa: empty for the best.
/// Error `invalid_argument` for an unknown isa.
MachineLimits measure_limits(int threads, const std::string& isa = {});

/// What is measured, and how often.
struct BenchOptions {
  int64_t prefill = 512;  ///< tokens in one prompt
  int64_t decode = 128;   ///< tokens generated one by one
  int64_t depth = 0;      ///< tokens already in the session
  int64_t streams = 1;    ///< sessions decoded together
  int repeat = 5;
  SessionOptions session;
  std::function<void(double)> progress;  ///< share of the measurements done, 0..1
};

/// Medians of the repeats, with the least and the most.
struct Spread {
  double median = 0;
  double least = 0;
  double most = 0;
};
/// Speeds, and what they come to beside the limits of the machine.
struct BenchResult {
  Spread prefill_tps;
  Spread decode_tps;        ///< of all streams together
  int64_t token_bytes = 0;  ///< stored weight bytes and KV bytes read for one decoded token
  double decode_gbs = 0;    ///< token_bytes * passes a second
  double prefill_gops = 0;  ///< operations of products with stored weights, a second
};
BenchResult run_bench(const std::shared_ptr<const Model>& model, const BenchOptions& options);

}  // namespace lockstep
