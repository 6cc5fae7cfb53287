// fast.h against numpy's f64 (scripts/fixtures/ops.py), and the kernels against fast.h.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "lockstep/error.h"
#include "lockstep/fast.h"
#include "support/fixtures.h"
#include "support/tables.h"

namespace lockstep {
namespace {

using Json = nlohmann::json;
using Arrays = std::map<std::string, test::Array>;

struct Cases {
  std::string op;
  Json list;
  Arrays arrays;

  explicit Cases(const std::string& name)
      : op(name),
        list(Json::parse(std::ifstream(test::data_path("ops/" + name + ".json"))).at("cases")),
        arrays(test::load_arrays("ops/" + name + ".safetensors")) {}

  static std::string key(const Json& c, const std::string& input) {
    return c.at("name").get<std::string>() + "." + input;
  }
  bool has(const Json& c, const std::string& input) const { return arrays.contains(key(c, input)); }
  const test::Array& array(const Json& c, const std::string& input) const { return arrays.at(key(c, input)); }
  std::span<const float> floats(const Json& c, const std::string& input) const {
    return has(c, input) ? array(c, input).floats() : std::span<const float>();
  }
  // The stored tensor, with its axes in the order that the case asks for.
  View view(const Json& c, const std::string& input) const {
    const test::Array& stored = array(c, input);
    const View dense(stored.floats().data(), stored.shape);
    if (!c.contains("transpose") || c.at("transpose").is_null()) return dense;
    View view = dense;
    for (int axis = 0; axis < dense.shape.rank(); ++axis) {
      const int from = c.at("transpose").at(static_cast<size_t>(axis)).get<int>();
      view.shape[axis] = dense.shape[from];
      view.strides[axis] = dense.strides[from];
    }
    return view;
  }
};

// The comparison that every case goes through: no value beyond the tolerance, and no NaN.
bool within(const Tensor& actual, const test::Array& expected, double tolerance) {
  if (!(actual.shape() == expected.shape)) return false;
  for (size_t i = 0; i < expected.floats().size(); ++i) {
    const double error = std::abs(double{actual.values()[i]} - expected.floats()[i]);
    if (!(error <= tolerance)) return false;
  }
  return true;
}

bool passes(const Cases& cases, const Json& c, const Tensor& actual) {
  return within(actual, cases.array(c, "y"), c.at("tolerance").get<double>());
}

// Every case of an operation: right as it is, wrong as soon as one value is off or not a number.
void check(const Cases& cases, size_t count, const std::function<Tensor(const Json&)>& run) {
  EXPECT_EQ(cases.list.size(), count) << cases.op;
  for (const Json& c : cases.list) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    Tensor actual = run(c);
    EXPECT_TRUE(passes(cases, c, actual));
    float& last = actual.values().back();
    last += 3 * c.at("tolerance").get<float>();
    EXPECT_FALSE(passes(cases, c, actual));
    last = std::nanf("");
    EXPECT_FALSE(passes(cases, c, actual));
  }
}

Tensor random_tensor(const Shape& shape, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Tensor x(shape);
  for (float& value : x.values()) value = normal(generator);
  return x;
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && std::equal(a.values().begin(), a.values().end(), b.values().begin());
}

// Views of rank 4 whose elements are scattered in every way that strides allow, the last axis too.
std::vector<View> scattered(const Tensor& x) {
  const View dense(x);
  std::vector<View> views = {dense.transposed(1, 2), dense.transposed(0, 3), dense.transposed(2, 3),
                             dense.transposed(0, 1).transposed(1, 3)};
  View backwards = dense;
  backwards.data += (dense.shape[1] - 1) * dense.strides[1];
  backwards.strides[1] = -dense.strides[1];
  views.push_back(backwards);
  View repeated = dense;
  repeated.strides[1] = 0;
  views.push_back(repeated);
  return views;
}

// The message of the Error that `run` throws; "" if it throws none.
std::string refusal(const std::function<void()>& run) {
  try {
    run();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  return "";
}

// ---- rope --------------------------------------------------------------------------------------

Tensor run_rope(const Cases& cases, const Json& c) {
  fast::Offset offset;
  if (c.at("offset").is_string()) {
    offset = cases.array(c, "offset").ints();
  } else {
    offset = c.at("offset").get<int64_t>();
  }
  std::optional<float> base;
  if (!c.at("base").is_null()) base = c.at("base").get<float>();
  return fast::rope(cases.view(c, "x"), c.at("dims").get<int64_t>(), c.at("traditional").get<bool>(), base,
                    c.at("scale").get<float>(), offset, cases.floats(c, "freqs"));
}

TEST(FastRope, FixturesWithinTolerance) {
  const Cases cases("rope");
  check(cases, 39, [&](const Json& c) { return run_rope(cases, c); });
}

// The seed's fault: only the first head rotated, the others zero or left as they were.
TEST(FastRope, ComparisonSeesTheSeedsFault) {
  const Cases cases("rope");
  int seen = 0;
  for (const Json& c : cases.list) {
    SCOPED_TRACE(c.at("name").get<std::string>());
    const View x = cases.view(c, "x");
    const int64_t first = x.shape[-1] * x.shape[-2];  // values of the first head
    if (x.shape.size() == first) continue;
    Tensor zeroed = run_rope(cases, c);
    std::fill(zeroed.values().begin() + first, zeroed.values().end(), 0.0F);
    EXPECT_FALSE(passes(cases, c, zeroed));
    Tensor unrotated = x.copy();
    const Tensor sound = run_rope(cases, c);
    std::copy_n(sound.data(), first, unrotated.data());
    EXPECT_FALSE(passes(cases, c, unrotated));
    ++seen;
  }
  EXPECT_GE(seen, 30);
}

// seed.md's table: first three values of each head, to the digits that it prints.
const std::vector<std::vector<std::string>> kSeedTable = {{"0.188103", "-0.396822", "0.228618"},
                                                          {"-0.188103", "0.396822", "-0.228618"},
                                                          {"1.88103", "-3.96822", "2.28618"},
                                                          {"-1.88103", "3.96822", "-2.28618"}};
constexpr float kSeedFactors[] = {1, -1, 10, -10};

Tensor seed_heads(int64_t batch, int64_t length) {
  Tensor x(Shape{batch, 4, length, 8});
  float* out = x.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (float factor : kSeedFactors) {
      for (int64_t row = 0; row < length; ++row) {
        for (int d = 1; d <= 8; ++d) *out++ = factor * static_cast<float>(d) / 10;
      }
    }
  }
  return x;
}

Tensor seed_rope(const View& x, const fast::Offset& offset = int64_t{10}) {
  return fast::rope(x, 8, false, 10000.0F, 1.0F, offset);
}

void expect_seed_head(const float* row, size_t head) {
  for (size_t d = 0; d < 3; ++d) EXPECT_EQ(fmt::format("{:.6g}", row[d]), kSeedTable[head][d]);
}

// y: heads of `length` rows, the first of which is at position 10.
void expect_seed_table(const Tensor& y, int64_t batch, int64_t length) {
  ASSERT_EQ(y.size(), batch * 4 * length * 8);
  for (int64_t head = 0; head < batch * 4; ++head) {
    SCOPED_TRACE(fmt::format("{} head {}", y.shape().str(), head));
    expect_seed_head(y.data() + head * length * 8, static_cast<size_t>(head % 4));
  }
}

TEST(FastRope, SeedTableForEveryShape) {
  for (int64_t batch : {1, 2, 3}) {
    for (int64_t length : {1, 2, 3}) {
      const Tensor x = seed_heads(batch, length);
      expect_seed_table(seed_rope(x), batch, length);
      // Heads taken for batches, as the module in the seed did.
      expect_seed_table(seed_rope(View(x.data(), {batch * 4, length, 8})), batch, length);
      // [B, L, H, D] in memory.
      const Tensor by_position = View(x).transposed(1, 2).copy();
      expect_seed_table(seed_rope(View(by_position).transposed(1, 2)), batch, length);
      const std::vector<int32_t> offsets(static_cast<size_t>(batch), 10);
      expect_seed_table(seed_rope(x, std::span<const int32_t>(offsets)), batch, length);
      for (size_t head = 0; head < 4; ++head) {
        const float* rows = x.data() + static_cast<int64_t>(head) * length * 8;
        expect_seed_head(seed_rope(View(rows, {length, 8})).data(), head);
      }
    }
  }
}

TEST(FastRope, SeedTableWithOffsetsOfTheirOwn) {
  const Tensor x = seed_heads(3, 2);
  const std::vector<int32_t> offsets = {7, 10, 9};
  const Tensor y = seed_rope(x, std::span<const int32_t>(offsets));
  for (size_t head = 0; head < 4; ++head) {
    const auto h = static_cast<int64_t>(head);
    expect_seed_head(y.row(1) + h * 16, head);      // position 10 is row 0 of batch 1,
    expect_seed_head(y.row(2) + h * 16 + 8, head);  // row 1 of batch 2,
    EXPECT_NE(fmt::format("{:.6g}", y.row(0)[h * 16]), kSeedTable[head][0]);  // none of batch 0
  }
}

// What a row becomes depends on the row and its position alone.
TEST(FastRope, EveryRowAsIfAlone) {
  for (bool traditional : {false, true}) {
    for (const Shape& shape :
         {Shape{1, 4, 1, 6}, Shape{3, 2, 4, 6}, Shape{4, 1, 6}, Shape{5, 6}, Shape{2, 1, 3, 2, 6}}) {
      const Tensor x = random_tensor(shape, 1);
      const Tensor y = fast::rope(x, 4, traditional, 500.0F, 0.5F, int64_t{12});
      for (int64_t row = 0; row < x.size() / 6; ++row) {
        const int64_t position = 12 + row % shape[-2];
        const Tensor alone =
            fast::rope(View(x.data() + row * 6, {1, 6}), 4, traditional, 500.0F, 0.5F, position);
        EXPECT_TRUE(std::equal(alone.data(), alone.data() + 6, y.data() + row * 6))
            << shape.str() << " row " << row;
      }
    }
  }
}

TEST(FastRope, AnyStrides) {
  const Tensor x = random_tensor({4, 6, 8, 10}, 2);
  for (const View& view : scattered(x)) {
    const Tensor expected = fast::rope(view.copy(), 4, false, 10000.0F, 1.0F, int64_t{5});
    EXPECT_TRUE(same_bits(fast::rope(view, 4, false, 10000.0F, 1.0F, int64_t{5}), expected))
        << view.shape.str() << view.strides.str();
  }
}

TEST(FastRope, NothingToRotate) {
  EXPECT_EQ(fast::rope(Tensor(Shape{2, 0, 3, 8}), 8, false, 10000.0F, 1.0F, int64_t{0}).shape(),
            (Shape{2, 0, 3, 8}));
}

TEST(FastRope, RefusesWrongArguments) {
  const Tensor x = Tensor::zeros({3, 2, 8});
  const std::vector<float> freqs(4, 1.0F);
  const std::vector<int32_t> offsets = {1, 2};
  const auto rope = [&](const View& view, int64_t dims, std::optional<float> base, const fast::Offset& offset,
                        std::span<const float> divisors) {
    return refusal([&] { fast::rope(view, dims, false, base, 1.0F, offset, divisors); });
  };
  const fast::Offset zero = int64_t{0};
  const fast::Offset rows = std::span<const int32_t>(offsets);
  EXPECT_EQ(rope(Tensor::zeros({8}), 8, 10.0F, zero, {}),
            "[fast::rope] x: expected rank 2 or more, got shape [8]");
  EXPECT_EQ(rope(View(x.data(), {3, 2, 8}, {8, 1}), 8, 10.0F, zero, {}),
            "[fast::rope] x: expected one stride per axis of [3, 2, 8], got [8, 1]");
  for (int64_t dims : {-2, 0, 3, 10}) {
    EXPECT_EQ(rope(x, dims, 10.0F, zero, {}),
              fmt::format("[fast::rope] dims: expected an even number from 2 to 8, got {}", dims));
  }
  EXPECT_EQ(rope(x, 8, {}, zero, {}), "[fast::rope] base: expected either base or freqs, got neither");
  EXPECT_EQ(rope(x, 8, 10.0F, zero, freqs), "[fast::rope] base: expected either base or freqs, got both");
  EXPECT_EQ(rope(x, 8, 0.0F, zero, {}), "[fast::rope] base: expected a positive number, got 0");
  EXPECT_EQ(rope(x, 8, std::nanf(""), zero, {}), "[fast::rope] base: expected a positive number, got nan");
  EXPECT_EQ(rope(x, 6, {}, zero, freqs), "[fast::rope] freqs: expected dims / 2 = 3 values, got 4");
  EXPECT_EQ(rope(x, 8, 10.0F, rows, {}),
            "[fast::rope] offset: expected 3 values, one per index of axis 0 of [3, 2, 8], got 2");
  EXPECT_EQ(rope(Tensor::zeros({2, 8}), 8, 10.0F, rows, {}),
            "[fast::rope] offset: expected one number for x [2, 8], which has no batch axis, "
            "got 2");
}

// Every ISA rotates as fast::rope does, bit for bit, in rows that end inside a vector, and writes
// nothing beyond them.
TEST(FastRope, KernelsOfEveryIsaAgree) {
  for (int64_t half : {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33, 63, 64, 65}) {
    const int64_t dims = 2 * half;
    const auto rope = [&](const View& x) { return fast::rope(x, dims, false, 10000.0F, 1.0F, int64_t{129}); };
    Tensor ones = Tensor::zeros({1, dims});  // (1, 0) turns into (cosine, sine)
    std::fill_n(ones.data(), half, 1.0F);
    const Tensor turned = rope(ones);
    const Tensor x = random_tensor({1, dims}, static_cast<unsigned>(half));
    const Tensor expected = rope(x);
    for (const kernels::Table* table : test::tables()) {
      std::vector<float> row(static_cast<size_t>(dims + 16), 7.0F);
      std::copy_n(x.data(), dims, row.data());
      table->rotate_halves(row.data(), turned.data(), turned.data() + half, half);
      EXPECT_TRUE(std::equal(expected.data(), expected.data() + dims, row.data()))
          << table->isa << " half " << half;
      EXPECT_EQ(std::vector<float>(row.end() - 16, row.end()), std::vector<float>(16, 7.0F))
          << table->isa << " half " << half;
    }
  }
}

// ---- norms -------------------------------------------------------------------------------------

TEST(FastRmsNorm, FixturesWithinTolerance) {
  const Cases cases("rms_norm");
  check(cases, 24, [&](const Json& c) {
    return fast::rms_norm(cases.view(c, "x"), cases.floats(c, "weight"), c.at("eps").get<float>());
  });
}

TEST(FastLayerNorm, FixturesWithinTolerance) {
  const Cases cases("layer_norm");
  check(cases, 27, [&](const Json& c) {
    return fast::layer_norm(cases.view(c, "x"), cases.floats(c, "weight"), cases.floats(c, "bias"),
                            c.at("eps").get<float>());
  });
}

TEST(FastNorms, AnyStrides) {
  const Tensor x = random_tensor({2, 3, 4, 5}, 3);
  for (const View& view : scattered(x)) {
    EXPECT_TRUE(same_bits(fast::rms_norm(view, {}, 1e-5F), fast::rms_norm(view.copy(), {}, 1e-5F)))
        << view.shape.str() << view.strides.str();
    EXPECT_TRUE(
        same_bits(fast::layer_norm(view, {}, {}, 1e-5F), fast::layer_norm(view.copy(), {}, {}, 1e-5F)))
        << view.shape.str() << view.strides.str();
  }
}

TEST(FastNorms, RefuseWrongArguments) {
  const Tensor x = Tensor::zeros({2, 8});
  const std::vector<float> seven(7);
  EXPECT_EQ(refusal([&] { fast::rms_norm(View(x.data(), Shape{}), {}, 1e-5F); }),
            "[fast::rms_norm] x: expected rank 1 or more, got shape []");
  EXPECT_EQ(refusal([&] { fast::rms_norm(x, seven, 1e-5F); }),
            "[fast::rms_norm] weight: expected 8 values or none for x [2, 8], got 7");
  EXPECT_EQ(refusal([&] { fast::layer_norm(View(x.data(), Shape{}), {}, {}, 1e-5F); }),
            "[fast::layer_norm] x: expected rank 1 or more, got shape []");
  EXPECT_EQ(refusal([&] { fast::layer_norm(x, seven, {}, 1e-5F); }),
            "[fast::layer_norm] weight: expected 8 values or none for x [2, 8], got 7");
  EXPECT_EQ(refusal([&] { fast::layer_norm(x, {}, seven, 1e-5F); }),
            "[fast::layer_norm] bias: expected 8 values or none for x [2, 8], got 7");
}

// ---- attention ---------------------------------------------------------------------------------

Tensor run_attention(const Cases& cases, const Json& c, const fast::Mask& mask) {
  return fast::scaled_dot_product_attention(cases.view(c, "q"), cases.view(c, "k"), cases.view(c, "v"),
                                            c.at("scale").get<float>(), mask, cases.floats(c, "sinks"));
}

TEST(FastAttention, FixturesWithinTolerance) {
  const Cases cases("attention");
  check(cases, 34, [&](const Json& c) {
    fast::Mask mask;
    mask.causal = c.at("mask") == "causal";
    if (c.at("mask") != "tensor") return run_attention(cases, c, mask);
    const test::Array& stored = cases.array(c, "mask");
    if (stored.dtype == DType::boolean) {
      mask.boolean = stored.as<uint8_t>();
      mask.boolean_shape = stored.shape;
      return run_attention(cases, c, mask);
    }
    const View additive(stored.floats().data(), stored.shape);
    mask.additive = &additive;
    return run_attention(cases, c, mask);
  });
}

// The fixtures give a window as a mask; `window` must mean the same.
TEST(FastAttention, WindowIsItsMask) {
  const Cases cases("attention");
  int windows = 0;
  for (const Json& c : cases.list) {
    if (!c.contains("window")) continue;
    SCOPED_TRACE(c.at("name").get<std::string>());
    fast::Mask mask;
    mask.causal = true;
    mask.window = c.at("window").get<int64_t>();
    EXPECT_TRUE(passes(cases, c, run_attention(cases, c, mask)));
    ++mask.window;  // sees one key more, if there is one
    EXPECT_EQ(passes(cases, c, run_attention(cases, c, mask)), mask.window > cases.view(c, "k").shape[2]);
    ++windows;
  }
  EXPECT_EQ(windows, 6);
}

// Query heads that take their KV heads in turn, instead of group by group.
TEST(FastAttention, ComparisonSeesSwappedHeads) {
  const Cases cases("attention");
  int seen = 0;
  for (const Json& c : cases.list) {
    const int64_t heads = cases.view(c, "q").shape[1];
    const int64_t kv_heads = cases.view(c, "k").shape[1];
    if (kv_heads == 1 || kv_heads == heads || c.at("mask") == "tensor") continue;
    SCOPED_TRACE(c.at("name").get<std::string>());
    const View k = cases.view(c, "k"), v = cases.view(c, "v");
    Tensor turned(cases.array(c, "y").shape);
    for (int64_t h = 0; h < heads; ++h) {
      const auto one = [](View x, int64_t head) {
        x.data += head * x.strides[1];
        x.shape[1] = 1;
        return x;
      };
      fast::Mask mask;
      mask.causal = c.at("mask") == "causal";
      const auto sinks = cases.floats(c, "sinks");
      const Tensor y = fast::scaled_dot_product_attention(
          one(cases.view(c, "q"), h), one(k, h % kv_heads), one(v, h % kv_heads), c.at("scale").get<float>(),
          mask, sinks.empty() ? sinks : sinks.subspan(static_cast<size_t>(h), 1));
      for (int64_t b = 0; b < y.shape()[0]; ++b) {
        std::copy_n(y.row(b), y.row_size(), turned.row(b) + h * y.row_size());
      }
    }
    EXPECT_FALSE(passes(cases, c, turned));
    ++seen;
  }
  EXPECT_GE(seen, 5);
}

TEST(FastAttention, AnyStrides) {
  const Tensor x = random_tensor({2, 2, 2, 2}, 4);
  const Tensor bias = random_tensor({2, 2, 2, 2}, 5);
  for (const View& view : scattered(x)) {
    for (const View& mask_view : scattered(bias)) {
      const Tensor dense = view.copy();
      const Tensor dense_bias = mask_view.copy();
      const View dense_bias_view(dense_bias);
      fast::Mask mask, dense_mask;
      mask.additive = &mask_view;
      dense_mask.additive = &dense_bias_view;
      EXPECT_TRUE(same_bits(fast::scaled_dot_product_attention(view, view, view, 0.7F, mask),
                            fast::scaled_dot_product_attention(dense, dense, dense, 0.7F, dense_mask)))
          << view.strides.str() << mask_view.strides.str();
    }
  }
}

// One query, three keys: the parts of a mask all have to let a key through.
TEST(FastAttention, PartsOfAMaskAddUp) {
  const Tensor q = Tensor::zeros({1, 1, 3, 2});
  const Tensor k = Tensor::zeros({1, 1, 3, 2});
  const Tensor v = Tensor::from({1, 1, 3, 1}, std::vector<float>{1, 10, 100});
  const float infinity = std::numeric_limits<float>::infinity();
  const Tensor bias = Tensor::from({3, 1}, std::vector<float>{0, 0, -infinity});
  const View bias_view(bias);
  const std::vector<uint8_t> seen = {0, 1, 1};
  fast::Mask mask;
  mask.causal = true;
  mask.boolean = seen;
  mask.boolean_shape = {3};
  mask.additive = &bias_view;
  const Tensor y = fast::scaled_dot_product_attention(q, k, v, 1.0F, mask);
  EXPECT_EQ(std::vector<float>(y.values().begin(), y.values().end()), (std::vector<float>{0, 10, 0}));
  mask = {};
  mask.window = 1;  // without `causal`: nothing older than itself
  const Tensor newer = fast::scaled_dot_product_attention(q, k, v, 1.0F, mask);
  EXPECT_EQ(std::vector<float>(newer.values().begin(), newer.values().end()),
            (std::vector<float>{37, 55, 100}));
}

// NaN in an unseen slot is nobody's business; in a seen one it must come out, not turn into 0.
TEST(FastAttention, NanIsSeenIfTheKeyIs) {
  const Tensor q = Tensor::from({1, 1, 1, 1}, std::vector<float>{1});
  const Tensor k = Tensor::from({1, 1, 2, 1}, std::vector<float>{1, std::nanf("")});
  const Tensor v = Tensor::from({1, 1, 2, 1}, std::vector<float>{3, std::nanf("")});
  const std::vector<uint8_t> seen = {1, 0};
  fast::Mask mask;
  mask.boolean = seen;
  mask.boolean_shape = {2};
  EXPECT_EQ(*fast::scaled_dot_product_attention(q, k, v, 1.0F, mask).data(), 3.0F);
  EXPECT_TRUE(std::isnan(*fast::scaled_dot_product_attention(q, k, v, 1.0F).data()));
  const Tensor only_nan = Tensor::from({1, 1, 1, 1}, std::vector<float>{std::nanf("")});
  EXPECT_TRUE(std::isnan(*fast::scaled_dot_product_attention(q, only_nan, q, 1.0F).data()));
}

TEST(FastAttention, NoKeysGiveZero) {
  const Tensor q = random_tensor({1, 2, 3, 4}, 6);
  const Tensor none(Shape{1, 1, 0, 4});
  const Tensor y = fast::scaled_dot_product_attention(q, none, none, 1.0F);
  EXPECT_TRUE(same_bits(y, Tensor::zeros({1, 2, 3, 4})));
}

TEST(FastAttention, RefusesWrongShapes) {
  const Tensor q = Tensor::zeros({2, 6, 3, 8});
  const Tensor k = Tensor::zeros({2, 2, 5, 8});
  const auto attention = [](const View& queries, const View& keys, const View& values) {
    return refusal([&] { fast::scaled_dot_product_attention(queries, keys, values, 1.0F); });
  };
  const std::string op = "[fast::scaled_dot_product_attention] ";
  EXPECT_EQ(attention(Tensor::zeros({6, 3, 8}), k, k),
            op + "q: expected 4 axes, got shape [6, 3, 8] and strides [24, 8, 1]");
  EXPECT_EQ(attention(q, k, Tensor::zeros({5, 8})),
            op + "v: expected 4 axes, got shape [5, 8] and strides [8, 1]");
  for (int64_t kv_heads : {0, 4}) {
    const Tensor wrong = Tensor::zeros({2, kv_heads, 5, 8});
    EXPECT_EQ(attention(q, wrong, wrong),
              op + fmt::format("k: expected KV heads that divide the 6 of q, got {}", kv_heads));
  }
  EXPECT_EQ(attention(q, Tensor::zeros({1, 2, 5, 8}), k),
            op + "k: expected shape [2, 2, 5, 8] for q [2, 6, 3, 8], got [1, 2, 5, 8]");
  EXPECT_EQ(attention(q, Tensor::zeros({2, 2, 5, 6}), k),
            op + "k: expected shape [2, 2, 5, 8] for q [2, 6, 3, 8], got [2, 2, 5, 6]");
  EXPECT_EQ(attention(q, k, Tensor::zeros({2, 2, 4, 3})),
            op + "v: expected shape [2, 2, 5, 3] for k [2, 2, 5, 8], got [2, 2, 4, 3]");
}

TEST(FastAttention, RefusesWrongMasksAndSinks) {
  const Tensor q = Tensor::zeros({2, 6, 3, 8});
  const Tensor k = Tensor::zeros({2, 2, 5, 8});
  const auto attention = [&](const fast::Mask& mask, std::span<const float> sinks = {}) {
    return refusal([&] { fast::scaled_dot_product_attention(q, k, k, 1.0F, mask, sinks); });
  };
  const std::string op = "[fast::scaled_dot_product_attention] ";
  const std::vector<float> two(2);
  EXPECT_EQ(attention({}, two), op + "sinks: expected 6 values, one per head, or none, got 2");
  fast::Mask mask;
  mask.window = -1;
  EXPECT_EQ(attention(mask), op + "window: expected 0 for none or more, got -1");
  for (const Shape& shape : {Shape{3, 4}, Shape{2, 2, 3, 5}, Shape{1, 1, 1, 3, 5}}) {
    const std::string rest = " mask: expected a shape that broadcasts to [2, 6, 3, 5], got " + shape.str();
    const Tensor values = Tensor::zeros(shape);
    const View additive(values);
    mask = {};
    mask.additive = &additive;
    EXPECT_EQ(attention(mask), op + "additive" + rest);
    const std::vector<uint8_t> seen(static_cast<size_t>(shape.size()), 1);
    mask = {};
    mask.boolean = seen;
    mask.boolean_shape = shape;
    EXPECT_EQ(attention(mask), op + "boolean" + rest);
  }
  mask = {};
  mask.boolean_shape = {3, 5};
  EXPECT_EQ(attention(mask), op + "boolean mask: expected 15 values for shape [3, 5], got 0");
}

}  // namespace
}  // namespace lockstep
