// The parts of a run: pieces that are made and written at the same time, checksums put together.

#include "upcycle/write_pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "data/crc.h"
#include "kernels/core/check.h"
#include "upcycle/source_survey.h"

namespace upmoe {
namespace {

TEST(Pipeline, WritesEveryPieceOnceAndStopsOnErrors) {
  for (const int threads : {1, 4}) {
    std::vector<int> written(100, 0);
    PipelineStages stages;
    stages.make = [](std::size_t i, std::span<std::byte> buffer) {
      std::fill_n(buffer.begin(), i % 7, std::byte(i));
      return i % 7;
    };
    stages.write = [&](std::size_t i, std::span<const std::byte> bytes) {
      EXPECT_EQ(bytes.size(), i % 7);
      EXPECT_EQ(bytes[0], std::byte(i));
      ++written[i];
    };
    run_pipeline(written.size(), threads, 7, stages);
    for (std::size_t i = 0; i < written.size(); ++i) EXPECT_EQ(written[i], i % 7 == 0 ? 0 : 1) << i;

    PipelineStages bad_make = stages;
    bad_make.make = [](std::size_t i, std::span<std::byte>) {
      if (i == 30) fail(ExitCode::kBadInput, "no piece 30");
      return std::size_t{0};
    };
    EXPECT_THROW(run_pipeline(100, threads, 7, bad_make), Error);
    PipelineStages bad_write = stages;
    bad_write.write = [](std::size_t, std::span<const std::byte>) { fail(ExitCode::kBadInput, "disk full"); };
    EXPECT_THROW(run_pipeline(100, threads, 7, bad_write), Error);
  }
  run_pipeline(0, 2, 7, {});
}

TEST(SourceSurvey, CombinesChecksums) {
  const std::string text = "the quick brown fox jumps over the lazy dog";
  for (std::size_t cut = 0; cut <= text.size(); ++cut) {
    const std::uint32_t first = crc32c(text.data(), cut),
                        second = crc32c(text.data() + cut, text.size() - cut);
    EXPECT_EQ(combine_crc32c(first, second, text.size() - cut), crc32c(text.data(), text.size())) << cut;
  }
}

}  // namespace
}  // namespace upmoe
