// Dense models of every family into mixtures of every family that carries them: the same function where the recipe
// keeps it, the shipped recipes as far from it as docs/recipes.md says, and words where a family does not carry one.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>

#include "tests/support/preserving_recipes.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/layer_error.h"
#include "upcycle/mixture_shape.h"
#include "upcycle/recipe_problems.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using namespace test;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A dense model of a family on the disk, open.
struct Source : TemporaryDirectory {
  explicit Source(const TinyShape& shape) {
    write_tiny_dense(path() / "dense", shape);
    source.emplace(path() / "dense");
  }
  const ModelConfig& config() const { return source->config(); }
  // The largest error of a layer that becomes a mixture.
  double error(const UpcycleConfig& config, int tokens = 16) const {
    const ModelConfig& dense = source->config();
    const Recipe recipe = make_recipe(config, dense);
    const ModelConfig moe = make_moe_config(config, dense);
    const PermutationCache permutations(recipe.seed, static_cast<std::int32_t>(dense.intermediate_size));
    const FillContext context{source->source, source->survey, permutations, recipe.seed};
    double worst = 0;
    for (int layer = 0; layer < dense.num_hidden_layers; ++layer)
      if (moe.is_moe_layer(layer)) worst = std::max(worst, layer_error(recipe, layer, moe, context, tokens));
    return worst;
  }
  // The same by the book, over the tensors as the family names them.
  double naive_error(const UpcycleConfig& config) const {
    const ModelConfig moe = make_moe_config(config, source->config());
    const NaiveTensors dense = source->tensors(), made = source->make(make_recipe(config, source->config()));
    double difference = 0, norm = 0;
    for (int layer = 0; layer < moe.num_hidden_layers; ++layer) {
      if (!moe.is_moe_layer(layer)) continue;
      std::vector<float> z(static_cast<std::size_t>(moe.hidden_size));
      normal_batch(5, static_cast<std::uint64_t>(layer) * z.size(), moe.hidden_size, z.data());
      const NaiveVector x(z.begin(), z.end());
      const NaiveVector expected =
          naive_ffn(dense, ffn_names(source->config(), Role::kFfnGateUp, Role::kFfnDown, layer), x);
      const NaiveVector found = naive_moe(made, moe, layer, x);
      for (std::size_t d = 0; d < x.size(); ++d) {
        difference += (found[d] - expected[d]) * (found[d] - expected[d]);
        norm += expected[d] * expected[d];
      }
    }
    return std::sqrt(difference / norm);
  }
  std::optional<TinySource> source;
};

TEST(MixtureFamilies, KeepTheFunctionOfEveryDenseFamily) {
  std::set<std::string> pairs;
  for (const Family* dense : families()) {
    if (is_mixture(*dense) || dense->mixtures.empty()) continue;
    const Source source({.family = dense->model_type});
    for (UpcycleConfig recipe : preserving_recipes(86))
      for (const Family* mixture : families()) {
        recipe.target.family = mixture->model_type;
        if (!is_mixture(*mixture) || !problems_of(recipe, source.config()).empty()) continue;
        SCOPED_TRACE(fmt::format("{} -> {}", dense->model_type, mixture->model_type));
        EXPECT_LT(source.error(recipe), rounding_of_layer(make_moe_config(recipe, source.config())));
        EXPECT_LT(source.naive_error(recipe), kRoundedFactors);
        pairs.insert(fmt::format("{} {}", dense->model_type, mixture->model_type));
      }
    for (const char* mixture : dense->mixtures)
      EXPECT_TRUE(pairs.contains(fmt::format("{} {}", dense->model_type, mixture))) << mixture;
  }
}

// The relative error of a layer at step 0, over a dense model of random weights; 0: none but rounding. And the family
// that the mixture is written as.
struct Start {
  const char *recipe, *dense, *family;
  double error;
};
constexpr double kTolerance = 0.02;  // relative
constexpr Start kStarts[] = {
    {"qwen1.5-moe-a2.7b", "qwen2", "qwen2_moe", 0.0246},
    {"qwen2-57b-a14b", "qwen2", "qwen2_moe", 0.0194},
    {"sparse-upcycling", "llama", "mixtral", 0},
    {"sparse-upcycling", "qwen3", "qwen3_moe", 0},
    {"virtual-group", "mistral", "mixtral", 0},
    {"drop-upcycling", "qwen3", "qwen3_moe", 1.167},
    {"llama-moe-split", "llama", "mixtral", 1.017},
    {"from-scratch", "llama", "deepseek", 1.0},
    {"mixtral-8x", "llama", "mixtral", 0},
    {"mixtral-8x", "mistral", "mixtral", 0},
    {"deepseekmoe", "llama", "deepseek", 1.052},
    {"arctic-residual", "llama", "deepseek", 0},
    {"qwen3-30b-like", "qwen3", "qwen3_moe", 0},
    {"marco-nano", "qwen3", "qwen3_moe", 2.01},
    {"dots1-like", "qwen3", "dots1", 0},
    {"llama-moe-random", "llama", "mixtral", 1.017},
    // As if the three matrices counted alike: sqrt(3 / 2) * 0.02 / 0.3 / sqrt(2), a deviation of 0.02 beside the
    // weights' 0.3 on half of each, over the mean of two experts.
    {"rnu", "mistral", "mixtral", 0.0581},
    {"sparse-upcycling-half", "qwen2", "qwen2_moe", 0},
    {"apollo-last2", "qwen2", "qwen2_moe", 0},
    {"btx", "mistral", "mixtral", 0},  // of one dense model; several that differ: sources_test
};

TEST(MixtureFamilies, ShippedRecipesStartWhereTheDocumentsSay) {
  std::set<std::string> known{"grow-2x", "btx-prompts", "cmoe"};  // published_recipes_test has them
  for (const Start& start : kStarts) {
    SCOPED_TRACE(fmt::format("{} of {}", start.recipe, start.dense));
    known.insert(start.recipe);
    const UpcycleConfig recipe = read_upcycle_config(
        fs::path(UPMOE_SOURCE_DIR) / fmt::format("configs/upcycle/{}-tiny.yaml", start.recipe), {});
    const Source source({.hidden = 64, .ffn = 688, .family = start.dense});
    EXPECT_EQ(make_moe_config(recipe, source.config()).model_type, start.family);
    const double error = source.error(recipe, 32);
    EXPECT_NEAR(
        error, start.error,
        std::max(rounding_of_layer(make_moe_config(recipe, source.config())), kTolerance * start.error));
  }
  for (const auto& entry : fs::directory_iterator(fs::path(UPMOE_SOURCE_DIR) / "configs/upcycle")) {
    const std::string stem = entry.path().stem();
    EXPECT_TRUE(stem.ends_with("-tiny") || known.contains(stem)) << stem;
  }
}

// Every recipe has a row: what it follows, what deviates, and the number from above.
TEST(MixtureFamilies, TheDocumentTellsOfEveryRecipeWhatItIsAndWhereItStarts) {
  const fs::path root(UPMOE_SOURCE_DIR);
  std::ifstream document(root / "docs/recipes.md");
  std::map<std::string, std::string> errors;  // as they stand there
  for (std::string line; std::getline(document, line);) {
    if (!line.starts_with("| `")) continue;
    std::vector<std::string> cells;
    std::istringstream row(line.substr(1));
    for (std::string cell; std::getline(row, cell, '|');) cells.push_back(cell);
    ASSERT_EQ(cells.size(), 6u) << line;
    for (const std::string& cell : cells) EXPECT_NE(cell.find_first_not_of(' '), std::string::npos) << line;
    const std::string name = cells[0].substr(2, cells[0].rfind('`') - 2);
    EXPECT_TRUE(errors.emplace(name, cells[4].substr(1, cells[4].size() - 2)).second)
        << name << " stands twice";
    EXPECT_TRUE(fs::exists(root / fmt::format("configs/upcycle/{}.yaml", name))) << name;
  }
  for (const auto& entry : fs::directory_iterator(root / "configs/upcycle")) {
    const std::string stem = entry.path().stem();
    EXPECT_TRUE(stem.ends_with("-tiny") || errors.contains(stem)) << stem;
  }
  for (const Start& start : kStarts) {
    const std::string& told = errors.at(start.recipe);
    if (start.error == 0) {
      EXPECT_EQ(told, "below 1e-5") << start.recipe;
    } else {
      EXPECT_NEAR(std::stod(told), start.error, 0.03 * start.error) << start.recipe;  // two digits
    }
  }
}

TEST(MixtureFamilies, WhatAFamilyDoesNotCarryIsAProblemOfTheRecipe) {
  const Source source({});
  UpcycleConfig c = tiny_recipe();
  c.target.family = "mixtral";
  EXPECT_THAT(problems_of(c, source.config()),
              ElementsAre(AllOf(HasSubstr("mixtral does not carry: biases of q, k and v"),
                                HasSubstr("a shared expert"), HasSubstr("not renormalised"),
                                HasSubstr("families that carry this recipe: qwen2_moe"))));
  EXPECT_THROW(make_moe_config(c, source.config()), Error);
  c.target.layers = {LayerChoice::Kind::kLast, 5, {}};
  EXPECT_THAT(problems_of(c, source.config()),
              ElementsAre(HasSubstr("target.layers: last:5 reaches beyond the model's 2 layers")));
}

}  // namespace
}  // namespace upmoe
