// The models of configs/models: every parameter of each is counted, and one step of those published can be rehearsed.

#include <gtest/gtest.h>

#include <map>

#include "configs/param_table.h"
#include "trainer/rehearsal.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;

// As their shapes give them, term by term, by hand: all parameters, and those that compute a token.
struct Published {
  std::int64_t total, activated, activated_non_embedding;
};
const std::map<std::string, Published> kModels{
    {"qwen1.5-1.8b", {1'836'828'672, 1'836'828'672, 1'214'498'816}},
    {"qwen1.5-7b", {7'721'324'544, 7'721'324'544, 6'476'664'832}},
    {"qwen1.5-32b", {32'512'218'112, 32'512'218'112, 30'955'082'752}},
    {"qwen1.5-moe-a2.7b", {14'315'784'192, 2'689'173'504, 2'066'843'648}},
    {"qwen2-57b-a14b", {57'408'658'944, 14'249'270'784, 13'160'193'536}},
    {"mixtral-8x7b", {46'702'792'704, 12'879'925'248, 12'617'781'248}},
    {"mixtral-8x22b", {140'630'071'296, 39'161'468'928, 38'758'815'744}},
    {"mistral-7b", {7'241'732'096, 7'241'732'096, 6'979'588'096}},
    {"gemma-7b", {8'537'680'896, 8'537'680'896, 7'751'248'896}},
    {"qwen3-0.6b", {596'049'920, 596'049'920, 440'467'456}},
    {"qwen3-30b-a3b", {30'532'122'624, 3'353'032'704, 2'730'702'848}},
    {"marco-nano", {8'001'454'080, 602'701'824, 447'119'360}},
    {"deepseek-moe-16b", {16'375'728'128, 2'828'650'496, 2'409'220'096}},
    {"dbrx", {131'596'523'520, 36'469'708'800, 35'236'583'424}},
    {"dots.llm1", {142'774'373'888, 14'016'581'120, 12'770'872'832}},
};

// Shapes of our own, with the ratios of Qwen1.5-7B, Qwen1.5-MoE-A2.7B and its source.
const std::map<std::string, Published> kTiny{
    {"tiny-7b-shape", {29'512'192, 29'512'192, 25'317'888}},
    {"tiny-a2.7b-shape", {55'676'160, 10'259'712, 8'162'560}},
    {"tiny-1.8b-shape", {6'848'256, 6'848'256, 4'751'104}},
};

fs::path folder() {
  return fs::path(UPMOE_SOURCE_DIR) / "configs/models";
}

TEST(PublishedModels, AreAllCounted) {
  std::size_t files = 0;
  for (const auto& entry : fs::directory_iterator(folder())) {
    if (entry.path().extension() != ".json") continue;
    const std::string name = entry.path().stem();
    ASSERT_TRUE(kModels.contains(name) || kTiny.contains(name)) << name;
    const Published& expected = kModels.contains(name) ? kModels.at(name) : kTiny.at(name);
    const ParamCounts found = count_params(read_model_config(entry.path()));
    EXPECT_EQ(found.total, expected.total) << name;
    EXPECT_EQ(found.activated, expected.activated) << name;
    EXPECT_EQ(found.activated_non_embedding, expected.activated_non_embedding) << name;
    ++files;
  }
  EXPECT_EQ(files, kModels.size() + kTiny.size());
}

TEST(PublishedModels, AreRehearsed) {
  for (const auto& [name, counts] : kModels) {
    const ModelConfig config = read_model_config(folder() / (name + ".json"));
    RunConfig run;
    run.data.seq_len = 1024;
    run.train.global_batch = run.train.micro_batch = 1;
    run.train.precision = Precision::kBf16;
    Rehearsal rehearsal(run, config, 0, 1);
    const double flops = rehearsal.step().total().flops;
    // Forward and backward take 6 FLOPs for each parameter that a token meets in a product, and attention some more.
    const double least = 6.0 * 1024 * static_cast<double>(counts.activated_non_embedding);
    EXPECT_GT(flops, 0.99 * least) << name;
    EXPECT_LT(flops, 1.6 * least) << name;
    EXPECT_GE(rehearsal.memory_use().parameters, static_cast<std::size_t>(2 * counts.total)) << name;
  }
}

}  // namespace
}  // namespace upmoe
