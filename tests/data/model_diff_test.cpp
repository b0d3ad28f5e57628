// Two models beside each other: what differs and by how much, and which values are no numbers.

#include "data/model_diff.h"

#include <limits>

#include "tests/data/models.h"

namespace upmoe::test {
namespace {

// A model without files: every element of a parameter is `base`, but for what is planted.
class Planted final : public ModelSource {
 public:
  explicit Planted(const std::string& config, float base = 1.0f)
      : config_(parse_model_config(config, "test")), base_(base) {}
  const ModelConfig& config() const override { return config_; }
  void read(const ParamSpec& param, const Box& box, TensorView out) const override {
    std::fill_n(out.as<float>(), box.elements(), base_);
    for (const auto& [at, value] : planted)
      if (at.first == param.name) out.as<float>()[at.second] = value;
  }
  bool has(const ParamSpec&) const override { return true; }
  fs::path directory() const override { return "model"; }
  fs::path companions() const override { return {}; }

  std::map<std::pair<std::string, std::int64_t>, float> planted;

 private:
  ModelConfig config_;
  float base_;
};

using Kind = ParamDifference::Kind;

TEST(ModelDiff, EqualModelsHaveNone) {
  const Planted one(config_json(true, false)), two(config_json(true, false));
  EXPECT_TRUE(differences(one, two).empty());
}

TEST(ModelDiff, DistancesAreOfTheFirst) {
  Planted one(config_json(true, false)), two(config_json(true, false));
  two.planted[{"norm_D", 3}] = 3.0f;  // of 8 elements
  two.planted[{"norm_D", 5}] = 0.0f;
  const auto all = differences(one, two);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].name, "norm_D");
  EXPECT_EQ(all[0].kind, Kind::kValues);
  EXPECT_EQ(all[0].max_abs, 2.0);
  EXPECT_DOUBLE_EQ(all[0].relative_l2.value(), std::sqrt(5.0 / 8.0));
  EXPECT_EQ(all[0].not_finite, 0);
  const Planted zero(config_json(true, false), 0.0f);
  EXPECT_FALSE(differences(zero, one)[0].relative_l2);
}

TEST(ModelDiff, WhatIsNotFiniteIsCountedUnlessTheBitsAgree) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  Planted one(config_json(true, false)), two(config_json(true, false));
  one.planted = {{{"norm_D", 0}, nan}, {{"norm_D", 1}, inf}, {{"norm_D", 2}, inf}};
  two.planted = {{{"norm_D", 0}, nan}, {{"norm_D", 1}, -inf}};
  const auto all = differences(one, two);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].not_finite, 2);  // an infinity and minus one; an infinity and a number
  EXPECT_EQ(all[0].max_abs, 0.0);
  two.planted = one.planted;
  EXPECT_TRUE(differences(one, two).empty());
}

TEST(ModelDiff, OtherParametersAndShapes) {
  const Planted dense(config_json(false, false)), tied(config_json(false, true));
  auto all = differences(dense, tied);
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].name, "head_VD");
  EXPECT_EQ(all[0].kind, Kind::kOnlyInFirst);
  EXPECT_EQ(differences(tied, dense)[0].kind, Kind::kOnlyInSecond);
  json wide = json::parse(config_json(false, false));
  wide["vocab_size"] = 13;
  all = differences(dense, Planted(wide.dump()));
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].kind, Kind::kShape);
  EXPECT_EQ(all[0].first, (Shape{11, 8}));
  EXPECT_EQ(all[0].second, (Shape{13, 8}));
}

}  // namespace
}  // namespace upmoe::test
