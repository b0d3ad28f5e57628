#include "configs/expert_variants.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "configs/timed_tables.h"
#include "kernels/core/check.h"
#include "tests/support/temporary_directory.h"

namespace upmoe {
namespace {

using testing::HasSubstr;

const std::string kDevice = "NVIDIA H200";
const ExpertProductShape kShape{ExpertKernel::kUp, 60, 2048, 1408, 131072};
const ExpertVariant kSingle{1, 4}, kColumns{2, 4, TileOrder::kColumns}, kLagging{2, 4, TileOrder::kRows, 2};

ExpertProductShape with_rows(std::int64_t rows, ExpertKernel kernel = ExpertKernel::kUp) {
  ExpertProductShape shape = kShape;
  shape.rows = rows;
  shape.kernel = kernel;
  return shape;
}
ExpertVariants example() {
  return {{{kDevice,
            {{kShape, kLagging},
             {with_rows(32768), kSingle},
             {with_rows(131072, ExpertKernel::kDwDown), kColumns}}},
           {"NVIDIA H100 80GB HBM3", {{kShape, kColumns}}}}};
}

TEST(ExpertVariants, TheFirstOfAKernelIsTakenWithoutATable) {
  for (int i = 0; i < kExpertKernels; ++i) {
    ExpertProductShape shape = kShape;
    shape.kernel = static_cast<ExpertKernel>(i);
    EXPECT_EQ(choose({}, kDevice, shape), variants_of(shape.kernel)[0]) << words_of(shape);
  }
}

TEST(ExpertVariants, ChooseByDeviceKernelAndShape) {
  const ExpertVariants table = example();
  EXPECT_EQ(choose(table, kDevice, kShape), kLagging);
  EXPECT_EQ(choose(table, "NVIDIA H100 80GB HBM3", kShape), kColumns);
  EXPECT_EQ(choose(table, "NVIDIA H20", kShape), ExpertVariant{});
  EXPECT_EQ(choose(table, kDevice, with_rows(131072, ExpertKernel::kDwDown)), kColumns);
  EXPECT_EQ(choose(table, kDevice, with_rows(131072, ExpertKernel::kDown)), ExpertVariant{});
  for (auto member :
       {&ExpertProductShape::experts, &ExpertProductShape::width, &ExpertProductShape::neurons}) {
    ExpertProductShape other = kShape;
    other.*member *= 2;
    EXPECT_EQ(choose(table, kDevice, other), ExpertVariant{}) << words_of(other);
  }
}

TEST(ExpertVariants, ChooseByTheNearestNumberOfRows) {
  const ExpertVariants table = example();
  const auto variant = [&](std::int64_t rows) { return choose(table, kDevice, with_rows(rows)); };
  EXPECT_EQ(variant(32768), kSingle);
  EXPECT_EQ(variant(65535), kSingle) << "nearer, as a ratio, to half of them than to twice";
  EXPECT_EQ(variant(65537), kLagging);
  EXPECT_EQ(variant(16384), kSingle);
  EXPECT_EQ(variant(16383), ExpertVariant{}) << "too far from any";
  EXPECT_EQ(variant(262144), kLagging);
  EXPECT_EQ(variant(262145), ExpertVariant{});
  EXPECT_EQ(variant(0), ExpertVariant{});
}

TEST(ExpertVariants, PairsOfColumnsAreForWidthsThatHaveThem) {
  ExpertProductShape shape{ExpertKernel::kDwGateUp, 8, 768, 128, 100};
  EXPECT_EQ(choose({}, kDevice, shape), (ExpertVariant{1, 4}));
  shape.kernel = ExpertKernel::kUp;
  EXPECT_EQ(choose({}, kDevice, shape), (ExpertVariant{2, 4})) << "its pairs share columns";
}

TEST(ExpertVariants, ThoseOfAKernelDifferInOneThingFromTheFirst) {
  for (int i = 0; i < kExpertKernels; ++i) {
    const auto all = variants_of(static_cast<ExpertKernel>(i));
    EXPECT_EQ(std::set<ExpertVariant>(all.begin(), all.end()).size(), all.size());
    for (const ExpertVariant& v : all.subspan(1)) {
      const ExpertVariant& f = all[0];
      EXPECT_EQ((v.blocks != f.blocks) + (v.stages != f.stages) + (v.order != f.order) + (v.lag != f.lag), 1)
          << words_of(v);
    }
  }
}

TEST(ExpertVariants, AVariantThatIsNotCompiledIsAnErrorInWords) {
  const ExpertVariants table{{{kDevice, {{kShape, ExpertVariant{2, 7}}}}}};
  try {
    choose(table, kDevice, with_rows(131000));
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_THAT(e.what(), HasSubstr("expert_variants.yaml"));
    EXPECT_THAT(
        e.what(),
        HasSubstr("up of 60 experts of 1408 neurons, width 2048, 131072 rows: clusters of 2, 7 stages, "
                  "rows first, lag 0: not among the variants of this program"));
  }
  EXPECT_EQ(choose(table, "another", kShape), ExpertVariant{}) << "of a device that is not here";
}

TEST(ExpertVariants, ReadsWhatItWrites) {
  const ExpertVariants table = example();
  EXPECT_EQ(parse_expert_variants(to_yaml(table), "table").tables, table.tables);
  EXPECT_TRUE(parse_expert_variants(to_yaml({}), "table").tables.empty());
  const ExpertVariants none_better{{{kDevice, {}}}};
  EXPECT_EQ(parse_expert_variants(to_yaml(none_better), "table").tables, none_better.tables);
}

TEST(ExpertVariants, TheCommittedTableIsWhole) {
  std::ifstream file(UPMOE_SOURCE_DIR "/configs/cuda/expert_variants.yaml");
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  EXPECT_EQ(to_yaml(committed_expert_variants()), text) << "as the tool writes it";
}

std::string problem_of(const std::string& yaml) {
  try {
    parse_expert_variants(yaml, "table.yaml");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    return e.what();
  }
  return {};
}
std::string with_kernels(const std::string& kernels) {
  return "tables:\n  - device: NVIDIA H200\n    kernels:\n      - " + kernels + "\n";
}

TEST(ExpertVariants, ADamagedTableIsAnErrorInWords) {
  const std::string shape = "experts: 60, width: 768, neurons: 1408, rows: 9",
                    pair = ", blocks: 2, stages: 4, order: rows, lag: 0}",
                    single = ", blocks: 1, stages: 4, order: rows, lag: 0}";
  EXPECT_EQ(problem_of(with_kernels("{kernel: up, " + shape + pair)), "");
  EXPECT_EQ(problem_of(with_kernels("{kernel: dw_down, " + shape + single)), "");
  EXPECT_THAT(problem_of(""), HasSubstr("table.yaml"));
  EXPECT_THAT(problem_of("tables: 3\n"), HasSubstr("tables: not a list"));
  EXPECT_THAT(problem_of("tables: [\n"), HasSubstr("table.yaml"));
  EXPECT_THAT(problem_of("tables: []\nmore: 1\n"), HasSubstr("more"));
  EXPECT_THAT(problem_of("tables:\n  - kernels: []\n"), HasSubstr("device"));
  EXPECT_THAT(problem_of("tables:\n  - device: NVIDIA H200\n"), HasSubstr("kernels"));
  EXPECT_THAT(problem_of("tables:\n  - device: NVIDIA H200\n    kernels: 3\n"),
              HasSubstr("kernels: not a list"));
  EXPECT_THAT(problem_of("tables:\n  - {device: A, kernels: []}\n  - {device: A, kernels: []}\n"),
              HasSubstr("a second table for A"));
  EXPECT_THAT(problem_of(with_kernels("{kernel: up, " + shape + "}")), HasSubstr("blocks"));
  EXPECT_THAT(problem_of(with_kernels("{kernel: left, " + shape + pair)),
              HasSubstr("'left' is none of up, down, dx, dhidden, dw_gate_up, dw_down"));
  EXPECT_THAT(problem_of(with_kernels("{kernel: up, " + shape + ", blocks: 2, stages: 4, order: x, lag: 0}")),
              HasSubstr("'x' is none of rows, columns"));
  EXPECT_THAT(problem_of(with_kernels("{kernel: up, experts: 0" + shape.substr(11) + pair)),
              HasSubstr("experts: "));
  EXPECT_THAT(
      problem_of(with_kernels("{kernel: up, " + shape + ", blocks: 3, stages: 4, order: rows, lag: 0}")),
      HasSubstr("clusters of 3, 4 stages, rows first, lag 0: not among the variants"));
  EXPECT_THAT(
      problem_of(with_kernels("{kernel: down, " + shape + ", blocks: 2, stages: 4, order: rows, lag: 2}")),
      HasSubstr("lag 2: not among the variants"));
  EXPECT_THAT(problem_of(with_kernels("{kernel: dw_down, " + shape + pair)),
              HasSubstr("the width, 768, is no multiple of 512"));
  EXPECT_THAT(
      problem_of(with_kernels("{kernel: up, " + shape + pair + "\n      - {kernel: up, " + shape + single)),
      HasSubstr("table.yaml:5:9: a second line for up of 60 experts"));
}

TEST(ExpertVariants, ATableThatCannotBeWrittenIsAnErrorInWords) {
  const test::TemporaryDirectory folder;
  for (const auto& file : {folder.path(), folder.path() / "no such folder" / "table.yaml"}) {
    try {
      write_timed_tables(file, "tables: []\n");
      FAIL() << file;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), HasSubstr(file.string() + ": cannot be written"));
    }
  }
}

}  // namespace
}  // namespace upmoe
