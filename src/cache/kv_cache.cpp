#include "cache/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/fail.h"

namespace lockstep {
namespace {

constexpr int64_t kQ8Block = 32;

int64_t q8_blocks(int64_t dim) { return (dim + kQ8Block - 1) / kQ8Block; }

// Scale that brings `count` values into [-127, 127]; NaN if one of them is not finite.
float q8_scale(const float* values, int64_t count) {
  float peak = 0;
  float finite = 0;
  for (int64_t i = 0; i < count; ++i) {
    peak = std::max(peak, std::fabs(values[i]));
    finite += values[i] * 0.0F;
  }
  return peak / 127.0F + finite;
}

int8_t q8_code(float value, float scale) {
  const float code = scale > 0 ? std::nearbyint(value / scale) : 0.0F;
  return static_cast<int8_t>(std::clamp(code, -127.0F, 127.0F));
}

}  // namespace

KvCache::KvCache(const CacheShape& shape, KvType type)
    : shape_(shape),
      type_(type),
      padded_dim_((shape.head_dim + 15) / 16 * 16),
      first_tile_(static_cast<size_t>(shape.layers), 0),
      layers_(static_cast<size_t>(shape.layers)) {
  const int64_t elements = kTile * (shape.head_dim + padded_dim_);
  switch (type) {
    case KvType::f32: head_bytes_ = 4 * elements; break;
    case KvType::f16: head_bytes_ = 2 * elements; break;
    case KvType::i16: head_bytes_ = i16_scales() + 4 * 2 * kTile; break;
    case KvType::q8: head_bytes_ = elements + 4 * 2 * kTile * q8_blocks(shape.head_dim); break;
  }
}

KvCache::KvCache(const KvCache& other)
    : shape_(other.shape_),
      type_(other.type_),
      padded_dim_(other.padded_dim_),
      head_bytes_(other.head_bytes_),
      first_tile_(other.first_tile_),
      layers_(other.layers_.size()) {
  const auto size = static_cast<size_t>(head_bytes_ * shape_.kv_heads);
  for (size_t layer = 0; layer < layers_.size(); ++layer) {
    for (const Block& block : other.layers_[layer]) {
      Block copy;
      if (block) {
        copy = std::make_unique_for_overwrite<std::byte[]>(size);
        std::memcpy(copy.get(), block.get(), size);
      }
      layers_[layer].push_back(std::move(copy));
    }
  }
}

std::byte* KvCache::block_for_write(int64_t layer, int64_t tile) {
  auto& tiles = layers_[layer];
  if (static_cast<int64_t>(tiles.size()) <= tile) tiles.resize(static_cast<size_t>(tile) + 1);
  Block& block = tiles[tile];
  // Zeroed: kernels load whole tiles, and masked lanes must not hold NaN bits.
  if (!block) block = std::make_unique<std::byte[]>(static_cast<size_t>(head_bytes_ * shape_.kv_heads));
  return block.get();
}

void KvCache::reserve(int64_t layer, int64_t begin, int64_t end) {
  for (int64_t tile = begin / kTile; tile * kTile < end; ++tile) block_for_write(layer, tile);
}

void KvCache::write(int64_t layer, int64_t position, const float* k, const float* v,
                    const kernels::Table& kernels) {
  const int64_t dim = shape_.head_dim;
  const int64_t column = position % kTile;
  std::byte* block = block_for_write(layer, position / kTile);
  std::vector<int16_t> words(static_cast<size_t>(type_ == KvType::i16 ? padded_dim_ : 0));
  for (int64_t head = 0; head < shape_.kv_heads; ++head, k += dim, v += dim) {
    std::byte* at = head_of(block, head);
    if (type_ == KvType::f32) {
      auto* keys = reinterpret_cast<float*>(at);
      for (int64_t d = 0; d < dim; ++d) keys[d * kTile + column] = k[d];
      std::copy_n(v, dim, keys + dim * kTile + column * padded_dim_);
    } else if (type_ == KvType::f16) {
      auto* keys = reinterpret_cast<uint16_t*>(at);
      uint16_t rounded[16];
      for (int64_t d = 0; d < dim; d += 16) {
        const int64_t count = std::min<int64_t>(16, dim - d);
        kernels.f32_to_f16(k + d, rounded, count);
        for (int64_t i = 0; i < count; ++i) keys[(d + i) * kTile + column] = rounded[i];
      }
      kernels.f32_to_f16(v, keys + dim * kTile + column * padded_dim_, dim);
    } else if (type_ == KvType::i16) {
      write_i16(at, column, k, v, words.data(), kernels);
    } else {
      write_q8(at, column, k, v);
    }
  }
}

// words: [padded], to work in.
void KvCache::write_i16(std::byte* head, int64_t column, const float* k, const float* v, int16_t* words,
                        const kernels::Table& kernels) const {
  const int64_t dim = shape_.head_dim;
  auto* keys = reinterpret_cast<int16_t*>(head);                   // [D / 2, 64, 2]
  auto* values = reinterpret_cast<int16_t*>(head + i16_values());  // [32, padded, 2]
  auto* k_scale = reinterpret_cast<float*>(head + i16_scales());   // [64]
  float* v_scale = k_scale + kTile;                                // [64]
  k_scale[column] = kernels.to_i16(k, dim, kernels::largest_key(dim), words);
  for (int64_t d = 0; d < dim; d += 2) std::copy_n(words + d, 2, keys + d * kTile + 2 * column);
  v_scale[column] = kernels.to_i16(v, dim, kernels::kLargestValue, words);
  int16_t* pairs = values + column / 2 * 2 * padded_dim_ + column % 2;
  for (int64_t d = 0; d < dim; ++d) pairs[2 * d] = words[d];
}

void KvCache::read_i16(const std::byte* head, float* k, float* v) const {
  const auto* keys = reinterpret_cast<const int16_t*>(head);
  const auto* values = reinterpret_cast<const int16_t*>(head + i16_values());
  const auto* k_scale = reinterpret_cast<const float*>(head + i16_scales());
  const float* v_scale = k_scale + kTile;
  for (int64_t d = 0; d < shape_.head_dim; ++d) {
    const int16_t* pairs = keys + d / 2 * 2 * kTile + d % 2;
    for (int64_t j = 0; j < kTile; ++j) k[d * kTile + j] = static_cast<float>(pairs[2 * j]) * k_scale[j];
  }
  for (int64_t j = 0; j < kTile; ++j) {
    const int16_t* pairs = values + j / 2 * 2 * padded_dim_ + j % 2;
    for (int64_t d = 0; d < padded_dim_; ++d)
      v[j * padded_dim_ + d] = static_cast<float>(pairs[2 * d]) * v_scale[j];
  }
}

void KvCache::write_q8(std::byte* head, int64_t column, const float* k, const float* v) const {
  const int64_t dim = shape_.head_dim;
  const int64_t blocks = q8_blocks(dim);
  auto* keys = reinterpret_cast<int8_t*>(head);
  int8_t* values = keys + dim * kTile;
  auto* k_scales = reinterpret_cast<float*>(values + kTile * padded_dim_);
  float* v_scales = k_scales + blocks * kTile;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kQ8Block;
    const int64_t count = std::min(kQ8Block, dim - first);
    const float k_scale = q8_scale(k + first, count);
    const float v_scale = q8_scale(v + first, count);
    k_scales[b * kTile + column] = k_scale;
    v_scales[column * blocks + b] = v_scale;
    for (int64_t d = first; d < first + count; ++d) {
      keys[d * kTile + column] = q8_code(k[d], k_scale);
      values[column * padded_dim_ + d] = q8_code(v[d], v_scale);
    }
  }
}

void KvCache::read_tile(int64_t layer, int64_t head, int64_t tile, float* k, float* v,
                        const kernels::Table& kernels) const {
  const std::byte* at = layers_[layer][tile].get() + head * head_bytes_;
  const int64_t k_size = shape_.head_dim * kTile;
  const int64_t v_size = kTile * padded_dim_;
  if (type_ == KvType::f32) {
    std::memcpy(k, at, static_cast<size_t>(k_size) * 4);
    std::memcpy(v, at + k_size * 4, static_cast<size_t>(v_size) * 4);
  } else if (type_ == KvType::f16) {
    const auto* halves = reinterpret_cast<const uint16_t*>(at);
    kernels.f16_to_f32(halves, k, k_size);
    kernels.f16_to_f32(halves + k_size, v, v_size);
  } else if (type_ == KvType::i16) {
    read_i16(at, k, v);
  } else {
    read_q8(at, k, v);
  }
}

kernels::KvTile KvCache::stored_tile(int64_t layer, int64_t head, int64_t tile) const {
  const std::byte* at = layers_[layer][tile].get() + head * head_bytes_;
  switch (type_) {
    case KvType::f32: return {kernels::TileForm::f32, at, at + 4 * kTile * shape_.head_dim};
    case KvType::f16: return {kernels::TileForm::f16, at, at + 2 * kTile * shape_.head_dim};
    default: break;
  }
  const auto* scales = reinterpret_cast<const float*>(at + i16_scales());
  return {kernels::TileForm::i16, at, at + i16_values(), scales, scales + kTile};
}

void KvCache::read_q8(const std::byte* head, float* k, float* v) const {
  const int64_t dim = shape_.head_dim;
  const int64_t blocks = q8_blocks(dim);
  const auto* keys = reinterpret_cast<const int8_t*>(head);
  const int8_t* values = keys + dim * kTile;
  const auto* k_scales = reinterpret_cast<const float*>(values + kTile * padded_dim_);
  const float* v_scales = k_scales + blocks * kTile;
  for (int64_t d = 0; d < dim; ++d) {
    const float* scales = k_scales + d / kQ8Block * kTile;
    for (int64_t j = 0; j < kTile; ++j) {
      k[d * kTile + j] = static_cast<float>(keys[d * kTile + j]) * scales[j];
    }
  }
  for (int64_t j = 0; j < kTile; ++j) {
    for (int64_t d = 0; d < padded_dim_; ++d) {
      const float scale = d < dim ? v_scales[j * blocks + d / kQ8Block] : 0.0F;
      v[j * padded_dim_ + d] = static_cast<float>(values[j * padded_dim_ + d]) * scale;
    }
  }
}

// First tile that a token at `length` or later can see.
int64_t KvCache::oldest_tile(int64_t layer, int64_t length) const {
  return window(layer) == 0 ? 0 : std::max<int64_t>(0, length - window(layer) + 1) / kTile;
}

void KvCache::drop_before(int64_t length) {
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    const int64_t oldest = oldest_tile(layer, length);
    for (int64_t& tile = first_tile_[layer]; tile < oldest; ++tile) layers_[layer][tile].reset();
  }
}

bool KvCache::rewind(int64_t length) {
  bool possible = true;
  for (int64_t layer = 0; layer < shape_.layers; ++layer) {
    possible = possible && oldest_tile(layer, length) >= first_tile_[layer];
  }
  const int64_t kept = possible ? (length + kTile - 1) / kTile : 0;
  for (auto& tiles : layers_) {
    if (static_cast<int64_t>(tiles.size()) > kept) tiles.resize(static_cast<size_t>(kept));
  }
  if (!possible) std::fill(first_tile_.begin(), first_tile_.end(), 0);
  return possible;
}

int64_t KvCache::bytes() const {
  int64_t blocks = 0;
  for (const auto& tiles : layers_) {
    blocks += std::count_if(tiles.begin(), tiles.end(), [](const Block& b) { return b != nullptr; });
  }
  return blocks * head_bytes_ * shape_.kv_heads;
}

}  // namespace lockstep
