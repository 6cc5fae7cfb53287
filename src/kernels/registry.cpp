#include <limits>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "quant/blocks.h"
#include "tensor/fail.h"

namespace lockstep::kernels {

#if defined(__x86_64__)
// Found out here, where no instruction is used that a processor may lack.
const bool kPastCaches = __builtin_cpu_is("amd") != 0;
const bool kOneStream = __builtin_cpu_is("amd") != 0;

namespace {

const Table& avx512() {
  static const Table table = [] {
    Table here = kAvx512;
    // Zen 4 carries out 512 bits in halves, and products leave it half of its pipes: what unpacking takes
    // hides there.
    if (__builtin_cpu_is("amdfam19h")) {
      here.many_rows = 64;
      here.many_rows_fixed = std::numeric_limits<int64_t>::max();
    }
    return here;
  }();
  return table;
}

const Table& avx512bf16() {
  static const Table table = with_bf16_pairs(avx512());
  return table;
}

}  // namespace
#else
const bool kPastCaches = false;
const bool kOneStream = false;
#endif

bool Table::takes_many_fixed16(DType dtype, bool many) const {
  return many_fixed16 && (many || quant::code_format(dtype).bits > few_fixed16_bits);
}

std::span<const Table* const> available() {
  static const std::vector<const Table*> tables = [] {
    std::vector<const Table*> found;
#if defined(__x86_64__)
    if (avx512_runs_here()) found.push_back(&avx512());
    // On Intel's processors bf16 pairs are multiplied more slowly than f32, on AMD's twice as fast (`lockstep
    // bench --isa avx512bf16` prints both limits).
    if (avx512bf16_runs_here())
      found.insert(found.begin() + (__builtin_cpu_is("amd") ? 0 : 1), &avx512bf16());
    if (avx2_runs_here()) found.push_back(&kAvx2);
#endif
    found.push_back(&kScalar);
    return found;
  }();
  return tables;
}

const Table& select(std::string_view isa) {
  if (isa.empty()) return *available().front();
  std::string names;
  for (const Table* table : available()) {
    if (table->isa == isa) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  fail(ErrorCode::invalid_argument, "[isa] name: expected one that this processor runs ({}), got {}", names,
       isa);
}

}  // namespace lockstep::kernels
