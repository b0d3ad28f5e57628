// A program on a processor that lacks what it was compiled for ends with 71 and says so, before any code that
// was compiled for more than it runs.

#include "kernels/core/processor.h"

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

ProcessorFeatures bit(ProcessorFeature feature) {
  return ProcessorFeatures{1} << static_cast<unsigned>(feature);
}

std::string names_of(ProcessorFeatures features) {
  std::array<char, 512> text{};
  write_feature_names(features, text.data(), text.size());
  return text.data();
}

std::set<std::string> words_of(const std::string& text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

TEST(Processor, MissingIsWhatWasCompiledForAndIsNotThere) {
  const ProcessorFeatures avx2 = bit(ProcessorFeature::kAvx2), fma = bit(ProcessorFeature::kFma),
                          bf16 = bit(ProcessorFeature::kAvx512bf16);
  EXPECT_EQ(missing_features(avx2 | fma, avx2 | fma | bf16), 0u);
  EXPECT_EQ(missing_features(avx2 | fma | bf16, avx2), fma | bf16);
  EXPECT_EQ(names_of(fma | bf16), "fma avx512bf16");
  EXPECT_EQ(names_of(0), "");
  std::array<char, 6> narrow{};
  write_feature_names(fma | bf16, narrow.data(), narrow.size());
  EXPECT_STREQ(narrow.data(), "fma a");
}

TEST(Processor, HasWhatThisProgramWasCompiledFor) {
  EXPECT_EQ(names_of(missing_features(kCompiledFeatures, processor_features())), "");
}

// Linux reads the same registers and knows other names.
TEST(Processor, FeaturesAreThoseOfTheKernel) {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (line.rfind("flags", 0) != 0)
    if (!std::getline(file, line)) GTEST_SKIP() << "/proc/cpuinfo names no flags";
  const std::set<std::string> flags = words_of(line.substr(line.find(':') + 1));
  const std::map<std::string, std::string> others{{"sse3", "pni"},
                                                  {"sse4.1", "sse4_1"},
                                                  {"sse4.2", "sse4_2"},
                                                  {"lzcnt", "abm"},
                                                  {"bmi", "bmi1"},
                                                  {"avx512vbmi2", "avx512_vbmi2"},
                                                  {"avx512vnni", "avx512_vnni"},
                                                  {"avx512bitalg", "avx512_bitalg"},
                                                  {"avx512vpopcntdq", "avx512_vpopcntdq"},
                                                  {"avx512bf16", "avx512_bf16"},
                                                  {"avx512fp16", "avx512_fp16"},
                                                  {"avxvnni", "avx_vnni"},
                                                  {"apxf", "apx"}};
  std::set<std::string> expected;
  for (unsigned i = 0; i < static_cast<unsigned>(ProcessorFeature::kCount); ++i) {
    const std::string name = names_of(ProcessorFeatures{1} << i);
    const auto other = others.find(name);
    if (flags.count(other == others.end() ? name : other->second) > 0) expected.insert(name);
  }
  EXPECT_EQ(words_of(names_of(processor_features())), expected);
}

struct Ended {
  int status;
  std::string output;
};

Ended run_program(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  for (int c; (c = std::fgetc(pipe)) != EOF;) output += static_cast<char>(c);
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), output};
}

// foreign_program is compiled for xop and avx512f, which no processor has both, and its static initialiser is
// an illegal instruction.
TEST(Processor, AProgramForAnotherOneSaysSoAndEndsWith71) {
  const Ended ended = run_program(FOREIGN_PROGRAM);
  EXPECT_EQ(ended.status, static_cast<int>(ExitCode::kDevice));
  EXPECT_EQ(ended.output.rfind("foreign_program: error: ", 0), 0u) << ended.output;
  EXPECT_NE(ended.output.find(" xop"), std::string::npos) << ended.output;
  EXPECT_NE(ended.output.find("./launch/setup.sh"), std::string::npos) << ended.output;
}

TEST(Processor, OneRankOfAHostSaysIt) {
  EXPECT_NE(run_program("OMPI_COMM_WORLD_LOCAL_RANK=0 " FOREIGN_PROGRAM).output, "");
  const Ended silent = run_program("OMPI_COMM_WORLD_LOCAL_RANK=1 " FOREIGN_PROGRAM);
  EXPECT_EQ(silent.status, static_cast<int>(ExitCode::kDevice));
  EXPECT_EQ(silent.output, "");
}

}  // namespace
}  // namespace upmoe
