// What is made of the counts: remarks on printed numbers, readings of the claim, times to serve, and what runs needed.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "configs/machine.h"
#include "configs/shipped_file.h"
#include "tests/support/temporary_directory.h"
#include "trainer/cost/claim.h"
#include "trainer/cost/published.h"
#include "trainer/cost/roofline.h"
#include "trainer/cost/run_curve.h"
#include "trainer/cost/scaling_fit.h"

namespace upmoe {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

const fs::path kConfigs = fs::path(UPMOE_SOURCE_DIR) / "configs";

ModelConfig shipped(const std::string& name) {
  return read_model_config(kConfigs / "models" / (name + ".json"));
}

template <class F>
std::string error_of(const F& body, ExitCode code) {
  try {
    body();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code);
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return "";
}

TEST(Published, RoundedCutOrWrong) {
  EXPECT_EQ(agreement("7.0", 6.9796), Agreement::kRounded);
  EXPECT_EQ(agreement("6.4", 6.4767), Agreement::kCut);
  EXPECT_EQ(agreement("6.5", 6.4767), Agreement::kRounded);
  EXPECT_EQ(agreement("14", 14.2493), Agreement::kRounded);
  EXPECT_EQ(agreement("7.8", 8.5377), Agreement::kDiffers);
  EXPECT_EQ(agreement("", 1), Agreement::kNothingPrinted);
}

TEST(Published, RemarksAreComputed) {
  const PublishedModel gemma{"g", "G", true, {"8.5", "7.8", "7.8"}};
  const ParamCounts counts{
      .total = 8'537'680'896, .activated = 8'537'680'896, .activated_non_embedding = 7'751'248'896};
  EXPECT_EQ(remark(gemma, counts), "activated leaves out the embedding, which other rows count");
  EXPECT_EQ(remark({"g", "G", true, {"8.5", "8.5", "7.8"}}, counts), "agrees");
  EXPECT_EQ(remark({"g", "G", true, {"8.5", "8.5", "7.7"}}, counts), "non-embedding cut, not rounded");
  EXPECT_EQ(remark({"g", "G", true, {"9.5", "8.5", "7.7"}, "a note"}, counts),
            "total differs by +0.96; non-embedding cut, not rounded; a note");
}

TEST(Claim, InItsReadings) {
  std::vector<ClaimedModels> by_length;
  for (const std::int64_t s : {2048, 4096, 8192, 32768})
    by_length.push_back({model_cost(shipped("qwen1.5-moe-a2.7b"), {s}),
                         model_cost(shipped("qwen1.5-7b"), {s}), model_cost(shipped("qwen1.5-1.8b"), {s})});
  const std::vector<ClaimReading> all = claim_readings(by_length, {});
  ASSERT_EQ(all.size(), 28u);
  const double savings[] = {.692, .681, .649, .652, .664, .662, .660, .650};
  for (std::size_t i = 0; i < 8; ++i) EXPECT_NEAR(*all[i].saving, savings[i], 6e-4) << all[i].reading;
  const double tokens[] = {.743, .740, .735, .714};
  for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(*all[8 + i].tokens, tokens[i], 6e-4) << all[8 + i].formula;
  EXPECT_NEAR(*all[12].tokens * 3, .26, .005);
  EXPECT_NEAR(*all[13].tokens * 3, .21, .005);
  EXPECT_LT(*all[15].tokens, 0);
  EXPECT_FALSE(all[15].saving);
  EXPECT_THAT(all[15].result, HasSubstr("impossible"));
  EXPECT_NEAR(*all[17].tokens, .59, .005);  // 20 % at 4096
  EXPECT_THAT(all[20].result, HasSubstr("19.4k hours"));
  EXPECT_NEAR(*all[25].saving, .613, 6e-4);
}

TEST(Claim, ACardThatFitsWithItsSourceAlone) {
  const auto counts = [](const char* name) { return count_weights(shipped(name)).parameters; };
  const std::vector<ClaimReading> all = card_readings(counts("marco-nano"), counts("qwen3-0.6b"), {});
  ASSERT_EQ(all.size(), 4u);
  EXPECT_THAT(all[0].result, HasSubstr("1.84e+22 FLOP, 13 %"));
  EXPECT_THAT(all[1].result, HasSubstr("1.37e+22 FLOP, 10 %"));
  EXPECT_THAT(all[2].result, HasSubstr("1.47e+23 FLOP, 105 % of the 1.40e+23 printed"));
  EXPECT_THAT(all[2].reading, HasSubstr("inferred"));
  EXPECT_THAT(all[3].result, HasSubstr("78 %"));
}

TEST(Roofline, WhatNobodyServesHasNoTimes) {
  ModelConfig model = shipped("qwen1.5-moe-a2.7b");
  model.router.kind = RouterKind::kExpertChoice;
  model.router.group_size = 4;
  EXPECT_THROW(ServedModel(model, 1000), Error);
}

TEST(Roofline, TimesOfDecodingByBatch) {
  const Machine a100 = read_machine(kConfigs / "machines" / "a100-80.yaml");
  const ServedModel mixture(shipped("qwen1.5-moe-a2.7b"), 1000), dense(shipped("qwen1.5-7b"), 1000);
  EXPECT_EQ(dense.kv_bytes, 524'288);
  EXPECT_EQ(mixture.kv_bytes, 196'608);
  EXPECT_EQ(expected_experts(dense, 7), 0);
  EXPECT_NEAR(expected_experts(mixture, 1), 4, 1e-9);
  EXPECT_NEAR(expected_experts(mixture, 256), 60, 1e-5);
  const std::pair<int, double> expected[] = {{1, 2.97},  {4, 1.69},   {16, 1.09}, {32, 1.13},
                                             {64, 1.39}, {128, 1.75}, {256, 2.08}};
  for (const auto& [batch, ratio] : expected)
    EXPECT_NEAR(decode_seconds(dense, a100, batch, 1500) / decode_seconds(mixture, a100, batch, 1500), ratio,
                .005)
        << batch;
  // Prefill: products alone, of all tokens, but of the last block's what later tokens see, and the head's once.
  const double head = 4096. * 151936, layers = dense.token_flops / 2 - head,
               last = 4096. * 4096 + 3. * 4096 * 11008, attention = 2. * 1000 * 1001 * 4096 * 32;
  EXPECT_EQ(dense.prompt_flops, 2 * (1000 * layers - 999 * last + head) + attention);
  EXPECT_NEAR(prefill_seconds(dense, a100, 8) * a100.peak_flops_per_s(), 8 * dense.prompt_flops, 1);
  EXPECT_NEAR(prefill_seconds(dense, a100, 8) / prefill_seconds(mixture, a100, 8), 3.16, .005);
}

// The last layer's experts compute one token of a prompt, and no more of them are read than that one chose.
TEST(Roofline, AShortPromptReadsTheExpertsThatComputeIt) {
  const Machine a100 = read_machine(kConfigs / "machines" / "a100-80.yaml");
  const double experts = 2 * 60. * 3 * 2048 * 1408,  // bytes, of a layer
      others = 2 * (4. * 2048 * 2048 + 3. * 2048 * 5632 + 2048 + 2048 * 60);
  const double head = 2 * 2048. * 151936, cache = 196'608;
  for (const auto& [prompt, batch] : {std::pair{1, 1}, {8, 1}, {8, 4}}) {
    const ServedModel mixture(shipped("qwen1.5-moe-a2.7b"), prompt);
    const auto read = [](double tokens) { return 1 - std::pow(56. / 60, tokens); };
    const double bytes = head + 24 * others + 23 * experts * read(prompt * batch) + experts * read(batch) +
                         prompt * batch * cache;
    EXPECT_NEAR(prefill_seconds(mixture, a100, batch) * a100.bytes_per_s() / bytes, 1, 1e-12) << prompt;
  }
  const ServedModel one(shipped("qwen1.5-moe-a2.7b"), 1);
  EXPECT_NEAR(prefill_seconds(one, a100, 3) / decode_seconds(one, a100, 3, 1), 1, 1e-12);
}

TEST(Roofline, InFp32) {
  Machine machine = read_machine(kConfigs / "machines" / "h100-sxm.yaml");
  const ModelConfig model = shipped("qwen1.5-7b");
  const ServedModel bf16(model, 1000), fp32(model, 1000, DType::kF32);
  EXPECT_EQ(fp32.kv_bytes, 2 * bf16.kv_bytes);
  EXPECT_EQ(fp32.weight_bytes, 2 * bf16.weight_bytes);
  EXPECT_NEAR(decode_seconds(fp32, machine, 1, 1500), 2 * decode_seconds(bf16, machine, 1, 1500), 1e-9)
      << "bound by memory";
  EXPECT_NEAR(prefill_seconds(fp32, machine, 8) * 66.9e12, 8 * fp32.prompt_flops, 1e3) << "by products";
  machine.fp32_tflops = 0;
  EXPECT_THAT(error_of([&] { decode_seconds(fp32, machine, 1, 1500); }, ExitCode::kUsage),
              HasSubstr("no fp32_tflops"));
}

TEST(Roofline, WhatFits) {
  const Machine a100 = read_machine(kConfigs / "machines" / "a100-80.yaml");
  const ServedModel mixture(shipped("qwen1.5-moe-a2.7b"), 1000), dense(shipped("qwen1.5-7b"), 1000);
  EXPECT_EQ(sequences_that_fit(dense, a100, 1500, .9), 71);
  EXPECT_EQ(sequences_that_fit(mixture, a100, 1500, .9), 147);
  EXPECT_EQ(sequences_that_fit(mixture, a100, 1500, .3), 0) << "not even the weights";
  EXPECT_EQ(requests_per_s(mixture, a100, 1000, .3, {}), 0);
  EXPECT_NEAR(requests_per_s(dense, a100, 1000, .9, {.8, .5}), 1.456, .0005);
  EXPECT_NEAR(requests_per_s(mixture, a100, 1000, .9, {.8, .5}), 3.091, .0005);
  // The prompt gives the first of the answer's tokens; steps make the others.
  const double n = static_cast<double>(sequences_that_fit(dense, a100, 1000.5, .9)),
               more = static_cast<double>(sequences_that_fit(dense, a100, 1001, .9));
  EXPECT_NEAR(n / requests_per_s(dense, a100, 1, .9, {}), prefill_seconds(dense, a100, n), 1e-9);
  EXPECT_NEAR(more / requests_per_s(dense, a100, 2, .9, {}),
              prefill_seconds(dense, a100, more) + decode_seconds(dense, a100, more, 1001), 1e-9);
}

TEST(Machines, AllShippedOnesAreRead) {
  const ShippedFolder machines{kConfigs / "machines", ".yaml", "machine"};
  const std::vector<std::string> gpus{"a100-80", "h100-sxm", "h200-sxm"}, all = shipped_names(machines);
  EXPECT_THAT(all, testing::IsSupersetOf(gpus)) << "beside CPUs that doctor has measured";
  for (const std::string& name : all)
    EXPECT_GT(read_machine(shipped_or_own(machines, name)).bytes_per_s(), 1e9) << name;
  for (const std::string& name : gpus)
    EXPECT_GT(read_machine(shipped_or_own(machines, name)).bytes_per_s(), 1e12) << name;
}

TEST(Machines, BadFiles) {
  const test::TemporaryDirectory dir;
  const fs::path file = dir.path() / "m.yaml";
  std::ofstream(file) << "name: x\nsource: y\nbf16_tflop: 3\nmemory_gb: -1\n";
  EXPECT_THAT(error_of([&] { read_machine(file); }, ExitCode::kUsage),
              AllOf(HasSubstr("m.yaml:3"), HasSubstr("unknown key 'bf16_tflop'"), HasSubstr("bf16_tflops"),
                    HasSubstr("memory_gb_per_s"), HasSubstr("m.yaml:4")));
}

TEST(ShippedNames, TheNearestAndAll) {
  const ShippedFolder models{kConfigs / "models", ".json", "model"};
  EXPECT_EQ(shipped_or_own(models, "qwen1.5-7b"), models.folder / "qwen1.5-7b.json");
  EXPECT_EQ(shipped_or_own(models, "some/where"), "some/where");
  EXPECT_EQ(shipped_or_own(models, "mine.json"), "mine.json");
  EXPECT_THAT(
      error_of([&] { shipped_or_own(models, "qwen1.5-7"); }, ExitCode::kUsage),
      AllOf(HasSubstr("no model 'qwen1.5-7'; did you mean 'qwen1.5-7b'?"), HasSubstr("qwen1.5-moe-a2.7b")));
  // The begun name, though 'qwen1.5-32b' has fewer other letters; of several that begin so, the nearest.
  EXPECT_THAT(error_of([&] { shipped_or_own(models, "qwen1.5-moe"); }, ExitCode::kUsage),
              HasSubstr("did you mean 'qwen1.5-moe-a2.7b'?"));
  EXPECT_THAT(error_of([&] { shipped_or_own(models, "qwen1.5-"); }, ExitCode::kUsage),
              HasSubstr("did you mean 'qwen1.5-7b'?"));
}

class RunCurves : public testing::Test {
 protected:
  // Steps 1 to 100, each tenth logged; losses fall straight to `last`; four ranks.
  fs::path run(const std::string& name, double last, const std::string& tail = "", bool held_out = false) {
    const fs::path folder = dir_.path() / name;
    fs::create_directories(folder);
    std::ofstream out(folder / "metrics.jsonl");
    for (int step = 10; step <= 100; step += 10) {
      out << fmt::format(R"({{"step":{},"tokens":{},"loss":{},"flops":1e9,"ranks":4,"seconds":0.5}})", step,
                         1000 * step, 5 - (5 - last) * step / 100)
          << '\n';
      if (held_out && step % 50 == 0)
        out << fmt::format(R"({{"kind":"eval","step":{},"tokens":{},"eval_loss":{},"seconds":9}})", step,
                           1000 * step, 6 - (6 - last) * step / 100)
            << '\n';
    }
    out << tail;
    return folder;
  }
  test::TemporaryDirectory dir_;
};

TEST_F(RunCurves, OfOneNameAreCalledByTheFoldersAbove) {
  const std::string a = run("a/moe", 3).string(), b = run("b/a/moe", 3).string() + "/";
  const std::string c = (run("c/moe", 3) / "metrics.jsonl").string(), other = run("a/dense", 3).string();
  const auto names = [](const std::vector<std::string>& runs) {
    std::vector<std::string> found;
    for (const RunCurve& curve : read_run_curves(runs)) found.push_back(curve.name);
    return found;
  };
  EXPECT_THAT(names({a, c, other}), testing::ElementsAre("a/moe", "c/moe", "dense"));
  EXPECT_THAT(names({a, b}), testing::ElementsAre(dir_.path().filename().string() + "/a/moe", "b/a/moe"));
  EXPECT_THAT(names({a, a + "/"}), testing::ElementsAre("moe", "moe"));  // one run twice
}

TEST_F(RunCurves, CrossWhereTheyShould) {
  const RunCurve fast = read_run_curve(run("fast", 3)),
                 slow = read_run_curve(run("slow", 4) / "metrics.jsonl");
  EXPECT_EQ(fast.name, "fast");
  EXPECT_EQ(slow.name, "slow");
  EXPECT_FALSE(fast.held_out);
  EXPECT_NEAR(slow.spent.tokens, 100e3, 1e-6);
  EXPECT_NEAR(slow.spent.flops, 400e9, 1);
  EXPECT_NEAR(slow.spent.seconds, 50, 1e-9);
  const std::optional<Arrival> at = spent_at(fast, slow.final_loss());
  ASSERT_TRUE(at);
  EXPECT_NEAR(at->spent.tokens, 50e3, 1e-3);
  EXPECT_NEAR(at->spent.flops, 200e9, 1e3);
  EXPECT_NEAR(at->spent.seconds, 25, 1e-6);
  EXPECT_NEAR(spent_at(fast, 3.9)->spent.tokens, 55e3, 1e-3) << "between two points";
  EXPECT_FALSE(spent_at(slow, fast.final_loss()));
  EXPECT_NEAR(spent_at(fast, 10)->spent.tokens, 10e3, 1e-6) << "the first point is the first thing known";
  EXPECT_TRUE(spent_at(fast, 10)->first);
  EXPECT_FALSE(at->first);
}

// One training, with and without evaluations: at equal cost to an equal loss.
TEST_F(RunCurves, AreComparedByOneKindOfLoss) {
  const std::string with = run("with", 4, "", true).string(), without = run("without", 4).string();
  EXPECT_TRUE(read_run_curve(with).held_out);
  const std::vector<RunCurve> both = read_run_curves({with, without});
  EXPECT_FALSE(both[0].held_out || both[1].held_out);
  EXPECT_EQ(spent_at(both[0], both[1].final_loss())->spent.tokens, both[1].spent.tokens);
  EXPECT_TRUE(read_run_curves({with, with})[1].held_out);
}

// What came behind the last evaluation brought it no loss that it could be compared by.
TEST_F(RunCurves, AreChargedUpToTheirLastEvaluation) {
  const fs::path folder = dir_.path() / "cut";
  fs::create_directories(folder);
  std::ofstream(folder / "metrics.jsonl") << R"({"kind":"eval","step":0,"tokens":0,"eval_loss":6}
{"step":1,"tokens":1000,"loss":6,"flops":1e9,"ranks":1,"seconds":1}
{"kind":"eval","step":1,"tokens":1000,"eval_loss":5}
{"step":2,"tokens":2000,"loss":5,"flops":1e9,"ranks":1,"seconds":1}
)";
  const RunCurve curve = read_run_curve(folder);
  EXPECT_EQ(curve.spent.tokens, 2000);
  EXPECT_EQ(curve.to_final_loss().tokens, 1000);
  EXPECT_EQ(outcome_of(curve, nullptr).tokens, 1000);
  EXPECT_EQ(spent_at(curve, curve.final_loss())->spent.tokens, curve.to_final_loss().tokens);
}

TEST_F(RunCurves, ATeachersForwardIsCharged) {
  const char* taught =
      R"({"step":110,"tokens":1,"loss":4,"flops":1e9,"flops_teacher":5e8,"ranks":4,"seconds":1})";
  EXPECT_NEAR(read_run_curve(run("taught", 4, taught)).spent.flops, 460e9, 1);
}

TEST_F(RunCurves, OfEvaluationsWhereThereAre) {
  const RunCurve curve = read_run_curve(run("evaluated", 4, "", true));
  EXPECT_TRUE(curve.held_out);
  ASSERT_EQ(curve.points.size(), 2u);
  EXPECT_EQ(curve.points[0].loss, 5);
  EXPECT_NEAR(spent_at(curve, 4.5)->spent.tokens, 75e3, 1e-6);
  EXPECT_NEAR(curve.spent.seconds, 50, 1e-9) << "without evaluations";
}

// Every tenth step is logged, and the model is evaluated between.
TEST_F(RunCurves, AnEvaluationCostsTheStepsBeforeIt) {
  const fs::path folder = dir_.path() / "between";
  fs::create_directories(folder);
  std::ofstream(folder / "metrics.jsonl") << R"({"kind":"eval","step":0,"tokens":0,"eval_loss":6}
{"step":1,"tokens":1000,"loss":6,"flops":1e9,"ranks":4,"seconds":3}
{"kind":"eval","step":4,"tokens":4000,"eval_loss":5}
{"kind":"eval","step":7,"tokens":7000,"eval_loss":4}
{"step":10,"tokens":10000,"loss":4,"flops":1e9,"flops_teacher":5e8,"ranks":4,"seconds":0.5}
{"kind":"eval","step":10,"tokens":10000,"eval_loss":3}
)";
  const RunCurve curve = read_run_curve(folder);
  ASSERT_EQ(curve.points.size(), 4u);
  const double steps[] = {0, 4, 7, 10};
  for (std::size_t i = 0; i < 4; ++i) {
    const double behind_the_first = std::max(0.0, steps[i] - 1);
    EXPECT_EQ(curve.points[i].spent.tokens, 1000 * steps[i]);
    EXPECT_NEAR(curve.points[i].spent.flops, i == 0 ? 0 : 4e9 + 6e9 * behind_the_first, 1) << steps[i];
    EXPECT_NEAR(curve.points[i].spent.seconds, i == 0 ? 0 : 3 + 0.5 * behind_the_first, 1e-9) << steps[i];
  }
  EXPECT_NEAR(curve.teacher_flops, 9 * 4 * 5e8, 1);
  EXPECT_NEAR(spent_at(curve, 4.5)->spent.tokens, 5500, 1e-6);
}

// JSON has no NaN: `upmoe train` writes null.
TEST_F(RunCurves, LossesThatAreNotFinite) {
  const auto step = [](int number, const char* loss) {
    return fmt::format(
               R"({{"step":{},"tokens":{},"loss":{},"flops":1e9,"ranks":4,"seconds":0.5,"skipped":true}})",
               number, 1000 * number, loss) +
           "\n";
  };
  const auto evaluated = [](int number, const char* loss) {
    return fmt::format(R"({{"kind":"eval","step":{},"tokens":{},"eval_loss":{}}})", number, 1000 * number,
                       loss) +
           "\n";
  };
  const RunCurve skipped = read_run_curve(run("skipped", 4, step(110, "null") + step(120, "3.5")));
  EXPECT_EQ(skipped.points.size(), 11u) << "a step without a loss is none of the points";
  EXPECT_EQ(skipped.final_loss(), 3.5);
  EXPECT_NEAR(skipped.spent.seconds, 60, 1e-9) << "but it has its cost";
  const RunCurve gap =
      read_run_curve(run("gap", 4, evaluated(100, "null") + step(110, "null") + evaluated(110, "3"), true));
  EXPECT_EQ(gap.points.size(), 3u);
  EXPECT_EQ(gap.final_loss(), 3);
  const auto refusal = [&](const fs::path& p) {
    return error_of([&] { read_run_curve(p); }, ExitCode::kBadInput);
  };
  EXPECT_THAT(refusal(run("diverged", 4, step(110, "null"))),
              HasSubstr("metrics.jsonl: the last loss is not finite"));
  EXPECT_THAT(refusal(run("lost", 4, evaluated(100, "null"), true)),
              HasSubstr("the last loss is not finite"));
}

TEST_F(RunCurves, NoiseIsSmoothed) {
  const fs::path folder = dir_.path() / "noisy";
  fs::create_directories(folder);
  std::ofstream out(folder / "metrics.jsonl");
  for (int step = 1; step <= 300; ++step)
    out << fmt::format(R"({{"step":{},"tokens":{},"loss":{},"flops":1,"ranks":1,"seconds":1}})", step, step,
                       6 - 0.01 * step + (step % 3 == 0 ? 0.2 : -0.1))
        << '\n';
  out.close();
  EXPECT_NEAR(spent_at(read_run_curve(folder), 5.0)->spent.tokens, 100, 4);
}

TEST_F(RunCurves, BadOnes) {
  EXPECT_NEAR(read_run_curve(run("torn", 4, R"({"step":110,"tok)")).spent.tokens, 100e3, 1e-6)
      << "still written";
  const auto message = [&](const fs::path& p) {
    return error_of([&] { read_run_curve(p); }, ExitCode::kBadInput);
  };
  EXPECT_THAT(message(dir_.path() / "none"), HasSubstr("none: cannot be read"));
  EXPECT_THAT(message(run("list", 4, "[]\n")), HasSubstr("metrics.jsonl:11: is no JSON object"));
  EXPECT_THAT(message(run("twice", 4, R"({"step":100,"tokens":1,"loss":1,"flops":1,"ranks":1,"seconds":1})")),
              HasSubstr("step 100 follows step 100"));
  EXPECT_THAT(message(run("poor", 4, R"({"step":110,"tokens":1,"loss":1,"ranks":1,"seconds":1})")),
              HasSubstr("no number 'flops'"));
  const char* teacher =
      R"({"step":110,"tokens":1,"loss":1,"flops":1,"flops_teacher":[],"ranks":1,"seconds":1})";
  EXPECT_THAT(message(run("untold", 4, teacher)), HasSubstr("no number 'flops_teacher'"));
}

}  // namespace
}  // namespace upmoe
