// Stored formats against gguf-py and mlx, bit for bit; and panels against the stored rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <random>
#include <string>

#include "kernels/kernels.h"
#include "nn/linear.h"
#include "nn/precision.h"
#include "quant/blocks.h"
#include "quant/half.h"
#include "quant/pack.h"
#include "support/fixtures.h"
#include "support/tables.h"

namespace lockstep {
namespace {

struct Case {
  std::string name;
  StoredTensor tensor;
  test::Array codes, scales, biases;  // own the bytes that `tensor` points to
  std::vector<float> values;          // [rows, columns], from the reference
};

const std::map<std::string, DType> kGgufTypes = {
    {"F16", DType::f16},   {"BF16", DType::bf16}, {"Q4_0", DType::q4_0}, {"Q4_1", DType::q4_1},
    {"Q5_0", DType::q5_0}, {"Q5_1", DType::q5_1}, {"Q8_0", DType::q8_0}, {"Q4_K", DType::q4_k},
    {"Q5_K", DType::q5_k}, {"Q6_K", DType::q6_k}};

std::vector<std::unique_ptr<Case>> load_cases() {
  std::vector<std::unique_ptr<Case>> cases;
  auto gguf = test::load_arrays("dequant/gguf.safetensors");
  for (const auto& [name, dtype] : kGgufTypes) {
    auto c = std::make_unique<Case>();
    c->name = name;
    c->codes = gguf.at(name + ".bytes");
    const auto& values = gguf.at(name + ".values");
    c->values.assign(values.floats().begin(), values.floats().end());
    c->tensor.name = c->tensor.source = name;
    c->tensor.dtype = dtype;
    c->tensor.shape = values.shape;
    c->tensor.data = c->codes.bytes;
    cases.push_back(std::move(c));
  }
  auto mlx = test::load_arrays("dequant/mlx.safetensors");
  for (const auto& [key, array] : mlx) {
    const size_t dot = key.find(".w");
    if (dot == std::string::npos || key.substr(dot) != ".w") continue;
    auto c = std::make_unique<Case>();
    c->name = "mlx_" + key.substr(0, dot);  // b4_g128_bf16
    c->codes = array;
    c->scales = mlx.at(key.substr(0, dot) + ".scales");
    c->biases = mlx.at(key.substr(0, dot) + ".biases");
    const auto& values = mlx.at(key.substr(0, dot) + ".values");
    c->values.assign(values.floats().begin(), values.floats().end());
    c->tensor.name = c->tensor.source = c->name;
    c->tensor.dtype = key[1] == '4' ? DType::mlx_q4 : DType::mlx_q8;
    c->tensor.shape = values.shape;
    c->tensor.data = c->codes.bytes;
    c->tensor.scales = c->scales.bytes;
    c->tensor.biases = c->biases.bytes;
    c->tensor.scale_dtype = c->scales.dtype;
    c->tensor.group_size = values.shape[1] / c->scales.shape[1];
    cases.push_back(std::move(c));
  }
  return cases;
}

const std::vector<std::unique_ptr<Case>>& cases() {
  static const auto loaded = load_cases();
  return loaded;
}

// Equal as bits, except that all NaN are one.
bool same(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (a != a && b != b);
}

TEST(Blocks, DequantiseAsTheReference) {
  ASSERT_GE(cases().size(), 10U + 18U);
  for (const auto& c : cases()) {
    const int64_t columns = c->tensor.columns();
    std::vector<float> row(static_cast<size_t>(columns));
    for (int64_t r = 0; r < c->tensor.rows(); ++r) {
      quant::dequantise_row(c->tensor, r, row.data());
      for (int64_t k = 0; k < columns; ++k) {
        ASSERT_TRUE(same(row[k], c->values[r * columns + k]))
            << c->name << " row " << r << " column " << k << ": expected " << c->values[r * columns + k]
            << ", got " << row[k];
      }
    }
  }
}

TEST(Blocks, PlantedErrorIsSeen) {
  // One bit of one code must not go unnoticed: what the comparison above rests on.
  const Case& c = *cases()[1];
  std::vector<std::byte> damaged(c.tensor.data.begin(), c.tensor.data.end());
  damaged[7] ^= std::byte{0x10};
  StoredTensor tensor = c.tensor;
  tensor.data = damaged;
  std::vector<float> row(static_cast<size_t>(tensor.columns()));
  quant::dequantise_row(tensor, 0, row.data());
  int different = 0;
  for (int64_t k = 0; k < tensor.columns(); ++k) different += !same(row[k], c.values[k]);
  EXPECT_EQ(different, 1);
}

// The bytes of every row, `times` of them one behind the other.
std::vector<std::byte> lengthen(std::span<const std::byte> part, int64_t rows, int64_t times) {
  std::vector<std::byte> longer;
  const size_t size = part.size() / static_cast<size_t>(rows);
  for (size_t at = 0; size > 0 && at < part.size(); at += size) {
    for (int64_t i = 0; i < times; ++i)
      longer.insert(longer.end(), part.begin() + at, part.begin() + at + size);
  }
  return longer;
}

// Rows as they are, of as many units as models have, which are not packed one by one, and of several strips.
TEST(Panels, RowsComeBackBitForBit) {
  Pool pool(2);
  for (const auto& c : cases()) {
    for (const int64_t times : {int64_t{1}, int64_t{7}, 5000 / c->tensor.columns() + 1}) {
      StoredTensor tensor = c->tensor;
      const int64_t rows = tensor.rows(), columns = tensor.columns();
      const auto data = lengthen(tensor.data, rows, times);
      const auto scales = lengthen(tensor.scales, rows, times), biases = lengthen(tensor.biases, rows, times);
      tensor.shape = {rows, columns * times};
      tensor.data = data, tensor.scales = scales, tensor.biases = biases;
      const auto packed = quant::pack_tensors({&tensor, 1}, pool);
      std::vector<float> row(static_cast<size_t>(columns * times));
      for (int64_t r = 0; r < rows; ++r) {
        quant::unpack_row(packed->matrix(), r, row.data());
        for (int64_t k = 0; k < columns * times; ++k) {
          ASSERT_TRUE(same(row[k], c->values[r * columns + k % columns]))
              << c->name << ", " << times << " times, row " << r << " column " << k;
        }
      }
    }
  }
}

// A matrix of `rows` rows, each `times` rows of a case side by side.
struct Enlarged {
  Enlarged(const Case& c, int64_t rows, int64_t times) : tensor(c.tensor) {
    const auto repeat = [&](std::span<const std::byte> from, std::vector<std::byte>& to) {
      const int64_t count = c.tensor.rows(), bytes = static_cast<int64_t>(from.size()) / count;
      for (int64_t i = 0; i < rows * times; ++i) {
        const auto row = from.subspan((i / times + i % times) % count * bytes, bytes);
        to.insert(to.end(), row.begin(), row.end());
      }
    };
    repeat(c.tensor.data, data);
    repeat(c.tensor.scales, scales);
    repeat(c.tensor.biases, biases);
    tensor.shape = {rows, c.tensor.columns() * times};
    tensor.data = data;
    tensor.scales = scales;
    tensor.biases = biases;
  }
  StoredTensor tensor;
  std::vector<std::byte> data, scales, biases;
};

// Panels that are packed by themselves, into memory that held something else.
TEST(Panels, APartIsTheSameAsInTheWhole) {
  Pool pool(2);
  const auto check = [&](const StoredTensor& tensor, const std::string& name) {
    const auto packed = quant::pack_tensors({&tensor, 1}, pool);
    const quant::PanelMatrix& whole = packed->matrix();
    quant::PanelMemory memory(0);
    size_t fetched = 0;  // bytes
    const quant::PackedWeight later({&tensor, 1}, memory,
                                    {.fetch = [&](auto part) { fetched += part.size(); }});
    for (int64_t panel = 0; panel < whole.panels; ++panel) {
      std::vector<std::byte> out(static_cast<size_t>(whole.panel_bytes), std::byte{0xFF});
      const quant::PanelMatrix part = later.pack(0, panel, panel + 1, out.data());
      for (int64_t s = 0; s < whole.strips(); ++s) {
        const quant::PanelMatrix strip = whole.strip(s);
        EXPECT_EQ(
            std::memcmp(part.strip(s).bytes, strip.panel(panel), static_cast<size_t>(strip.panel_bytes)), 0)
            << name << " panel " << panel << " strip " << s;
      }
      EXPECT_EQ(part.rows, std::min(whole.rows - 16 * panel, quant::kPanelRows)) << name;
    }
    EXPECT_EQ(fetched, tensor.data.size() + tensor.scales.size() + tensor.biases.size())
        << name << ": every byte once";
  };
  for (const auto& c : cases()) {
    check(c->tensor, c->name);
    check(Enlarged(*c, 40, 5000 / c->tensor.columns() + 1).tensor, c->name + ", long");
  }
  const std::vector<uint16_t> values(20 * 7, 0x3F80);  // ones
  StoredTensor odd;
  odd.dtype = DType::bf16;
  odd.shape = {20, 7};
  odd.data = std::as_bytes(std::span(values));
  check(odd, "odd columns of bf16");
}

TEST(Panels, StripsCoverRowsOfAnyLength) {
  for (const auto& c : cases()) {
    const StoredTensor& tensor = c->tensor;
    const auto layout = quant::panel_layout(tensor.dtype, tensor.scale_dtype, tensor.group_size);
    for (const int64_t columns : {0, 256, 1024, 1536, 2048, 2304, 4096, 11008, 14336, 53248}) {
      quant::PanelMatrix matrix;
      matrix.dtype = tensor.dtype, matrix.scale_dtype = tensor.scale_dtype;
      matrix.group_size = tensor.group_size;
      matrix.columns = columns, matrix.panels = 3;
      matrix.bytes = tensor.data.data();  // only counted from
      matrix.panel_bytes = columns / layout.unit_columns * layout.unit_bytes;
      matrix.strip_columns = quant::strip_columns(columns, tensor.dtype, layout);
      int64_t covered = 0, bytes = 0;
      for (int64_t s = 0; s < matrix.strips(); ++s) {
        const quant::PanelMatrix strip = matrix.strip(s);
        EXPECT_EQ(strip.bytes - matrix.bytes, 3 * bytes) << c->name << " " << columns;
        EXPECT_EQ(covered % 256, 0) << c->name << " " << columns;
        covered += strip.columns, bytes += strip.panel_bytes;
      }
      EXPECT_EQ(covered, columns) << c->name;
      EXPECT_EQ(bytes, matrix.panel_bytes) << c->name << " " << columns;
    }
  }
}

// Products of the first `rows` rows with T rows of activations, against f64 on the reference's
// values. Fixture scales span many orders, so the error is set
// against sum |w x| of each output.
void check_products(const kernels::Table& table, const Case& c, int64_t rows, int64_t T, nn::InputForm form,
                    double bound) {
  Pool pool(1);
  StoredTensor tensor = c.tensor;
  tensor.shape = {rows, tensor.columns()};
  const auto packed = quant::pack_tensors({&tensor, 1}, pool);
  const int64_t K = packed->columns();
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(T * K));
  for (float& value : x) value = normal(random);
  const int64_t blocks = (K + 31) / 32;
  std::vector<kernels::Fixed16> wide(static_cast<size_t>(T * blocks));
  std::vector<kernels::Fixed8> narrow(wide.size());
  std::vector<float> starts(static_cast<size_t>(T));
  std::vector<uint16_t> pairs(static_cast<size_t>(T * (K + K % 2)));
  std::vector<float> y(T * rows, -1.0F);
  kernels::LinearArgs args;
  args.weight = &packed->matrix();
  args.rows = T;
  args.many = T >= (form == nn::InputForm::f32 ? table.many_rows : table.many_rows_fixed);
  args.x = x.data();
  args.x_stride = K;
  args.y = y.data();
  args.y_stride = rows;
  auto* product = table.linear_f32;
  for (int64_t t = 0; t < T; ++t) {
    const DType dtype = args.weight->dtype;
    if (form == nn::InputForm::fixed16)
      starts[t] =
          table.to_fixed16(&x[t * K], K, table.takes_many_fixed16(dtype, args.many), &wide[t * blocks]);
    if (form == nn::InputForm::fixed8)
      starts[t] = table.to_fixed8(&x[t * K], K, table.takes_many_fixed8(args.many), &narrow[t * blocks]);
    if (form == nn::InputForm::bf16) table.to_bf16(&x[t * K], K, &pairs[t * (K + K % 2)]);
  }
  if (form != nn::InputForm::f32) args.x_stride = form == nn::InputForm::bf16 ? K + K % 2 : blocks;
  args.x_fixed16 = wide.data();
  args.x_fixed8 = narrow.data();
  if (form == nn::InputForm::fixed16 || form == nn::InputForm::fixed8) args.x_start = starts.data();
  args.x_bf16 = pairs.data();
  if (form == nn::InputForm::fixed16) product = table.linear_fixed16;
  if (form == nn::InputForm::fixed8) product = table.linear_fixed8;
  if (form == nn::InputForm::bf16) product = table.linear_bf16;
  product(args, 0, packed->matrix().panels);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t n = 0; n < rows; ++n) {
      double expected = 0;
      double size = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double product = static_cast<double>(c.values[n * K + k]) * x[t * K + k];
        expected += product;
        size += std::fabs(product);
      }
      if (!(size < 3e38)) continue;  // beyond f32
      ASSERT_NEAR(y[t * rows + n], expected, bound * size + 1e-37)
          << table.isa << " " << c.name << " T " << T << " row " << t << " output " << n;
    }
  }
}

TEST(Products, EveryFormatOnEveryIsa) {
  for (const kernels::Table* table : test::tables()) {
    for (const auto& c : cases()) {
      const bool integer = quant::code_format(c->tensor.dtype).bits > 0;
      for (int64_t T : {1, 2, 3, 5, 9, 23, 24, 37}) {
        for (int64_t rows : {int64_t{1}, std::min<int64_t>(7, c->tensor.rows()), c->tensor.rows()}) {
          check_products(*table, *c, rows, T, nn::InputForm::f32, 2e-6);
          if (integer) check_products(*table, *c, rows, T, nn::InputForm::fixed16, 4e-4);
          if (integer && quant::code_format(c->tensor.dtype).bits <= table->narrow_bits)
            check_products(*table, *c, rows, T, nn::InputForm::fixed8, 3e-2);
          if (c->tensor.dtype == DType::bf16 && table->linear_bf16 != nullptr)
            check_products(*table, *c, rows, T, nn::InputForm::bf16, 8e-3);
        }
      }
    }
  }
}

// Against f64 on the reference's values, as above; and the same bits for any number of rows, and when panels
// are only packed as they are multiplied.
TEST(Products, LongRowsAreSumsOfStrips) {
  Pool pool(2);
  for (const auto& c : cases()) {
    if (quant::code_format(c->tensor.dtype).bits == 0) continue;
    const int64_t N = 16 * 3 + 5, columns = c->tensor.columns(), times = 5000 / columns + 1;
    const Enlarged weight(*c, N, times);
    const std::shared_ptr<const quant::PackedWeight> packed = quant::pack_tensors({&weight.tensor, 1}, pool);
    ASSERT_GT(packed->matrix().strips(), 1) << c->name;
    quant::PanelMemory memory(0);
    const auto later =
        std::make_shared<const quant::PackedWeight>(std::span(&weight.tensor, 1), memory, quant::Source());
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    Tensor x({37, columns * times});
    for (float& value : x.values()) value = normal(random);
    std::vector<double> expected, size;
    for (int64_t t = 0; t < x.shape()[0]; ++t) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = 0, all = 0;
        for (int64_t k = 0; k < columns * times; ++k) {
          const float value = c->values[(n + k / columns) % c->tensor.rows() * columns + k % columns];
          sum += static_cast<double>(value) * x.row(t)[k];
          all += std::fabs(static_cast<double>(value) * x.row(t)[k]);
        }
        expected.push_back(sum);
        size.push_back(all);
      }
    }
    for (const kernels::Table* table : test::tables()) {
      for (const auto& [precision, bound] :
           {std::pair{Precision::f32, 1e-5}, {Precision::exact, 4e-4}, {Precision::fast, 3e-2}}) {
        const nn::Runtime runtime{table, &pool, precision};
        Tensor most;
        for (const int64_t T : {37, 2, 1}) {
          Tensor some({T, columns * times});
          std::copy_n(x.data(), T * columns * times, some.data());
          const Tensor y = nn::linear(some, {&runtime, nn::Role::gate, packed, {}});
          const Tensor unpacked = nn::linear(some, {&runtime, nn::Role::gate, later, {}});
          if (most.empty()) most = y.clone();
          for (int64_t i = 0; i < T * N; ++i) {
            ASSERT_TRUE(same(y.data()[i], most.data()[i]) && same(y.data()[i], unpacked.data()[i]))
                << table->isa << " " << precision_name(precision) << " " << c->name << " T " << T
                << " output " << i;
            if (!(size[i] < 3e38)) continue;  // beyond f32
            ASSERT_NEAR(y.data()[i], expected[i], bound * size[i] + 1e-37)
                << table->isa << " " << precision_name(precision) << " " << c->name << " T " << T
                << " output " << i;
          }
        }
      }
    }
  }
}

// Of many rows the last panels are shared out in parts of the rows.
TEST(Products, PartsOfManyRowsAreThoseOfFew) {
  Pool pool(3);
  for (const auto& c : cases()) {
    const int64_t N = 16 * 9 + 5;
    const Enlarged weight(*c, N, 1);
    const auto packed = quant::pack_tensors({&weight.tensor, 1}, pool);
    constexpr int64_t T = 3 * kernels::kRowsTogether + 7, kFew = kernels::kRowsTogether - 1;
    Tensor x({T, packed->columns()});
    std::mt19937 random(13);
    std::normal_distribution<float> normal;
    for (float& value : x.values()) value = normal(random);
    for (const kernels::Table* table : test::tables()) {
      for (const Precision precision : {Precision::f32, Precision::exact, Precision::fast}) {
        const nn::Runtime runtime{table, &pool, precision};
        const Tensor all = nn::linear(x, {&runtime, nn::Role::gate, packed, {}});
        for (int64_t t = 0; t < T; t += kFew) {
          Tensor some({std::min(kFew, T - t), x.row_size()});
          std::copy_n(x.row(t), some.size(), some.data());
          const Tensor y = nn::linear(some, {&runtime, nn::Role::gate, packed, {}});
          for (int64_t i = 0; i < y.size(); ++i)
            ASSERT_TRUE(same(y.data()[i], all.row(t)[i]))
                << table->isa << " " << precision_name(precision) << " " << c->name << " row " << t + i / N;
        }
      }
    }
  }
}

// More rows, panels and columns than are at work at once, and none of them a multiple of that.
TEST(Products, RowsDoNotDependOnTheirNumber) {
  Pool pool(1);
  for (const auto& c : cases()) {
    const int64_t N = 16 * 9 + 5;
    const Enlarged weight(*c, N, 700 / c->tensor.columns() + 1);
    const auto packed = quant::pack_tensors({&weight.tensor, 1}, pool);
    const int64_t K = packed->columns(), blocks = (K + 31) / 32;
    const int bits = quant::code_format(c->tensor.dtype).bits;
    constexpr int64_t T = 131;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<float> x(T * K), together(T * N), few(T * N), alone(N);
    for (float& value : x) value = normal(random);
    // Rows of the largest digits, of the tiniest values and of what is not finite.
    for (int64_t k = 0; k < K; ++k) {
      x[K + k] = 1.0F, x[5 * K + k] = -1.0F;
      x[127 * K + k] = k % 2 == 0 ? 1e-38F : 1e-42F;
    }
    x[128 * K] = std::numeric_limits<float>::infinity();
    for (const kernels::Table* table : test::tables()) {
      std::vector<kernels::Fixed16> wide[2];  // rounded for few rows and for many
      std::vector<kernels::Fixed8> narrow[2];
      std::vector<float> start(T);
      for (const bool many : {false, true}) {
        wide[many].resize(T * blocks);
        narrow[many].resize(T * blocks);
        for (int64_t t = 0; t < T; ++t) {
          const bool wide_form = table->takes_many_fixed16(packed->matrix().dtype, many);
          start[t] = table->to_fixed16(&x[t * K], K, wide_form, &wide[many][t * blocks]);
          const float other =
              table->to_fixed8(&x[t * K], K, table->takes_many_fixed8(many), &narrow[many][t * blocks]);
          ASSERT_TRUE(same(start[t], other)) << table->isa << " row " << t;
        }
      }
      const auto check = [&](const char* form, auto product, int64_t stride) {
        const auto multiply = [&](int64_t row, int64_t rows, bool many, float* y) {
          kernels::LinearArgs args;
          args.weight = &packed->matrix();
          args.x_stride = stride;
          args.y_stride = N;
          args.x = &x[row * K];
          args.x_fixed16 = &wide[many][row * blocks];
          args.x_fixed8 = &narrow[many][row * blocks];
          if (stride == blocks) args.x_start = &start[row];
          args.y = y;
          args.rows = rows;
          args.many = many;
          product(args, 0, packed->matrix().panels);
        };
        multiply(0, T, true, together.data());
        for (const bool many : {false, true}) {
          for (const int64_t t : {int64_t{0}, int64_t{1}, int64_t{5}, int64_t{127}, int64_t{128}, T - 1}) {
            multiply(t, 1, many, alone.data());
            for (int64_t n = 0; n < N; ++n)
              ASSERT_TRUE(same(alone[n], together[t * N + n]))
                  << table->isa << " " << form << " " << c->name << " row " << t << " output " << n;
          }
        }
        multiply(0, T, false, few.data());
        for (int64_t i = 0; i < T * N; ++i)
          ASSERT_TRUE(same(few[i], together[i]))
              << table->isa << " " << form << " " << c->name << " as few rows, output " << i;
      };
      check("f32", table->linear_f32, K);
      if (bits > 0) check("fixed16", table->linear_fixed16, blocks);
      if (bits > 0 && bits <= table->narrow_bits) check("fixed8", table->linear_fixed8, blocks);
    }
  }
}

// The largest codes and activations, whose integer sums come nearest to what a lane holds. Activations are
// whole numbers with a scale of 1, which fixed point keeps exactly; weights are what `unpack_row` says
// (above: the reference's).
TEST(Products, LargestCodesAndActivations) {
  struct Format {
    DType dtype, scale_dtype;
    int64_t group_size;
  };
  std::vector<Format> formats = {{DType::mlx_q4, DType::bf16, 64}, {DType::mlx_q8, DType::f16, 128}};
  for (const auto& [name, dtype] : kGgufTypes) {
    if (quant::code_format(dtype).bits > 0) formats.push_back({dtype, DType::f16, 0});
  }
  constexpr int64_t N = 16, K = 512, T = 9, kBlocks = K / 32, kSlack = 8192;
  for (const Format& format : formats) {
    const auto layout = quant::panel_layout(format.dtype, format.scale_dtype, format.group_size);
    const int bits = quant::code_format(format.dtype).bits;
    const int64_t code_bytes = layout.unit_columns / 32 * 64 * bits;
    std::vector<std::byte> bytes(static_cast<size_t>(K / layout.unit_columns * layout.unit_bytes + kSlack));
    std::mt19937 random(11);
    for (const char* codes : {"smallest", "largest", "either"}) {
      for (int64_t unit = 0; unit < K / layout.unit_columns; ++unit) {
        std::byte* at = bytes.data() + unit * layout.unit_bytes;
        const int64_t header = layout.unit_bytes - code_bytes;
        std::fill_n(at, header, std::byte{0x3C});
        for (int64_t i = header; i < layout.unit_bytes; ++i) {
          const bool largest = *codes == 'e' ? random() % 2 == 0 : *codes == 'l';
          at[i] = largest ? std::byte{0xFF} : std::byte{0};
        }
      }
      const quant::PanelMatrix w{.dtype = format.dtype,
                                 .scale_dtype = format.scale_dtype,
                                 .group_size = format.group_size,
                                 .rows = N,
                                 .columns = K,
                                 .panel_bytes = static_cast<int64_t>(bytes.size()) - kSlack,
                                 .panels = 1,
                                 .bytes = bytes.data()};
      std::vector<float> weights(N * K), x(T * K), y(T * N);  // [N, K], [T, K], [T, N]
      for (int64_t n = 0; n < N; ++n) unpack_row(w, n, &weights[n * K]);
      for (const nn::InputForm form : {nn::InputForm::fixed16, nn::InputForm::fixed8}) {
        const bool wide = form == nn::InputForm::fixed16;
        const float most = wide ? 32639 : 127, lowest_byte = wide ? 32384 : 127;  // 32384 = 127 * 256 - 128
        for (int64_t t = 0; t < T; ++t) {
          for (int64_t k = 0; k < K; ++k) {
            const float size = k % 16 == 0 || t % 2 == 0 ? most : lowest_byte;
            const bool negative =
                t / 2 == 1 || (t / 2 == 2 && k % 2 == 0) || (t / 2 == 3 && random() % 2 == 0);
            x[t * K + k] = negative ? -size : size;
          }
        }
        for (const kernels::Table* table : test::tables()) {
          if (!wide && bits > table->narrow_bits) continue;
          for (const bool many : {false, true}) {
            std::vector<kernels::Fixed16> fixed16(T * kBlocks);
            std::vector<kernels::Fixed8> fixed8(T * kBlocks);
            for (int64_t t = 0; t < T; ++t) {
              table->to_fixed16(&x[t * K], K, table->takes_many_fixed16(w.dtype, many),
                                &fixed16[t * kBlocks]);
              table->to_fixed8(&x[t * K], K, table->takes_many_fixed8(many), &fixed8[t * kBlocks]);
            }
            const kernels::LinearArgs args{.weight = &w,
                                           .rows = T,
                                           .many = many,
                                           .x_stride = kBlocks,
                                           .x_fixed16 = fixed16.data(),
                                           .x_fixed8 = fixed8.data(),
                                           .y = y.data(),
                                           .y_stride = N};
            (wide ? table->linear_fixed16 : table->linear_fixed8)(args, 0, 1);
            for (int64_t i = 0; i < T * N; ++i) {
              double expected = 0, size = 0;
              for (int64_t k = 0; k < K; ++k) {
                const double product = static_cast<double>(x[i / N * K + k]) * weights[i % N * K + k];
                expected += product;
                size += std::fabs(product);
              }
              ASSERT_NEAR(y[i], expected, 1e-6 * size)
                  << table->isa << " " << dtype_name(format.dtype) << " " << codes << " codes, row " << i / N
                  << (many ? " of many" : " of few") << (wide ? ", 16 bits" : ", 8 bits");
            }
          }
        }
      }
    }
  }
}

TEST(Half, EveryValueThereAndBack) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = f16_value(half);
    if (value != value) continue;
    ASSERT_EQ(to_f16(value), half);
  }
  for (const kernels::Table* table : test::tables()) {
    std::vector<uint16_t> halves(65536), back(65536);
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < 65536; ++i) halves[i] = static_cast<uint16_t>(i);
    table->f16_to_f32(halves.data(), values.data(), 65536);
    table->f32_to_f16(values.data(), back.data(), 65536);
    for (uint32_t i = 0; i < 65536; ++i) {
      ASSERT_TRUE(same(values[i], f16_value(halves[i])));
      if (values[i] == values[i]) {
        ASSERT_EQ(back[i], halves[i]) << table->isa;
      }
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  EXPECT_EQ(to_f16(1.0F + 0x1p-11F), 0x3C00);             // half way: to even
  EXPECT_EQ(to_f16(1.0F + 0x1p-11F + 0x1p-20F), 0x3C01);  // just above
  EXPECT_EQ(to_f16(1.0F + 3 * 0x1p-11F), 0x3C02);         // half way: to even
  EXPECT_EQ(to_f16(65519.0F), 0x7BFF);
  EXPECT_EQ(to_f16(65520.0F), 0x7C00);  // infinity
  EXPECT_EQ(to_f16(0x1p-25F), 0x0000);  // half of the smallest: to even
  EXPECT_EQ(to_f16(0x1p-25F + 0x1p-40F), 0x0001);
  EXPECT_EQ(to_f16(-0x1p-24F), 0x8001);
}

}  // namespace
}  // namespace lockstep
