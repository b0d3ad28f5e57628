// What upcycle_report.json says of how far a mixture begins from its source.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "parallel/thread_comm.h"
#include "tests/support/tiny_dense.h"
#include "upcycle/upcycler.h"

namespace upmoe {
namespace {

using namespace test;
namespace fs = std::filesystem;

class Report : public ::testing::Test {
 protected:
  void SetUp() override { write_tiny_dense(dir_.path() / "dense", {}); }
  UpcycleOptions options(const std::string& to) const {
    UpcycleOptions o;
    o.from = dir_.path() / "dense";
    o.to = dir_.path() / to;
    o.threads = 1;
    o.progress = false;
    return o;
  }
  static nlohmann::json report_of(const UpcycleConfig& config, const UpcycleOptions& o) {
    run_in_threads(2, [&](Communicator& comm) { upcycle(config, o, comm); });
    std::ifstream in(o.to / "upcycle_report.json");
    return nlohmann::json::parse(in);
  }
  TemporaryDirectory dir_;
};

// A recipe that begins further from its source than nothing would says so.
TEST_F(Report, ErrorsAbove1AreRemarkedOn) {
  EXPECT_FALSE(report_of(tiny_recipe(), options("near")).contains("remark"));
  UpcycleConfig far = tiny_recipe();
  far.shared.scale = 5;  // 2 keeps the function: off by 1.5 times it
  EXPECT_TRUE(report_of(far, options("far")).contains("remark"));
}

// What is found on tokens stands beside; it is looked for in the whole folder, before that has its name.
TEST_F(Report, TellsWhatWasFoundOnTokens) {
  UpcycleOptions o = options("moe");
  EXPECT_FALSE(report_of(tiny_recipe(), o).contains("step_zero"));
  o.to = dir_.path() / "checked";
  fs::path seen;
  int calls = 0;
  o.check = [&](const fs::path& made) {
    seen = made;
    ++calls;
    EXPECT_EQ(HfModel(made).config().num_experts, 60);
    EXPECT_FALSE(fs::exists(o.to));
    return StepZero{4.25, 4.0, 0.125, 64, 32};
  };
  const nlohmann::json zero = report_of(tiny_recipe(), o).at("step_zero");
  EXPECT_EQ(calls, 1);
  EXPECT_NE(seen, o.to);
  EXPECT_EQ(zero.at("loss"), 4.25);
  EXPECT_EQ(zero.at("source_loss"), 4.0);
  EXPECT_EQ(zero.at("kl_source_mixture"), 0.125);
  EXPECT_EQ(zero.at("tokens"), 64);
  EXPECT_EQ(zero.at("seq_len"), 32);
}

}  // namespace
}  // namespace upmoe
