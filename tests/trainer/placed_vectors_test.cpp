#include "trainer/placed_vectors.h"

#include <gtest/gtest.h>

#include "tests/support/op_exec.h"

namespace upmoe::test {
namespace {

using Vector = std::vector<std::int32_t>;

Vector read(Exec& ex, const ConstTensorView& view) {
  Vector values(static_cast<std::size_t>(view.elements()));
  ops::download(ex, host_view(values.data(), view.shape), view);
  return values;
}

// More of them, fewer, an empty one between others: each view has its vector's values, whatever stood there before.
TEST(PlacedVectors, GiveEachVectorItsView) {
  OpExec ex;
  PlacedVectors placed;
  for (const std::int32_t n : {5, 3000, 2, 0}) {
    const Vector first(static_cast<std::size_t>(n), 7), none, last = {n, n + 1, n + 2};
    ConstTensorView first_N, none_0, last_3;
    const PlacedVectors::Part parts[] = {{first, first_N}, {none, none_0}, {last, last_3}};
    placed.place(ex, parts);
    for (const auto& [values, view] : parts) {
      EXPECT_EQ(view.shape, Shape{static_cast<std::int64_t>(values.size())});
      EXPECT_EQ(view.dtype, DType::kI32);
      EXPECT_EQ(view.device.type, test_device());
      EXPECT_EQ(read(ex, view), values) << n;
    }
  }
}

// The host's ops read the vectors themselves.
TEST(PlacedVectors, AreNotCopiedOnTheHost) {
  OpExec ex(DeviceType::kCpu);
  const Vector values = {1, 2, 3};
  ConstTensorView view;
  const PlacedVectors::Part part{values, view};
  PlacedVectors placed;
  placed.place(ex, {&part, 1});
  EXPECT_EQ(view.as<std::int32_t>(), values.data());
}

}  // namespace
}  // namespace upmoe::test
