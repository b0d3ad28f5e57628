// train.teacher: a section inside a section, its ranges, and what it says when it is asked for in vain.

#include "configs/teacher_record.h"

#include <gmock/gmock.h>

namespace upmoe {
namespace {

using testing::Contains;
using testing::HasSubstr;

const std::string kRun = R"(run: {dir: r}
model: {path: m}
data: {train: t.h5, seq_len: 16}
train:
  steps: 3
  global_batch: 4
  micro_batch: 2
)";

RunConfig parsed(const std::string& more, const std::vector<std::string>& overrides = {}) {
  return parse_run_config(kRun + more, "r.yaml", overrides);
}

std::string refused(const std::string& more, const std::vector<std::string>& overrides = {}) {
  try {
    parsed(more, overrides);
    return "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
}

TEST(TeacherKeys, AreReadFromTheirSection) {
  EXPECT_FALSE(parsed("").train.teacher.given());
  const RunConfig run = parsed("  teacher: {model: dense, weight: 0.25, temperature: 4}\n");
  EXPECT_EQ(run.train.teacher.model, "dense");
  EXPECT_EQ(run.train.teacher.weight, 0.25);
  EXPECT_EQ(run.train.teacher.temperature, 4);
  EXPECT_EQ(run.train.steps, 3);
  const RunConfig other =
      parsed("  teacher: {model: dense}\n", {"train.teacher.weight=1", "train.teacher.model=d2"});
  EXPECT_EQ(other.train.teacher.model, "d2");
  EXPECT_EQ(other.train.teacher.weight, 1);
  EXPECT_EQ(other.train.teacher.temperature, 1);
}

TEST(TeacherKeys, ComeBackAsTheyWereWritten) {
  const RunConfig run = parsed("  teacher: {model: dense, weight: 0.25}\n");
  const std::string yaml = to_yaml(run);
  EXPECT_THAT(yaml, HasSubstr("  nonfinite_patience: 3\n  teacher:\n    model: dense\n    weight: 0.25\n"
                              "    temperature: 1\noptimizer:\n"));
  EXPECT_EQ(to_yaml(parse_run_config(yaml, "again.yaml", {})), yaml);
}

TEST(TeacherKeys, AreRefusedInWords) {
  EXPECT_THAT(refused("  teacher: {weight: 0}\n"),
              testing::AllOf(HasSubstr("r.yaml:8:"), HasSubstr("train.teacher.weight")));
  EXPECT_THAT(refused("  teacher: {weight: 1.5}\n"), HasSubstr("train.teacher.weight"));
  EXPECT_THAT(refused("  teacher: {temperature: 0}\n"), HasSubstr("train.teacher.temperature"));
  EXPECT_THAT(refused("  teacher: {modle: x}\n"),
              HasSubstr("unknown key 'train.teacher.modle'; did you mean train.teacher.model?"));
  EXPECT_THAT(refused("  teacher: dense\n"), HasSubstr("train.teacher: is a section"));
  EXPECT_THAT(refused("  techer: {model: x}\n"), HasSubstr("did you mean train.teacher?"));
  EXPECT_THAT(refused("", {"train.teacher=dense"}), HasSubstr("is a section; write train.teacher.key=value"));
  EXPECT_THAT(refused("", {"train.teacher.wieght=1"}), HasSubstr("did you mean train.teacher.weight?"));
}

TEST(TeacherKeys, WithoutATeacherHaveNoEffect) {
  const RunConfig run = parsed("  teacher: {weight: 0.25}\n");
  EXPECT_THAT(run.notes, Contains(HasSubstr("train.teacher.weight: 0.25 has no effect")));
  EXPECT_THAT(parsed("  teacher: {model: dense, weight: 0.25}\n").notes, testing::IsEmpty());
}

TEST(TeacherKeys, TheShippedRunHasOne) {
  const RunConfig run = read_run_config(std::string(UPMOE_SOURCE_DIR) + "/configs/distillation/moe.yaml", {});
  EXPECT_EQ(run.train.teacher.model, "runs/quickstart/models/dense");
  EXPECT_THAT(run.notes, testing::IsEmpty());
  RunConfig plain = run;
  plain.train.teacher = {};
  plain.run.dir = "runs/quickstart/moe";
  EXPECT_EQ(to_yaml(plain),
            to_yaml(read_run_config(std::string(UPMOE_SOURCE_DIR) + "/configs/quickstart/moe.yaml", {})));
}

TEST(TeacherRun, HasTheMeshWithoutExpertsForADenseModel) {
  RunConfig run = parsed("  teacher: {model: dense}\n");
  run.parallel.tp = 2;
  run.parallel.ep = 4;
  run.parallel.etp = 2;
  run.freeze = {"@router"};
  ModelConfig teacher;
  teacher.num_experts = 0;
  run.train.teacher.config = std::make_shared<const ModelConfig>(teacher);
  RunConfig own = run_of_teacher(run);
  EXPECT_EQ(own.parallel.tp, 2);
  EXPECT_EQ(own.parallel.ep, 1);
  EXPECT_EQ(own.parallel.etp, 1);
  EXPECT_TRUE(own.freeze.empty());
  EXPECT_FALSE(own.train.teacher.given());
}

}  // namespace
}  // namespace upmoe
