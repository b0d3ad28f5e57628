// A router in a config.json of ours, what a run may ask of it, and what an export can say.

#include "configs/router_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "configs/expert_use.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::UnorderedElementsAre;

ModelConfig mixture(int experts_per_token, bool renormalized) {
  return parse_model_config(
      fmt::format(
          R"({{"model_type": "qwen2_moe", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
        "num_experts": 8, "num_experts_per_tok": {}, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "norm_topk_prob": {}, "decoder_sparse_step": 1,
        "torch_dtype": "float32"}})",
          experts_per_token, renormalized),
      "config.json");
}

ModelConfig again(const ModelConfig& config) {
  return parse_model_config(to_hf_json(config), "again");
}

TEST(RouterRecord, GoesThroughAConfigJson) {
  const ModelConfig plain = mixture(2, true);
  EXPECT_THAT(to_hf_json(plain), Not(HasSubstr("upmoe_router")));
  for (const RouterForm& form :
       {RouterForm{.kind = RouterKind::kNoisy},
        RouterForm{.kind = RouterKind::kGShard, .capacity_factor = 1.25}, RouterForm{.jitter = 0.01},
        RouterForm{.capacity_factor = 2, .drop = DropBy::kProbability},
        RouterForm{.kind = RouterKind::kExpertChoice, .jitter = 0.1, .capacity_factor = 2, .group_size = 4},
        RouterForm{.kind = RouterKind::kMixtureOfTokens, .group_size = 8, .temperature = 0.25},
        RouterForm{.score = RouterScore::kSigmoid,
        .scale = 2.5,
        .capacity_factor = 1,
        .capacity_pool = CapacityPool::kMicroBatch}}) {
    ModelConfig config = plain;
    config.router = form;
    EXPECT_TRUE(again(config).router == form) << words_of(form);
    ModelConfig served = again(config);
    served.router = form.served();
    EXPECT_TRUE(again(served).router == form.served());
  }
}

TEST(RouterRecord, WhatAFileMayNotSay) {
  const auto refusal = [](const std::string& router) {
    std::string json = to_hf_json(mixture(2, true));
    json.insert(json.rfind('}'), ", \"upmoe_router\": " + router);
    try {
      parse_model_config(json, "config.json");
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_THAT(refusal(R"({"kind": "best"})"), HasSubstr("'best'"));
  EXPECT_THAT(refusal(R"({"jitter": 1.0})"), HasSubstr("expected 0 to below 1"));
  EXPECT_THAT(refusal(R"({"capacity_factor": -1})"), HasSubstr("expected at least 0"));
  EXPECT_THAT(refusal(R"({"capacity_pool": "run"})"), HasSubstr("'run'"));
  EXPECT_THAT(refusal(R"({"drop": "all"})"), HasSubstr("'all'"));
  EXPECT_THAT(refusal(R"({"group_size": -1})"), HasSubstr("group_size"));
  EXPECT_THAT(refusal(R"({"temperature": 0})"), HasSubstr("at least 1e-06"));
  EXPECT_EQ(refusal(R"({"kind": "gshard", "jitter": 0.5})"), "");
}

TEST(RouterRecord, KindsAskForTheirModels) {
  const auto problems = [](RunConfig::Router router, const ModelConfig& model) {
    return router_problems(router, with_router(model, router));
  };
  RunConfig::Router router;
  for (const RouterKind kind : {RouterKind::kTopK, RouterKind::kNoisy}) {
    router.kind = kind;
    EXPECT_THAT(problems(router, mixture(4, false)), IsEmpty()) << name_of(kind);
  }
  router.kind = RouterKind::kSwitch;
  EXPECT_THAT(problems(router, mixture(1, false)), IsEmpty());
  EXPECT_THAT(problems(router, mixture(2, true)),
              UnorderedElementsAre(HasSubstr("num_experts_per_tok is 2"), HasSubstr("would not learn")));
  router.kind = RouterKind::kGShard;
  EXPECT_THAT(problems(router, mixture(2, true)), IsEmpty());
  EXPECT_THAT(problems(router, mixture(2, false)), ElementsAre(HasSubstr("norm_topk_prob is false")));
  router.score = RouterScore::kSigmoid;
  EXPECT_THAT(problems(router, mixture(2, true)), ElementsAre(HasSubstr("with router.score sigmoid")));
  router = {};
  router.aux_kind = {AuxKind::kLoad};
  EXPECT_THAT(problems(router, mixture(2, true)),
              ElementsAre(HasSubstr("of the noise of router.kind noisy")));
  router.kind = RouterKind::kNoisy;
  EXPECT_THAT(problems(router, mixture(2, true)), IsEmpty());
}

TEST(RouterRecord, KindsThatRouteGroups) {
  const auto problems = [](RunConfig::Router router) {
    return router_problems(router, with_router(mixture(2, true), router));
  };
  RunConfig::Router router;
  router.kind = RouterKind::kExpertChoice;
  EXPECT_THAT(problems(router), UnorderedElementsAre(HasSubstr("router.group_size: 0"),
                                                     HasSubstr("router.aux_loss: of router.kind "
                                                               "expert_choice")));
  router.group_size = 4;
  router.aux_loss = {0};
  router.z_loss = 0.001;
  router.jitter = 0.1;
  EXPECT_THAT(problems(router), IsEmpty());
  router.capacity_factor = 9;
  EXPECT_THAT(problems(router), ElementsAre(HasSubstr("9 experts of a token, and the model has 8")));
  router.kind = RouterKind::kMixtureOfTokens;
  router.scale = 2;
  EXPECT_THAT(problems(router), UnorderedElementsAre(HasSubstr("router.capacity_factor: 9 is of choices"),
                                                     HasSubstr("router.jitter: 0.1 is of choices"),
                                                     HasSubstr("router.scale: 2 is of choices"),
                                                     HasSubstr("router.z_loss: 0.001 is of choices")));
  router = {};
  router.kind = RouterKind::kMixtureOfTokens;
  router.group_size = 4;
  router.aux_loss = {0};
  EXPECT_THAT(problems(router), IsEmpty());
  router.score = RouterScore::kSigmoid;
  EXPECT_THAT(problems(router), ElementsAre(HasSubstr("with router.score sigmoid")));
}

// Nobody who generates one token after the other has a group of them.
TEST(RouterRecord, GroupsAreNotExported) {
  RunConfig::Router asked;
  asked.group_size = 4;
  for (const RouterKind kind : {RouterKind::kExpertChoice, RouterKind::kMixtureOfTokens}) {
    asked.kind = kind;
    const ModelConfig trained = with_router(mixture(2, true), asked);
    EXPECT_THAT(why_not_exported(trained), HasSubstr(fmt::format("kind {}, group_size 4", name_of(kind))));
    EXPECT_THAT(why_not_exported(trained), HasSubstr("choose for each token by itself"));
    EXPECT_THAT(to_hf_json(trained), HasSubstr("upmoe_router"));
  }
}

// What a kind does not look at is none of its form: a run may say it and go on without.
TEST(RouterRecord, OtherKindsHaveNoGroups) {
  RunConfig::Router asked;
  asked.group_size = 4;
  asked.temperature = 0.5;
  EXPECT_TRUE(with_router(mixture(2, true), asked).router == RouterForm{});
  asked.kind = RouterKind::kMixtureOfTokens;
  const ModelConfig trained = with_router(mixture(2, true), asked);
  EXPECT_EQ(trained.router.temperature, 0.5);
  RunConfig::Router other;
  other.kind = RouterKind::kTopK;
  EXPECT_TRUE(with_router(trained, other).router == RouterForm{});
}

TEST(RouterRecord, UseOfExperts) {
  ModelConfig model = mixture(2, true);
  EXPECT_EQ(expert_use(model).per_token(), 2);
  model.router = {.kind = RouterKind::kExpertChoice, .group_size = 4};
  EXPECT_EQ(expert_use(model).per_token(), 2) << "each of eight takes one of four";
  model.router.capacity_factor = 2.5;
  EXPECT_EQ(expert_use(model).per_token(), 4) << "rounded up to two of four";
  model.router.capacity_factor = 8;
  EXPECT_EQ(chosen_of_group(choices_on_the_mean(model), 3, 8), 3) << "all of them and no more";
  model.router = {.kind = RouterKind::kMixtureOfTokens, .group_size = 16};
  EXPECT_EQ(expert_use(model).per_token(), 0.5);
  EXPECT_EQ(least_sequences(model), 16);
}

// A run that goes on may leave a key out; it may not change it. An export needs no words for training.
TEST(RouterRecord, GoesOnAndIsExported) {
  RunConfig::Router asked;
  asked.kind = RouterKind::kGShard;
  asked.capacity_factor = 1.5;
  asked.drop = DropBy::kProbability;
  const ModelConfig trained = with_router(mixture(2, true), asked);
  EXPECT_EQ(why_not_exported(trained), "");
  EXPECT_NO_THROW(require_same_router(trained, with_router(trained, {}), "checkpoint"));
  asked.capacity_factor = 2.0;
  try {
    require_same_router(trained, with_router(trained, asked), "checkpoint");
    ADD_FAILURE() << "another capacity was taken";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(),
                HasSubstr("kind gshard, jitter 0, capacity_factor 1.5, capacity_pool sequence, drop "
                          "probability"));
  }
  ModelConfig sigmoid = trained;
  sigmoid.router = {.score = RouterScore::kSigmoid, .jitter = 0.1};
  EXPECT_THAT(why_not_exported(sigmoid), HasSubstr("scores of a sigmoid"));
  EXPECT_THAT(why_not_exported(sigmoid), Not(HasSubstr("jitter")));
}

}  // namespace
}  // namespace upmoe
