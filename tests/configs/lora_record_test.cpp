// Low-rank adapters in a config.json of ours and in the list of parameters, and what a run may ask of them.

#include "configs/lora_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "configs/adapter_params.h"
#include "configs/families/family.h"
#include "configs/trained_model.h"
#include "tests/support/tiny_moe.h"

namespace upmoe {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using enum LoraTarget;

const LoraForm kAll{4, 8, {kQuery, kKey, kValue, kOutput, kGate, kUp, kDown}};

ModelConfig model_with(const LoraForm& form) {
  return with_lora(test::tiny_moe_config(), form);
}

TEST(LoraRecord, GoesThroughAConfigJson) {
  EXPECT_THAT(to_hf_json(model_with({})), Not(HasSubstr("upmoe_lora")));
  for (const LoraForm& form : {kAll, LoraForm{8, 0.5, {kValue, kQuery}}}) {
    const ModelConfig again = parse_model_config(to_hf_json(model_with(form)), "again");
    EXPECT_TRUE(same_lora(again.lora, form)) << words_of(again.lora);
  }
  EXPECT_EQ(words_of(model_with({8, 0.5, {kValue, kQuery}}).lora),
            "rank 8, alpha 0.5, targets q_proj v_proj");
  const std::string good = to_hf_json(model_with(kAll));
  const auto refusal = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    try {
      parse_model_config(text, "config.json");
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      return std::string(e.what());
    }
    return std::string("none");
  };
  EXPECT_THAT(refusal("\"rank\": 4", "\"rank\": 0"), HasSubstr("rank"));
  EXPECT_THAT(refusal("\"alpha\": 8.0", "\"alpha\": 0.0"), HasSubstr("alpha"));
  EXPECT_THAT(refusal("q_proj", "c_proj"), HasSubstr("targets"));
  EXPECT_THAT(refusal("q_proj", "k_proj"), HasSubstr("q_proj, k_proj")) << "one of them twice";
  EXPECT_THAT(refusal("q_proj", "down_proj"), HasSubstr("in order"));
  EXPECT_THAT(refusal("q_proj", "q_proj k_proj"), HasSubstr("targets"));
  EXPECT_THAT(refusal("\"q_proj\"", "7"), HasSubstr("list of texts"));
  EXPECT_THAT(refusal("\"targets\"", "\"target\""), HasSubstr("targets"));
}

std::vector<std::string> adapters_of(const ModelConfig& config, int layer) {
  std::vector<std::string> names;
  for (const ParamSpec& p : make_param_table(config))
    if (p.adapts && p.layer == layer) names.push_back(fmt::format("{} {}", p.name, p.shape.str()));
  return names;
}

TEST(AdapterParams, EachModuleHasItsTwo) {
  ModelConfig config = model_with(kAll);
  config.mlp_only_layers = {0};
  config.num_key_value_heads = 2;
  const std::vector<std::string> attention{
      "layers.0.attn.q.lora_A_LD [4, 64]",     "layers.0.attn.q.lora_B_NHL [4, 16, 4]",
      "layers.0.attn.k.lora_A_LD [4, 64]",     "layers.0.attn.k.lora_B_NHL [2, 16, 4]",
      "layers.0.attn.v.lora_A_LD [4, 64]",     "layers.0.attn.v.lora_B_NHL [2, 16, 4]",
      "layers.0.attn.o.lora_A_LNH [4, 4, 16]", "layers.0.attn.o.lora_B_DL [64, 4]"};
  std::vector<std::string> dense = attention;
  dense.insert(dense.end(), {"layers.0.ffn.gate.lora_A_LD [4, 64]", "layers.0.ffn.gate.lora_B_FL [48, 4]",
                             "layers.0.ffn.up.lora_A_LD [4, 64]", "layers.0.ffn.up.lora_B_FL [48, 4]",
                             "layers.0.ffn.down.lora_A_LF [4, 48]", "layers.0.ffn.down.lora_B_DL [64, 4]"});
  EXPECT_EQ(adapters_of(config, 0), dense);
  config.lora.targets = {kUp, kDown};
  EXPECT_THAT(
      adapters_of(config, 1),
      ElementsAre("layers.1.moe.up.lora_A_ELD [4, 4, 64]", "layers.1.moe.up.lora_B_EFL [4, 16, 4]",
                  "layers.1.moe.down.lora_A_ELF [4, 4, 16]", "layers.1.moe.down.lora_B_EDL [4, 64, 4]",
                  "layers.1.shared.up.lora_A_LD [4, 64]", "layers.1.shared.up.lora_B_FL [16, 4]",
                  "layers.1.shared.down.lora_A_LF [4, 16]", "layers.1.shared.down.lora_B_DL [64, 4]"));
  EXPECT_THAT(adapters_of(test::tiny_moe_config(), 1), IsEmpty());
}

// a as PEFT draws it (Kaiming-uniform with a slope of sqrt(5)): within 1 / sqrt(inputs). b: zeros.
TEST(AdapterParams, BeginAsPeftsDo) {
  std::size_t count = 0;
  for (const ParamSpec& p : make_param_table(model_with(kAll))) {
    if (!p.adapts) continue;
    ++count;
    EXPECT_TRUE(p.added && p.trained && p.decay && !p.fp32 && !p.joins_previous) << p.name;
    EXPECT_EQ(p.expert, p.name.find(".moe.") != std::string::npos) << p.name;
    if (p.adapts->factor == AdapterFactor::kB) {
      EXPECT_EQ(p.init.kind, Init::Kind::kZeros) << p.name;
      continue;
    }
    EXPECT_EQ(p.init.kind, Init::Kind::kUniform) << p.name;
    const bool of_neurons = p.name.ends_with("_LF") || p.name.ends_with("_ELF");
    EXPECT_FLOAT_EQ(p.init.size, of_neurons ? 0.25f : 0.125f) << p.name;  // 16 neurons, 64 of all others
  }
  EXPECT_EQ(count, 2u * 2 * (4 + 3 + 3));
}

std::string refused(const ModelConfig& model, const LoraForm& asked, bool goes_on) {
  try {
    require_same_lora(model, with_lora(model, asked), "the checkpoint", goes_on);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "";
}

TEST(Lora, OfARunThatGoesOnStaysAsItIs) {
  const ModelConfig plain = test::tiny_moe_config();
  LoraForm other = kAll;
  other.rank = 2;
  for (const bool goes_on : {false, true}) {
    EXPECT_EQ(refused(plain, {}, goes_on), "");
    EXPECT_EQ(refused(model_with(kAll), kAll, goes_on), "");
    EXPECT_THAT(refused(model_with(kAll), {}, goes_on),
                HasSubstr("(none), but the checkpoint holds others (rank 4"));
    EXPECT_THAT(refused(model_with(kAll), other, goes_on), HasSubstr("merge them first"));
  }
  EXPECT_EQ(refused(plain, kAll, false), "");
  EXPECT_THAT(refused(plain, kAll, true), HasSubstr("trained without them so far"));
}

TEST(Lora, WhatCannotBeTogether) {
  RunConfig run;
  EXPECT_THAT(lora_problems(run, model_with(kAll)), IsEmpty());
  run.kernels.experts = ExpertsPath::kFused;
  EXPECT_THAT(lora_problems(run, model_with({})), IsEmpty());
  EXPECT_THAT(lora_problems(run, model_with({4, 8, {kQuery}})), IsEmpty());
  EXPECT_THAT(lora_problems(run, model_with(kAll)), ElementsAre(HasSubstr("kernels.experts: fused")));
  run.router.bias_rate = 0.001;
  EXPECT_THAT(lora_problems(run, model_with({4, 8, {kQuery}})),
              ElementsAre(HasSubstr("router.bias_rate: 0.001")));
  EXPECT_THAT(lora_problems(run, model_with({})), IsEmpty());
  run.router.bias_rate = 0;
  // One tensor of queries, keys and values, and of all experts: PEFT has no module for them.
  run.kernels.experts = ExpertsPath::kAuto;
  ModelConfig dbrx = model_with({4, 8, {kQuery, kOutput, kUp}});
  dbrx.model_type = "dbrx";
  dbrx.shared_expert_intermediate_size = 0;
  EXPECT_THAT(lora_problems(run, dbrx), ElementsAre(HasSubstr("lora.targets: q_proj: in a dbrx"),
                                                    HasSubstr("lora.targets: up_proj: in a dbrx")));
}

TEST(Lora, OfAConfiguration) {
  const auto parsed = [](const std::string& lora) {
    return parse_run_config(
        "run: {dir: d}\nmodel: {path: m}\ndata: {train: a, seq_len: 4}\n"
        "train: {steps: 1, global_batch: 1, micro_batch: 1}\nlora: " +
            lora + "\n",
        "r", {});
  };
  const RunConfig run = parsed("{rank: 8, alpha: 32, targets: [q_proj, down_proj]}");
  EXPECT_TRUE(run.lora.given());
  EXPECT_DOUBLE_EQ(run.lora.scale(), 4);
  EXPECT_TRUE(run.lora.has(kDown) && !run.lora.has(kUp));
  EXPECT_TRUE(same_lora(parse_run_config(to_yaml(run), "again", {}).lora, run.lora));
  EXPECT_FALSE(parsed("{rank: 0}").lora.given());
  EXPECT_THAT(parsed("{alpha: 4}").notes, ElementsAre(HasSubstr("lora.alpha: 4 has no effect")));
  for (const char* bad : {"{rank: -1}", "{rank: 8, alpha: 0}", "{targets: [q]}", "{targets: []}", "{r: 8}"})
    EXPECT_THROW(parsed(bad), Error) << bad;
  try {
    parsed("{rank: 8, dropout: 0.1}");
    ADD_FAILURE() << "dropout was taken";
  } catch (const Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("lora.dropout: 0.1 is not built yet"));
  }
}

TEST(TrainedModel, HasTheRoutersAndTheAdaptersOfTheRun) {
  RunConfig run;
  EXPECT_EQ(to_hf_json(trained_model(run, model_with({}))), to_hf_json(model_with({})));
  run.router.score = RouterScore::kSigmoid;
  run.router.bias_rate = 0.001;
  run.lora = {4, 8, {kValue, kQuery}};
  const ModelConfig trained = trained_model(run, model_with({}));
  EXPECT_EQ(trained.router.score, RouterScore::kSigmoid);
  EXPECT_TRUE(trained.router_bias);
  EXPECT_THAT(trained.lora.targets, ElementsAre(kQuery, kValue));
}

}  // namespace
}  // namespace upmoe
