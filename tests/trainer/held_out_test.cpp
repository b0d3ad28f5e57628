// Held-out loss on several named sets, in whole runs: each by itself and all together.

#include "trainer/held_out.h"

#include "tests/trainer/whole_run.h"

namespace upmoe {
namespace {

TEST(HeldOut, TogetherIsTheMeanOverAllTargets) {
  const std::vector<HeldOutLoss> two{{"a", {2.0, 30, 1.0}}, {"b", {6.0, 10, 0.5}}};
  EXPECT_DOUBLE_EQ(together(two).loss, 3.0);
  EXPECT_EQ(together(two).tokens, 40);
  EXPECT_DOUBLE_EQ(together(two).seconds, 1.5);
  const double loss = 0.1 + 0.2;
  EXPECT_EQ(together({{"", {loss, 7, 1.0}}}).loss, loss);  // to the bit
}

class HeldOutRun : public test::WholeRun {
 protected:
  std::vector<nlohmann::json> evaluations(const std::string& name) const {
    std::vector<nlohmann::json> found;
    std::ifstream in(dir_ / name / "metrics.jsonl");
    for (std::string line; std::getline(in, line);)
      if (auto j = nlohmann::json::parse(line); j.contains("eval_loss")) found.push_back(j);
    return found;
  }
};

TEST_F(HeldOutRun, EachSetIsAsItWouldBeAlone) {
  std::vector<std::uint32_t> tokens;
  for (std::int64_t i = 0; i < 3 * test::kSeq + 1; ++i)
    tokens.push_back(static_cast<std::uint32_t>(i * 7 % 61));
  write_token_file(dir_ / "other.h5", tokens, {}, test::kVocab);
  const HeldOutSet first{"", (dir_ / "tokens.h5").string()}, second{"", (dir_ / "other.h5").string()};
  const auto held_out = [&](const std::string& name, std::vector<HeldOutSet> sets, int ranks) {
    RunConfig c = config(name, 2, 1);
    c.data.valid = std::move(sets);
    c.train.eval_sequences = 5;
    c.train.eval_every = 1;
    run(c, ranks);
    return evaluations(name);
  };
  const auto one = held_out("one", {first}, 1), other = held_out("other", {second}, 1),
             both = held_out("both", {{"a", first.path}, {"b", second.path}}, 1),
             shared = held_out("shared", {{"a", first.path}, {"b", second.path}}, 2);
  ASSERT_EQ(both.size(), 3u);  // before the first step and after each
  for (std::size_t i = 0; i < both.size(); ++i) {
    EXPECT_EQ(both[i]["valid_loss"]["a"], one[i]["eval_loss"]);
    EXPECT_EQ(both[i]["valid_loss"]["b"], other[i]["eval_loss"]);
    EXPECT_EQ(both[i]["valid_tokens"]["a"], 5 * test::kSeq);
    EXPECT_EQ(both[i]["valid_tokens"]["b"], 3 * test::kSeq);
    EXPECT_FALSE(one[i].contains("valid_loss"));
    EXPECT_NEAR(shared[i]["valid_loss"]["b"].get<double>(), both[i]["valid_loss"]["b"].get<double>(), 1e-5);
  }
}

// A start that begins anew where another one had only evaluated: that one's number is of its own model.
TEST_F(HeldOutRun, TheFirstOneIsOfTheRunItself) {
  const auto evaluated = [&](const std::string& name, std::int64_t seed) {
    RunConfig c = config(name, 2, 1);
    c.run.seed = seed;
    c.data.valid = {{"", (dir_ / "tokens.h5").string()}};
    c.train.eval_sequences = 5;
    run(c, 1);
    return evaluations(name);
  };
  const auto alone = evaluated("alone", 2), other = evaluated("again", 1);
  std::filesystem::remove_all(dir_ / "again/checkpoints");  // as of one that was killed before its first
  const auto again = evaluated("again", 2);
  ASSERT_EQ(alone.size(), 2u);
  ASSERT_EQ(again.size(), 2u);
  EXPECT_NE(other[0]["eval_loss"], alone[0]["eval_loss"]);
  EXPECT_EQ(again[0]["eval_loss"], alone[0]["eval_loss"]);
}

}  // namespace
}  // namespace upmoe
