// Devices, memory and streams of the CUDA backend, on pretended GPUs.

#include "kernels/core/gpu.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/ops/embedding.h"
#include "kernels/ops/pointwise.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

using testing::HasSubstr;

class Gpu : public testing::Test {
 protected:
  void SetUp() override {
    fake_cuda::set_devices(8);
    gpu::use(0);
  }
  void TearDown() override {
    fake_cuda::set_devices(8);
    fake_cuda::set_memory(std::size_t{64} << 30);
  }
  template <class Body>
  static std::string error_of(const Body& body, ExitCode code) {
    try {
      body();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return {};
  }
};

TEST_F(Gpu, SaysWhyThereIsNone) {
  EXPECT_EQ(gpu::count(), 8);
  EXPECT_EQ(gpu::why_none(), "");
  fake_cuda::set_devices(0);
  EXPECT_EQ(gpu::count(), 0);
  EXPECT_THAT(error_of([] { gpu::use(0); }, ExitCode::kDevice), HasSubstr("shows no GPU"));
  fake_cuda::set_devices(-1);
  EXPECT_EQ(gpu::count(), 0);
  EXPECT_THAT(error_of([] { gpu::use(0); }, ExitCode::kDevice), HasSubstr("no NVIDIA driver"));
}

// Code for one architecture's own instructions runs on no other one of its family: 10.3 would start, and find no kernel
// at the first launch.
TEST_F(Gpu, CodeOfOneArchitectureRunsOnThatAlone) {
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {8, 9}, {9, 0}, {10, 0}}) {
    fake_cuda::set_devices(1, major, minor);
    EXPECT_NO_THROW(gpu::use(0)) << major << '.' << minor;
  }
  for (const auto& [major, minor] : {std::pair{9, 1}, {10, 3}, {12, 0}, {11, 0}}) {
    fake_cuda::set_devices(1, major, minor);
    EXPECT_THAT(error_of([] { gpu::use(0); }, ExitCode::kDevice),
                HasSubstr(fmt::format("compute capability {}.{}", major, minor)));
  }
}

TEST_F(Gpu, RefusesWhatItWasNotCompiledFor) {
  EXPECT_THAT(error_of([] { gpu::use(8); }, ExitCode::kDevice),
              HasSubstr("as many ranks on a host as it has GPUs"));
  fake_cuda::set_devices(2, 7, 5);
  const std::string message = error_of([] { gpu::use(1); }, ExitCode::kDevice);
  EXPECT_THAT(message, HasSubstr("compute capability 7.5"));
  EXPECT_THAT(message, HasSubstr("compiled for compute capability 8.0 and later 8.x, 9.0 alone, 10.0 alone"));
  EXPECT_THAT(message, HasSubstr("UPMOE_CUDA_TARGETS=75"));
}

TEST_F(Gpu, MemoryIsZeroAndGivenBack) {
  const std::size_t before = fake_cuda::allocated();
  {
    const Buffer b = Buffer::allocate({DeviceType::kCuda, 0}, 1000, "some weights");
    for (std::size_t i = 0; i < 1000; ++i) ASSERT_EQ(b.data()[i], std::byte{0});
    EXPECT_EQ(fake_cuda::allocated(), before + 1000);
  }
  EXPECT_EQ(fake_cuda::allocated(), before);
}

TEST_F(Gpu, OutOfMemoryNamesRequestFreeAndTheLargest) {
  const Buffer weights = Buffer::allocate({DeviceType::kCuda, 0}, 5'000'000, "parameters"),
               state = Buffer::allocate({DeviceType::kCuda, 0}, 9'000'000, "optimizer state");
  fake_cuda::set_memory(fake_cuda::allocated() + 1'000'000);
  const std::string message = error_of(
      [] {
        Buffer::allocate({DeviceType::kCuda, 0}, 2'000'000, "gradients");
      },
      ExitCode::kFailure);
  EXPECT_THAT(message, HasSubstr("'gradients' asks for 2000000 bytes, 1000000 of "));
  EXPECT_LT(message.find("9000000 bytes  optimizer state"), message.find("5000000 bytes  parameters"));
  EXPECT_THAT(message, HasSubstr("train.recompute"));
}

TEST_F(Gpu, MemoryOfTheHostTakesNoneOfTheGpus) {
  const std::size_t before = fake_cuda::allocated();
  const Device device{DeviceType::kCuda, 0};
  const Buffer state = Buffer::allocate_on_host(device, 1000, "optimizer state");
  EXPECT_EQ(fake_cuda::allocated(), before);
  EXPECT_EQ(state.view({250}, DType::kF32).device, device) << "kernels take it as their own";
  EXPECT_EQ(state.view({250}, DType::kF32).as<float>()[249], 0.0f);
  fake_cuda::fail_next("cudaHostAlloc", 2);  // out of memory
  const std::string message =
      error_of([&] { Buffer::allocate_on_host(device, 1000, "optimizer state"); }, ExitCode::kFailure);
  EXPECT_THAT(message, HasSubstr("'optimizer state' asks for 1000 bytes that stay in place (pinned)"));
}

TEST_F(Gpu, AnArenaGrowsInPlace) {
  const std::size_t before = fake_cuda::allocated();
  {
    Arena arena({DeviceType::kCuda, 0}, std::size_t{1} << 40, "activations");
    EXPECT_EQ(fake_cuda::allocated(), before) << "a reservation is addresses alone";
    const TensorView first = arena.take({1000}, DType::kF32, "first");
    const std::size_t small = fake_cuda::allocated() - before;
    EXPECT_LE(small, std::size_t{2} << 20);
    first.as<float>()[999] = 4;
    const TensorView second = arena.take({30 << 20}, DType::kBF16, "second");
    second.as<bf16>()[(30 << 20) - 1] = to_bf16(3);
    EXPECT_EQ(first.as<float>()[999], 4) << "what is there does not move";
    const std::size_t grown = fake_cuda::allocated() - before;
    EXPECT_GE(grown, std::size_t{60} << 20);
    arena.rewind(0);
    arena.take({30 << 20}, DType::kBF16, "again");
    EXPECT_EQ(fake_cuda::allocated() - before, grown) << "memory is kept for the next step";
  }
  EXPECT_EQ(fake_cuda::allocated(), before);
}

// Near the limit what one arena has too much another one, or a library, has too little.
TEST_F(Gpu, ALargeArenaGrowsByLittle) {
  Arena arena({DeviceType::kCuda, 0}, std::size_t{1} << 40, "activations");
  arena.take({std::int64_t{12} << 30}, DType::kBF16, "twenty-four gibibytes");
  const std::size_t before = fake_cuda::allocated();
  arena.take({1 << 20}, DType::kBF16, "a little more");
  const std::size_t grown = fake_cuda::allocated() - before;
  EXPECT_GT(grown, std::size_t{64} << 20) << "not piece by piece";
  EXPECT_LE(grown, std::size_t{512} << 20);
}

TEST_F(Gpu, AnArenaOutOfMemoryNamesItsUsers) {
  Arena arena({DeviceType::kCuda, 0}, std::size_t{1} << 40, "activations");
  arena.take({10 << 20}, DType::kBF16, "attention qkv");
  fake_cuda::set_memory(fake_cuda::allocated() + (std::size_t{8} << 20));
  const std::string message =
      error_of([&] { arena.take({50 << 20}, DType::kBF16, "expert hidden"); }, ExitCode::kFailure);
  EXPECT_THAT(message, HasSubstr("out of memory on GPU 0"));
  EXPECT_THAT(message, HasSubstr("it was for 'expert hidden' in arena 'activations'"));
  EXPECT_THAT(message, HasSubstr("20971520 bytes  attention qkv"));
}

TEST_F(Gpu, AFindingIsToldOnceByTheNextSynchronize) {
  OpExec ex;
  HostTensor x({4, 2}, DType::kF32), w({5, 2}, DType::kF32);
  const HostTensor bad = tensor_of({4}, DType::kI32, {0, 9, 4, 11}), good = filled({4}, DType::kI32, 1);
  ops::embedding_forward(ex, x, bad, w);
  EXPECT_THAT(error_of(finish_ops, ExitCode::kBadInput),
              HasSubstr("token 9 at position 1 of the batch is outside the vocabulary [0, 5)"));
  finish_ops();
  ops::embedding_forward(ex, x, good, w);
  finish_ops();
}

TEST_F(Gpu, AnErrorOfTheRuntimeHasItsWordsAndPlace) {
  OpExec ex;
  HostTensor x = filled({4}, DType::kF32, 1), y({4}, DType::kF32);
  ops::cast(ex, y, x);
  fake_cuda::fail_next("cudaMemcpyAsync", 719);
  const std::string message = error_of([&] { ops::cast(ex, y, x); }, ExitCode::kDevice);
  EXPECT_THAT(message, HasSubstr("unspecified launch failure"));
  EXPECT_THAT(message, HasSubstr("pointwise.cu"));
}

}  // namespace
}  // namespace upmoe::test
