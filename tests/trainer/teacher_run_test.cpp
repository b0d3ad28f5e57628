// Whole runs that learn from a teacher: stopped and started again they are the runs that were not, to the bit; what
// they write down, and what a resume says when the teacher or its share changed.

#include <gmock/gmock.h>

#include "tests/trainer/whole_run.h"
#include "trainer/resumption.h"

namespace upmoe {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::HasSubstr;

class TeacherRun : public test::WholeRun {
 protected:
  // A run directory is a model like any other.
  void SetUp() override {
    WholeRun::SetUp();
    run(config("teacher", 3, 1), 1);
  }
  RunConfig taught(const std::string& name, std::int64_t steps, int ep,
                   Precision precision = Precision::kFp32) const {
    RunConfig c = config(name, steps, ep, precision);
    c.run.seed = 5;  // other weights than the teacher's
    c.train.teacher.model = (dir_ / "teacher").string();
    c.train.teacher.temperature = 2;
    return c;
  }
  std::vector<nlohmann::json> lines_of(const std::string& file) const {
    std::vector<nlohmann::json> all;
    std::ifstream in(dir_ / file);
    for (std::string line; std::getline(in, line);) all.push_back(nlohmann::json::parse(line));
    return all;
  }
  std::vector<double> distilled(const std::string& name) const {
    std::vector<double> all;
    for (const nlohmann::json& line : lines_of(name + "/metrics.jsonl"))
      if (line.contains("distill_loss")) all.push_back(line["distill_loss"].get<double>());
    return all;
  }
  void expect_bitwise(int ranks, int ep, Precision precision) {
    run(taught("whole", 6, ep, precision), ranks);
    run(taught("parts", 2, ep, precision), ranks);
    run(taught("parts", 6, ep, precision), ranks);
    EXPECT_EQ(losses("whole"), losses("parts"));
    EXPECT_EQ(distilled("whole"), distilled("parts"));
    EXPECT_EQ(distilled("parts").size(), 6u);
    EXPECT_EQ(contents(checkpoint("whole", 6)), contents(checkpoint("parts", 6)));
  }
};

TEST_F(TeacherRun, ResumesBitwiseOnOneRank) {
  expect_bitwise(1, 1, Precision::kFp32);
}
TEST_F(TeacherRun, ResumesBitwiseOnTwoRanks) {
  expect_bitwise(2, 2, Precision::kFp32);
}
TEST_F(TeacherRun, ResumesBitwiseInBf16) {
  expect_bitwise(2, 1, Precision::kBf16);
}

TEST_F(TeacherRun, IsWrittenDown) {
  run(taught("run", 2, 1), 1);
  const nlohmann::json start = lines_of("run/starts.jsonl").front();
  EXPECT_EQ(start["teacher"]["source"], (dir_ / "teacher").string());
  EXPECT_EQ(start["teacher"]["digest"].get<std::string>().size(), 32u);
  EXPECT_EQ(start["teacher"]["type"], "qwen2_moe");
  EXPECT_EQ(start["teacher"]["weight"], 0.5);
  EXPECT_EQ(start["teacher"]["temperature"], 2.0);
  EXPECT_TRUE(lines_of("teacher/starts.jsonl").front()["teacher"].is_null());
  for (const nlohmann::json& line : lines_of("run/metrics.jsonl")) {
    EXPECT_GT(line["distill_loss"].get<double>(), 0);
    // A forward of the same shape beside a forward and a backward.
    EXPECT_NEAR(3 * line["flops_teacher"].get<double>(), line["flops"].get<double>(),
                0.02 * line["flops"].get<double>());
    EXPECT_DOUBLE_EQ(line["flops_computed"].get<double>(),
                     line["flops"].get<double>() + line["flops_teacher"].get<double>());
  }
  EXPECT_FALSE(lines_of("teacher/metrics.jsonl").front().contains("distill_loss"));
}

TEST_F(TeacherRun, AResumeSaysWhatChanged) {
  run(taught("run", 2, 1), 1);
  const auto lines = [&](const RunConfig& now) { return Resumption(checkpoint("run", 2), now).lines(); };
  RunConfig now = taught("run", 4, 1);
  now.train.teacher.weight = 0.25;
  now.train.teacher.temperature = 1;
  EXPECT_THAT(lines(now), Contains(HasSubstr("train.teacher.weight: 0.5 -> 0.25")));
  EXPECT_THAT(lines(now), Contains(HasSubstr("train.teacher.temperature: 2 -> 1")));
  now = taught("run", 4, 1);
  fs::copy(dir_ / "teacher", dir_ / "moved", fs::copy_options::recursive);
  now.train.teacher.model = (dir_ / "moved").string();
  EXPECT_THAT(lines(now),
              Contains(testing::AllOf(HasSubstr("train.teacher.model: "), HasSubstr("(the same model)"))));
  now = config("run", 4, 1);  // no teacher any more
  now.run.seed = 5;
  EXPECT_THAT(lines(now), Contains(HasSubstr("train.teacher.model: ")));
  run(config("teacher", 5, 1), 1);  // it trained on
  EXPECT_THAT(lines(taught("run", 4, 1)), Contains(HasSubstr("holds another model")));
}

TEST_F(TeacherRun, AStageOfAPipelineIsRefused) {
  RunConfig c = taught("run", 2, 1);
  c.parallel.pp = 2;
  try {
    run_in_threads(2, [&](Communicator& world) { train(c, world, {}); });
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_THAT(e.what(), HasSubstr("train.teacher: parallel.pp is 2"));
  }
}

}  // namespace
}  // namespace upmoe
