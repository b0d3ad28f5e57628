// fp32 masters are what a run keeps beside rounded weights; whoever reads its checkpoint gets them.

#include <algorithm>
#include <bit>
#include <cmath>

#include "configs/param_table.h"
#include "data/model_source.h"
#include "data/run_metadata.h"
#include "parallel/thread_comm.h"
#include "tests/trainer/whole_run.h"
#include "trainer/checkpoint.h"

namespace upmoe::test {
namespace {

class Masters : public WholeRun {
 protected:
  static std::vector<float> stored(const ShardStore& store, const std::string& name, const char* kind) {
    const Shape shape = store.tensors().at({name, kind}).shape;
    std::vector<float> values(static_cast<std::size_t>(shape.elements()));
    store.read(name, kind, whole(shape), host_view(values.data(), shape));
    return values;
  }
  // Every master that a session of `precision` has after `fill`, by name.
  std::map<std::string, std::vector<float>> masters_after(Precision precision,
                                                          const std::function<void(Session&)>& fill) const {
    std::map<std::string, std::vector<float>> masters;
    run_in_threads(1, [&](Communicator& world) {
      const RunConfig run = config("unused", 2, 1, precision);
      Session session(run, read_model_config(run.model.path), world);
      fill(session);
      for (const OwnedSlice& slice : session.optimizer.slices())
        masters[slice.param->spec.name].assign(slice.master.as<float>(),
                                               slice.master.as<float>() + slice.master.elements());
    });
    return masters;
  }
  std::map<std::string, std::vector<float>> resumed(const fs::path& from, Precision precision) const {
    return masters_after(precision, [&](Session& s) { load_checkpoint(ShardStore(from), s); });
  }
  std::map<std::string, std::vector<float>> started(const fs::path& from, Precision precision) const {
    return masters_after(precision, [&](Session& s) { load_model(*open_model(from), s); });
  }
  static std::int64_t rounded_bits(const std::vector<float>& values) {
    return std::count_if(values.begin(), values.end(),
                         [](float v) { return (std::bit_cast<std::uint32_t>(v) & 0xffffu) != 0; });
  }
};

TEST_F(Masters, AReaderGetsThemBitForBit) {
  run(config("run", 2, 2, Precision::kBf16), 2);
  const ShardStore store(checkpoint("run", 2));
  const auto model = open_model(dir_ / "run");
  std::int64_t more_than_bf16 = 0;
  for (const ParamSpec& p : make_param_table(model->config())) {
    std::vector<float> read(static_cast<std::size_t>(p.shape.elements()));
    model->read(p, whole(p.shape), host_view(read.data(), p.shape));
    EXPECT_EQ(read, stored(store, p.name, "master")) << p.name;
    more_than_bf16 += rounded_bits(read);
    // As bf16 they are the weights: whichever is read, the same bits.
    std::vector<bf16> rounded(read.size());
    model->read(p, whole(p.shape), host_view(rounded.data(), p.shape));
    const std::vector<float> weight = stored(store, p.name, "weight");
    for (std::size_t i = 0; i < read.size(); ++i) {
      ASSERT_EQ(to_float(rounded[i]), weight[i]) << p.name;
      ASSERT_EQ(to_float(to_bf16(read[i])), weight[i]) << p.name;
    }
  }
  EXPECT_GT(more_than_bf16, 1000);
}

TEST_F(Masters, AResumeInEitherPrecisionBeginsWithThem) {
  run(config("bf16", 2, 1, Precision::kBf16), 1);
  run(config("fp32", 2, 1, Precision::kFp32), 1);
  for (const auto& [name, kind] : {std::pair{"bf16", "master"}, std::pair{"fp32", "weight"}}) {
    const ShardStore store(checkpoint(name, 2));
    for (const Precision precision : {Precision::kBf16, Precision::kFp32}) {
      const auto masters = resumed(checkpoint(name, 2), precision);
      ASSERT_FALSE(masters.empty());
      for (const auto& [param, values] : masters)
        EXPECT_EQ(values, stored(store, param, kind)) << param << ' ' << name << " as " << name_of(precision);
    }
  }
}

TEST_F(Masters, ANewRunBeginsWithTheBestThereIs) {
  run(config("bf16", 2, 1, Precision::kBf16), 1);
  const ShardStore store(checkpoint("bf16", 2));
  for (const Precision precision : {Precision::kBf16, Precision::kFp32})
    for (const auto& [param, values] : started(dir_ / "bf16", precision))
      EXPECT_EQ(values, stored(store, param, "master")) << param << " as " << name_of(precision);
}

// What was frozen so far begins as in a run of its own: Adam's first step is the rate in every element with a gradient,
// however far the run is, and the next checkpoints still know when it began.
TEST_F(Masters, MomentsThatBeginLateAreCorrectedFromThere) {
  RunConfig c = config("late", 4, 1);
  c.optimizer.weight_decay = c.optimizer.clip = 0;
  c.router.aux_loss = {0.01};
  c.freeze = {"*o_proj*"};
  run(c, 1);
  c.freeze = {};
  c.train.steps = 5;
  run(c, 1);
  c.train.steps = 6;
  run(c, 1);
  const ShardStore before(checkpoint("late", 4)), first(checkpoint("late", 5)), second(checkpoint("late", 6));
  EXPECT_TRUE(run_metadata_of(before).moments_begun.empty());
  RunConfig frozen = config("frozen", 2, 1);
  frozen.freeze = {"*o_proj*"};
  run(frozen, 1);
  frozen.train.steps = 4;
  run(frozen, 1);
  EXPECT_TRUE(run_metadata_of(ShardStore(checkpoint("frozen", 4))).moments_begun.empty()) << "frozen still";
  std::int64_t late = 0;
  for (const auto& [name, step] : run_metadata_of(first).moments_begun) {
    EXPECT_EQ(step, 4) << name;
    const std::vector<float> a = stored(before, name, "weight"), b = stored(first, name, "weight"),
                             m = stored(first, name, "m");
    double most = 0;
    for (std::size_t i = 0; i < a.size(); ++i)
      if (std::abs(m[i]) > 1e-5f) most = std::max(most, std::abs(double{b[i]} - a[i]) / c.optimizer.lr);
    EXPECT_NEAR(most, 1, 1e-2) << name;
    ++late;
  }
  EXPECT_EQ(late, 2) << "a layer each";
  EXPECT_EQ(run_metadata_of(second).moments_begun, run_metadata_of(first).moments_begun);
  for (const auto& freeze : {std::vector<std::string>{"*o_proj*"}, std::vector<std::string>{}}) {
    c.freeze = freeze;
    ++c.train.steps;
    run(c, 1);
  }
  for (const auto& [name, step] : run_metadata_of(ShardStore(checkpoint("late", 8))).moments_begun)
    EXPECT_EQ(step, 7) << name << ": frozen once more, it begins once more";
}

// Trained on with other parameters frozen, which have neither masters nor moments in the checkpoint.
TEST_F(Masters, WhatWasFrozenHasItsWeight) {
  RunConfig c = config("run", 2, 1, Precision::kFp32);
  c.freeze = {"*embed*"};
  run(c, 1);
  const ShardStore store(checkpoint("run", 2));
  for (const auto& [param, values] : resumed(checkpoint("run", 2), Precision::kBf16))
    EXPECT_EQ(values, stored(store, param, "weight")) << param;
}

}  // namespace
}  // namespace upmoe::test
