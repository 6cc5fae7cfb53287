// The forms that products take their inputs in, against the reference's (scripts/fixtures/policies.py).
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "kernels/kernels.h"
#include "nn/precision.h"
#include "support/fixtures.h"

namespace lockstep {
namespace {

using nn::InputForm;
using nn::Role;

// Of a layer whose feed-forward is a mixture of experts some roles have names of their own.
Role role_of(const std::string& name, bool mixture) {
  static const std::map<std::string, Role> kRoles = {
      {"q", Role::q},       {"k", Role::k},           {"v", Role::v},
      {"o", Role::o},       {"gate", Role::gate},     {"up", Role::up},
      {"down", Role::down}, {"router", Role::router}, {"head", Role::head}};
  static const std::map<std::string, Role> kMixture = {
      {"q", Role::moe_q}, {"o", Role::moe_o}, {"down", Role::moe_down}};
  return mixture && kMixture.contains(name) ? kMixture.at(name) : kRoles.at(name);
}

TEST(Precision, RoundsWhatNoiseFloorsWereMeasuredWith) {
  const std::map<std::string, Precision> precisions = {
      {"f32", Precision::f32}, {"exact", Precision::exact}, {"fast", Precision::fast}};
  const std::map<std::string, DType> stored = {
      {"integers", DType::q4_0}, {"bf16", DType::bf16}, {"float", DType::f16}};
  const std::map<std::string, InputForm> forms = {{"f32", InputForm::f32},
                                                  {"fixed16", InputForm::fixed16},
                                                  {"fixed8", InputForm::fixed8},
                                                  {"bf16", InputForm::bf16}};
  kernels::Table table = kernels::select("scalar");  // one that gains by every form
  table.narrow_bits = 8;
  table.linear_bf16 = [](const kernels::LinearArgs&, int64_t, int64_t) {};
  const nlohmann::json cases =
      nlohmann::json::parse(std::ifstream(test::data_path("policies.json"))).at("cases");
  ASSERT_EQ(cases.size(), 162U);
  for (const auto& entry : cases) {
    const nn::Runtime runtime{&table, nullptr, precisions.at(entry["precision"])};
    quant::PanelMatrix weight;
    weight.dtype = stored.at(entry["stored"]);
    EXPECT_EQ(nn::input_form(runtime, weight, role_of(entry["role"], entry["mixture"])),
              forms.at(entry["form"]))
        << entry;
  }
}

}  // namespace
}  // namespace lockstep
