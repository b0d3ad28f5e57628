#include "kernels/ops/transfer.h"

#include <gtest/gtest.h>

#include <numeric>

#include "kernels/ops/pointwise.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

TEST(Transfer, ThereAndBack) {
  OpExec ex;
  for (const std::size_t n : {0, 1, 1000, 100'000}) {
    std::vector<float> sent(n), received(n, -1);
    std::iota(sent.begin(), sent.end(), 0.5f);
    const Shape shape{static_cast<std::int64_t>(n)};
    const Buffer memory = Buffer::allocate(test_exec().device, n * sizeof(float) + 4);
    const TensorView on_device = memory.view(shape, DType::kF32);
    ops::upload(ex, on_device, host_view(static_cast<const float*>(sent.data()), shape));
    const std::vector<float> expected = sent;
    std::fill(sent.begin(), sent.end(), NAN);  // the host's memory is free again
    ops::download(ex, host_view(received.data(), shape), on_device);
    EXPECT_EQ(received, expected);
  }
}

// The values are those of the moment in which they set out, whatever the device is given behind it.
TEST(Transfer, LandsAsItSetOut) {
  OpExec ex;
  ops::Landing landing;
  for (const std::int64_t n : {std::int64_t{0}, std::int64_t{100'000}, std::int64_t{7}}) {
    HostTensor x = random_tensor({n}, DType::kF32, 3);
    const std::vector<double> expected = x.values();
    landing.start(ex, x);
    ops::fill(ex, x, 5.0f);
    const ConstTensorView landed = landing.wait();
    ASSERT_EQ(landed.shape, (Shape{n}));
    EXPECT_EQ(landed.device, Device{});
    for (std::int64_t i = 0; i < n; ++i)
      ASSERT_EQ(static_cast<double>(landed.as<float>()[i]), expected[static_cast<std::size_t>(i)]) << i;
    finish_ops();
  }
}

TEST(Transfer, WritesThroughTheHost) {
  OpExec ex;
  HostTensor x({3, 5}, DType::kI32);
  ops::write_through_host(ex, x, [](TensorView host) {
    EXPECT_EQ(host.device, Device{});
    std::iota(host.as<std::int32_t>(), host.as<std::int32_t>() + 15, 7);
  });
  for (std::size_t i = 0; i < 15; ++i) EXPECT_EQ(x.get(i), static_cast<double>(7 + i));
}

TEST(Transfer, RefusesWrongTensors) {
  OpExec ex;
  HostTensor x({4}, DType::kF32);
  std::vector<float> host(5);
  EXPECT_THROW(ops::upload(ex, x, host_view(static_cast<const float*>(host.data()), {5})), Error);
  EXPECT_THROW(ops::download(ex, host_view(host.data(), {5}), x), Error);
  TensorView nowhere = host_view(host.data(), {4});
  nowhere.device.type = DeviceType::kDry;
  EXPECT_THROW(ops::download(ex, nowhere, x), Error);
}

TEST(Transfer, DryDoesNothing) {
  OpExec ex(DeviceType::kDry);
  std::vector<float> host(4, 3.0f);
  ops::upload(ex, dry_tensor({4}, DType::kF32), host_view(static_cast<const float*>(host.data()), {4}));
  ops::download(ex, host_view(host.data(), {4}), dry_tensor({4}, DType::kF32));
  ops::write_through_host(ex, dry_tensor({4}, DType::kF32), [](TensorView) { FAIL(); });
  ops::Landing landing;
  landing.start(ex, dry_tensor({4}, DType::kF32));
  EXPECT_EQ(landing.wait().shape, (Shape{4}));
  EXPECT_EQ(host, std::vector<float>(4, 3.0f));
  expect_booked(ex.ledger(), "upload", 0, 16, 16);
}

}  // namespace
}  // namespace upmoe::test
