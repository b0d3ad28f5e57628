// Freezing by the names of both worlds, and what the start of a run says about it.

#include "trainer/freeze.h"
#include "parallel/stage_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "configs/lora_record.h"
#include "kernels/core/check.h"
#include "tests/support/tiny_moe.h"
#include "trainer/optimizer_groups.h"
#include "trainer/run_summary.h"

namespace upmoe {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

std::vector<std::string> frozen(const std::vector<std::string>& patterns) {
  return frozen_names(patterns, test::tiny_moe_config());
}

std::string refusal(const std::vector<std::string>& patterns) {
  try {
    frozen(patterns);
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return "";
}

TEST(Freeze, NamesOfBothWorldsMean) {
  const auto routers = ElementsAre("layers.0.moe.router_ED", "layers.1.moe.router_ED");
  EXPECT_THAT(frozen({"*moe.router_ED"}), routers);
  EXPECT_THAT(frozen({"*mlp.gate.weight"}), routers);
  EXPECT_THAT(frozen({"model.layers.?.mlp.gate.*"}), routers);
  EXPECT_THAT(frozen({"embed_VD"}), ElementsAre("embed_VD"));
  EXPECT_THAT(frozen({"model.embed_tokens.weight", "lm_head.weight"}), ElementsAre("embed_VD", "head_VD"));
  EXPECT_THAT(frozen({}), IsEmpty());
  // All experts by Hugging Face's names are two parameters a layer here.
  EXPECT_THAT(frozen({"model.layers.0.mlp.experts.*"}),
              ElementsAre("layers.0.moe.gate_up_EF2D", "layers.0.moe.down_EDF"));
  EXPECT_THAT(frozen({"*.0.mlp.shared_expert.gate_proj*", "*.0.mlp.shared_expert.up_proj*"}),
              ElementsAre("layers.0.shared.gate_up_F2D"));
}

TEST(Freeze, Presets) {
  EXPECT_THAT(frozen({"@router"}), ElementsAre("layers.0.moe.router_ED", "layers.1.moe.router_ED"));
  EXPECT_THAT(frozen({"@experts"}), ElementsAre("layers.0.moe.gate_up_EF2D", "layers.0.moe.down_EDF",
                                                "layers.1.moe.gate_up_EF2D", "layers.1.moe.down_EDF"));
  EXPECT_THAT(frozen({"@shared"}), testing::SizeIs(6));
  const std::vector<std::string> attention = frozen({"@attention"}), others = frozen({"@non_experts"});
  EXPECT_THAT(attention, Contains("layers.1.attn.o_DNH"));
  EXPECT_THAT(attention, testing::Each(HasSubstr(".attn.")));
  EXPECT_THAT(others, testing::SizeIs(33 - 4));  // of all that train
  EXPECT_THAT(others, Not(Contains(HasSubstr("moe.down"))));
  EXPECT_THAT(others, Contains("embed_VD"));
  EXPECT_THAT(frozen({"@router", "embed_VD"}), testing::SizeIs(3));
  for (const char* kind : {"experts", "router", "attention", "shared"}) {
    std::vector<std::string> both = frozen({fmt::format("@{}", kind)});
    const std::vector<std::string> rest = frozen({fmt::format("@non_{}", kind)});
    both.insert(both.end(), rest.begin(), rest.end());
    EXPECT_THAT(std::set<std::string>(both.begin(), both.end()), testing::SizeIs(33)) << kind;
    EXPECT_THAT(both, testing::SizeIs(33)) << kind;
  }
  EXPECT_THAT(refusal({"@expert"}), HasSubstr("no preset '@expert'; there are @experts, @router"));
  EXPECT_THAT(refusal({"@experts", "@non_experts"}), HasSubstr("nothing would train"));
  ModelConfig dense = test::tiny_moe_config();
  dense.num_experts = dense.num_experts_per_tok = 0;
  EXPECT_THROW(frozen_names({"@experts"}, dense), Error);
}

TEST(Freeze, ShippedConfigurationsName) {
  const auto run = [](const std::string& name) {
    return read_run_config(std::filesystem::path(UPMOE_SOURCE_DIR) / "configs/finetune" / (name + ".yaml"),
                           {});
  };
  EXPECT_THAT(frozen(run("full").freeze), IsEmpty());
  EXPECT_THAT(optimizer_groups(run("full").optimizer.groups, test::tiny_moe_config()).at(0).names,
              testing::SizeIs(2));
  EXPECT_THAT(frozen(run("experts_frozen").freeze), testing::SizeIs(4));
  EXPECT_THAT(frozen(run("non_experts_frozen").freeze), testing::SizeIs(29));
  EXPECT_THAT(frozen(run("router_only").freeze), testing::SizeIs(31));
  const ModelConfig adapted = with_lora(test::tiny_moe_config(), run("lora").lora);
  EXPECT_THAT(frozen_names(run("lora").freeze, adapted), testing::SizeIs(33));
  EXPECT_THAT(optimizer_groups({{.match = {"*.lora_B_*"}}}, adapted).at(0).names,
              testing::SizeIs(2 * (4 + 3 + 3)));
}

// A parameter that training adds has no name on disk: it freezes by our name alone.
TEST(Freeze, WhatTrainingAdds) {
  ModelConfig config = test::tiny_moe_config();
  config.router.kind = RouterKind::kNoisy;
  EXPECT_THAT(frozen_names({}, config), IsEmpty());
  EXPECT_THAT(frozen_names({"*mlp.*"}, config), Not(Contains("layers.0.moe.noise_ED")));
  EXPECT_THAT(frozen_names({"@router"}, config), Contains("layers.1.moe.noise_ED"));
  EXPECT_THAT(frozen_names({"*moe.noise_ED"}, config),
              ElementsAre("layers.0.moe.noise_ED", "layers.1.moe.noise_ED"));
}

TEST(Freeze, WhatMatchesNothingNamesTheNearest) {
  EXPECT_THAT(refusal({"embed_DV"}), HasSubstr("'embed_VD'"));
  EXPECT_THAT(refusal({"*mlp.gat.weight"}), HasSubstr("mlp.gate.weight"));
  EXPECT_THAT(refusal({"*router_DE"}), HasSubstr("moe.router_ED"));
  EXPECT_THAT(refusal({"embed_VD", "zzzzzzzzzzzz"}), HasSubstr("'zzzzzzzzzzzz' matches no parameter"));
}

TEST(Freeze, PartsAndEverythingAreRefused) {
  EXPECT_THAT(refusal({"*mlp.experts.1.*"}), HasSubstr("only a part of layers.0.moe.gate_up_EF2D"));
  EXPECT_THAT(refusal({"*experts.*.gate_proj.weight"}), HasSubstr("up_proj"));
  EXPECT_THAT(refusal({"*"}), HasSubstr("nothing would train"));
}

TEST(Freeze, TheStartSaysWhatAPatternCaught) {
  const ModelConfig config = test::tiny_moe_config();
  const auto said = [&](const std::vector<std::string>& patterns) {
    const ParamStore params(config, MeshSpec{}, one_stage(config.num_hidden_layers), 0,
                            {.device = {}, .gradients = false, .freeze = frozen_names(patterns, config)});
    return describe_frozen(params);
  };
  EXPECT_EQ(said({}), "");
  EXPECT_EQ(said({"*mlp.gate.weight"}),
            "2 of 33 parameters (512 of 73,024 values): layers.*.moe.router_ED x 2");
  // Meant the routers, caught the experts as well: visible.
  EXPECT_THAT(said({"*gate*"}), HasSubstr("layers.*.moe.gate_up_EF2D x 2"));
}

TEST(StartOfARun, WhatIsKeptApart) {
  ModelConfig config = test::tiny_moe_config();
  ParamStore::Options options{.dtype = DType::kBF16, .device = {}, .gradients = false, .freeze = {}};
  const auto store = [&] {
    return ParamStore(config, MeshSpec{}, one_stage(config.num_hidden_layers), 0, options);
  };
  EXPECT_EQ(describe_fp32(store()), "");
  EXPECT_EQ(describe_buffers(store()), "");
  config.router_bias = true;
  options.fp32 = fp32_roles(RouterDType::kFp32);
  EXPECT_EQ(describe_fp32(store()), "layers.*.moe.router_ED x 2");
  EXPECT_EQ(describe_buffers(store()), "layers.*.moe.router_E x 2");
  options.dtype = DType::kF32;
  EXPECT_EQ(describe_fp32(store()), "");
  options.dtype = DType::kBF16;
  options.fp32 = {Role::kKey};  // one product with the queries
  EXPECT_THROW(store(), Error);
  // A buffer never trains, whatever is frozen; and freezing all the rest leaves nothing.
  EXPECT_THAT(frozen_names({"*moe.router*"}, config), testing::SizeIs(2));
  EXPECT_THROW(frozen_names({"*"}, config), Error);
}

RunConfig some_run(std::int64_t steps, std::int64_t batch, std::vector<DataSource> sources) {
  RunConfig run;
  run.train.steps = steps;
  run.train.global_batch = batch;
  run.data.train = std::move(sources);
  run.data.seq_len = 16;
  return run;
}

TEST(StartOfARun, SequencesAndEpochs) {
  const RunConfig run = some_run(20, 4, {{"t.h5", 1.0}});
  EXPECT_EQ(describe_data(run, {249}, 6),
            "249 sequences of 16 tokens in 1 file; steps 6 to 20 take 60, 0.241 epochs; 64 tokens per step");
  EXPECT_THAT(repeated_data(run, {249}), IsEmpty());
  EXPECT_THAT(repeated_data(run, {8}), ElementsAre(HasSubstr("10 times through t.h5 (8 sequences)")));
  const RunConfig two = some_run(20, 4, {{"a.h5", 3.0}, {"b.h5", 1.0}});
  EXPECT_THAT(describe_data(two, {60, 10}, 1), HasSubstr("1 epochs of a.h5 and 2 epochs of b.h5"));
  EXPECT_THAT(repeated_data(two, {60, 4}), ElementsAre(HasSubstr("b.h5")));
}

}  // namespace
}  // namespace upmoe
