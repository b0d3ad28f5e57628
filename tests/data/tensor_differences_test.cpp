#include "data/tensor_differences.h"

#include <gmock/gmock.h>

#include "kernels/core/check.h"

namespace upmoe::test {
namespace {

using ::testing::EndsWith;

std::string told(const TensorDifferences& differences) {
  try {
    differences.throw_if_any("dir: another model");
    return "nothing";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    return e.what();
  }
}

TEST(TensorDifferences, EachIsToldOnALineOfItsOwn) {
  TensorDifferences found;
  const SafetensorsEntry right{"a", "F16", {2, 3}, 0, 12}, wrong{"b", "I64", {3}, 0, 24};
  found.expect("a", {2, 3}, &right);
  EXPECT_EQ(told(found), "nothing");
  found.expect("b", {2, 3}, &wrong);
  found.expect("c", {1}, nullptr);
  found.add("d", "no part of it");
  EXPECT_EQ(told(found),
            "dir: another model:\n"
            "  b: shape [3], expected [2, 3]\n"
            "  b: dtype I64, expected BF16, F32 or F16; save it in one of them\n"
            "  c: missing\n"
            "  d: no part of it");
  EXPECT_TRUE(found.expects("c"));
  EXPECT_FALSE(found.expects("d"));
}

TEST(TensorDifferences, OfManyTheFirstAreTold) {
  TensorDifferences found;
  for (int i = 1; i <= 20; ++i) found.expect("t" + std::to_string(i), {1}, nullptr);
  EXPECT_THAT(told(found), EndsWith("\n  t20: missing"));
  for (int i = 21; i <= 23; ++i) found.expect("t" + std::to_string(i), {1}, nullptr);
  EXPECT_THAT(told(found), EndsWith("\n  t20: missing\n  and 3 more"));
}

}  // namespace
}  // namespace upmoe::test
