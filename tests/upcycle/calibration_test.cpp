// Recipes that ask tokens: rows of routers as they were told, whatever the ranks, and what is said without tokens.

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "parallel/thread_comm.h"
#include "tests/support/read_file.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

class Calibrated : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_dense(dir_.path() / "dense", shape_); }
  UpcycleOptions options(const std::string& to) const {
    UpcycleOptions o;
    o.from = dir_.path() / "dense";
    o.to = dir_.path() / to;
    o.threads = 2;
    o.piece_bytes = 4096;
    o.progress = false;
    return o;
  }
  static UpcycleConfig recipe(double noise) {
    UpcycleConfig c = tiny_recipe();
    c.router.method = RouterMethod::kPrompts;
    c.router.std = noise;
    return c;
  }
  Calibration rows() const {
    Calibration told;
    for (int layer = 0; layer < shape_.layers; ++layer) {
      std::vector<float> values(static_cast<std::size_t>(60 * shape_.hidden));
      normal_batch(9, static_cast<std::uint64_t>(layer) * values.size(), 60 * shape_.hidden, values.data());
      told.layers.push_back({.router_ED = values});
    }
    return told;
  }

  TinyShape shape_;
  TemporaryDirectory dir_;
};

TEST_F(Calibrated, RoutersAreWhatTokensToldAndNoise) {
  const TinySource source(dir_.path() / "dense");
  const Calibration told = rows();
  const auto router = [&](double noise, int layer) {
    return tensor(source.make(make_recipe(recipe(noise), source.config(), 1, &told)),
                  fmt::format("model.layers.{}.mlp.gate.weight", layer));
  };
  for (const int layer : {0, 1}) {
    const std::vector<float>& values = told.layers[static_cast<std::size_t>(layer)].router_ED;
    const NaiveVector exact = router(0, layer), noisy = router(0.01, layer);
    ASSERT_EQ(exact.size(), values.size());
    double square = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_EQ(exact[i], values[i]);
      square += (noisy[i] - values[i]) * (noisy[i] - values[i]);
    }
    const auto n = static_cast<double>(values.size());
    EXPECT_NEAR(std::sqrt(square / n), 0.01, 4 * 0.01 / std::sqrt(2 * n));
  }
}

TEST_F(Calibrated, OneRankIsAskedAndTheBytesAreTheSameForAnyNumber) {
  std::atomic<int> asked{0};
  const auto run = [&](const std::string& to, int ranks) {
    UpcycleOptions o = options(to);
    o.calibrate = [&] {
      ++asked;
      return rows();
    };
    run_in_threads(ranks, [&](Communicator& comm) { upcycle(recipe(0.01), o, comm); });
  };
  run("one", 1);
  for (const int ranks : {2, 3}) {
    const std::string to = fmt::format("ranks{}", ranks);
    run(to, ranks);
    for (const char* file : {"model.safetensors", "upcycle_report.json", "config.json"})
      EXPECT_EQ(read_file(dir_.path() / to / file), read_file(dir_.path() / "one" / file)) << file << ranks;
  }
  EXPECT_EQ(asked, 3);
}

TEST_F(Calibrated, WithoutTokensItIsDescribedAndRefused) {
  EXPECT_NE(plan_upcycle(recipe(0.01), options("moe")).text.find("from tokens, noise 0.01"),
            std::string::npos);
  try {
    run_in_threads(2, [&](Communicator& comm) { upcycle(recipe(0), options("moe"), comm); });
    ADD_FAILURE() << "was not refused";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(e.what()).find("--prompts"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(fs::exists(dir_.path() / "moe"));
}

TEST_F(Calibrated, TravelsAsBytes) {
  Calibration told = rows();
  told.layers[1].router_ED.clear();
  const Calibration again = calibration_from(to_bytes(told));
  ASSERT_EQ(again.layers.size(), told.layers.size());
  for (std::size_t layer = 0; layer < told.layers.size(); ++layer)
    EXPECT_EQ(again.layers[layer].router_ED, told.layers[layer].router_ED);
  EXPECT_THROW(calibration_from(to_bytes(told).substr(0, 100)), Error);
}

}  // namespace
}  // namespace upmoe
