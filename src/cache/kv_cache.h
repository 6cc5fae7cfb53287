// The keys and values of one session. The cache owns layout, element type and window; callers only
// append rows at positions and read tiles of 64 keys, aligned to position 0, as f32 or as they are stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "lockstep/model.h"
#include "lockstep/session.h"

namespace lockstep {

class KvCache {
 public:
  static constexpr int64_t kTile = kernels::kTileKeys;

  KvCache(const CacheShape& shape, KvType type);
  KvCache(const KvCache& other);
  KvCache& operator=(const KvCache&) = delete;

  /// Makes room for positions [begin, end) of `layer`, where threads may then write, each to positions of its
  /// own.
  void reserve(int64_t layer, int64_t begin, int64_t end);
  /// Stores the key and value rows [Hkv, D] of `layer` at `position`, rounded to the element type. By several
  /// threads only after `reserve`.
  void write(int64_t layer, int64_t position, const float* k, const float* v, const kernels::Table& kernels);
  /// Reads tile `tile` of one KV head as f32. k: [D, 64], a column is a key; v: [64, padded_dim].
  /// Positions that were never written hold undefined finite values.
  void read_tile(int64_t layer, int64_t head, int64_t tile, float* k, float* v,
                 const kernels::Table& kernels) const;

  /// The same tile where it lies. Not of q8, which no kernel reads.
  kernels::KvTile stored_tile(int64_t layer, int64_t head, int64_t tile) const;
  KvType type() const { return type_; }

  /// Lets go of tiles that no position from `length` on can see. Tiles come into being in `reserve` and
  /// `write`.
  void drop_before(int64_t length);
  /// Forgets positions from `length` on. False if the window has already let go of what a token at
  /// `length` needs: then everything is forgotten, and the caller starts again from 0.
  bool rewind(int64_t length);

  const CacheShape& shape() const { return shape_; }
  /// Keys that a query of `layer` sees, itself included; 0: all.
  int64_t window(int64_t layer) const { return shape_.windows[layer]; }
  /// head_dim rounded up to 16.
  int64_t padded_dim() const { return padded_dim_; }
  int64_t bytes() const;

 private:
  // One tile of one layer, all heads. f32 and f16: k [D, 64], then v [64, padded] a head.
  // i16: as kernels::KvTile has them, then scales f32: k [64], v [64].
  // q8: the same as f32 in int8, then scales f32: k [blocks, 64], v [64, blocks].
  using Block = std::unique_ptr<std::byte[]>;

  int64_t oldest_tile(int64_t layer, int64_t length) const;
  // head_dim with the zero that makes pairs of it.
  int64_t even_dim() const { return (shape_.head_dim + 1) / 2 * 2; }
  // Where values and scales of i16 begin in a head, in bytes.
  int64_t i16_values() const { return 2 * kTile * even_dim(); }
  int64_t i16_scales() const { return i16_values() + 2 * kTile * padded_dim_; }
  std::byte* head_of(std::byte* block, int64_t head) const { return block + head * head_bytes_; }
  std::byte* block_for_write(int64_t layer, int64_t tile);
  void write_i16(std::byte* head, int64_t column, const float* k, const float* v, int16_t* words,
                 const kernels::Table& kernels) const;
  void read_i16(const std::byte* head, float* k, float* v) const;
  void write_q8(std::byte* head, int64_t column, const float* k, const float* v) const;
  void read_q8(const std::byte* head, float* k, float* v) const;

  CacheShape shape_;
  KvType type_;
  int64_t padded_dim_;
  int64_t head_bytes_;
  std::vector<int64_t> first_tile_;         // [layers]: tiles before it have been dropped
  std::vector<std::vector<Block>> layers_;  // [layers][tiles]; null: dropped or not yet written
};

}  // namespace lockstep
