// What a plan says before anything is made: of a whole model, and of a configuration alone.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "parallel/thread_comm.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

class Planned : public ::testing::Test {
 protected:
  void SetUp() override {
    write_tiny_dense(dense_, shape_);
    recipe_.experts.reinit = 0.5;
    options_.from = dense_;
    options_.to = dir_.path() / "moe";
    options_.threads = 1;
    options_.error_tokens = 4;
    options_.progress = false;
  }
  void make() const {
    run_in_threads(1, [&](Communicator& comm) { upcycle(recipe_, options_, comm); });
  }
  ExitCode refused() const {
    try {
      plan_upcycle(recipe_, options_);
    } catch (const Error& e) {
      return e.code();
    }
    return ExitCode::kDone;
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
  fs::path dense_ = dir_.path() / "dense";
  UpcycleConfig recipe_ = tiny_recipe();
  UpcycleOptions options_;
};

TEST_F(Planned, NamesEveryKindOfTensor) {
  const std::string plan = plan_upcycle(recipe_, options_).text;
  for (const char* part : {"model.layers.*.mlp.experts.*.gate_proj.weight", "shared_expert.down_proj",
                           "11 redrawn", "120", "copy", "N(0, 0.02)"}) {
    EXPECT_NE(plan.find(part), std::string::npos) << part << " in\n" << plan;
  }
  EXPECT_FALSE(fs::exists(options_.to));
}

TEST_F(Planned, ConfigurationAloneIsPlannedAsItsModelIs) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    shape_.dtype = dtype;
    fs::remove_all(dense_);
    write_tiny_dense(dense_, shape_);
    options_.from = dense_;
    const UpcyclePlan whole = plan_upcycle(recipe_, options_);
    fs::copy_file(dense_ / "config.json", dir_.path() / "shape.json", fs::copy_options::overwrite_existing);
    options_.from = dir_.path() / "shape.json";
    options_.only_planned = true;
    const UpcyclePlan described = plan_upcycle(recipe_, options_);
    EXPECT_EQ(described.text, whole.text);
    EXPECT_EQ(described.json, whole.json);
    options_.only_planned = false;
    EXPECT_EQ(refused(), ExitCode::kBadInput);  // there is nothing to make it of
  }
}

TEST_F(Planned, ConfigurationOfTheMixtureIsThatOfWhatIsMade) {
  const auto planned = nlohmann::json::parse(plan_upcycle(recipe_, options_).json);
  make();
  EXPECT_EQ(planned.at("config"), nlohmann::json::parse(read_file(options_.to / "config.json")));
  EXPECT_EQ(planned.at("redrawn_neurons_per_expert"), 11);
  EXPECT_EQ(planned.at("asks_for_tokens"), false);
  recipe_.router.method = RouterMethod::kPrompts;
  options_.to = dir_.path() / "again";
  EXPECT_EQ(nlohmann::json::parse(plan_upcycle(recipe_, options_).json).at("asks_for_tokens"), true);
}

TEST_F(Planned, WhatDoesNotFitIsRefusedOfAConfigurationToo) {
  options_.only_planned = true;
  options_.from = dense_ / "config.json";
  EXPECT_EQ(refused(), ExitCode::kDone);
  recipe_.target.num_experts_per_tok = 77;  // of 60
  EXPECT_EQ(refused(), ExitCode::kUsage);
  recipe_ = tiny_recipe();
  options_.from = dense_;
  make();
  options_.from = options_.to / "config.json";
  options_.to = dir_.path() / "again";
  EXPECT_EQ(refused(), ExitCode::kBadInput);  // a mixture already
}

}  // namespace
}  // namespace upmoe
