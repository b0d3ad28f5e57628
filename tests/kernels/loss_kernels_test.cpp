// Cross-entropy by the kernel of every GPU, on a pretended one of compute capability 8.0, beside that of a 9.0: within
// the same bounds, and targets that the vocabulary does not have are reported by both.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/ops/loss.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/op_exec.h"
#include "tests/support/reference_loss.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

class OfCapability : public testing::TestWithParam<int> {
 protected:
  OfCapability() {
    fake_cuda::set_devices(8, GetParam(), 0);
    gpu::use(0);
    stream_ = gpu::make_stream();
  }
  ~OfCapability() override { fake_cuda::set_devices(8); }
  // What the tensors hold comes to the device on the stream of all ops, and this GPU has one of its own.
  void run(const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C) {
    finish_ops();
    Exec& all = ex_;
    Exec here = all;
    here.stream = stream_.get();
    ops::cross_entropy(here, out, logits_CV, targets_C);
    stream_->synchronize();
  }

 private:
  OpExec ex_;
  std::unique_ptr<Stream> stream_;
};

TEST_P(OfCapability, LossAndGradient) {
  for (const std::int64_t vocab : {4, 1000, 4096, 40004}) {
    const HostTensor logits = random_tensor({5, vocab}, DType::kF32, 1, 4.0), targets = targets_for(5, vocab);
    const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 0.125);
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      HostTensor loss = filled({5}, DType::kF32, 7), d({5, vocab}, dtype);  // 7: an ignored row's is written
      const TensorView d_CV = d;
      run({loss, d_CV, 0.125f}, logits, targets);
      expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
      const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 250, 1e-7} : Tolerance{3e-6, 1e-7};
      expect_close(d.values(), expected.dlogits, tolerance, "dlogits");
    }
  }
}

TEST_P(OfCapability, ReportsTargetsAndZeroesTheirGradient) {
  for (const double bad : {1000.0, -2.0}) {
    const HostTensor logits = random_tensor({3, 1000}, DType::kF32, 1),
                     targets = tensor_of({3}, DType::kI32, {1, bad, 0});
    HostTensor loss({3}, DType::kF32), d({3, 1000}, DType::kF32);
    const TensorView d_CV = d;
    try {
      run({loss, d_CV, 1.0f}, logits, targets);
      ADD_FAILURE() << bad << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_THAT(e.what(), testing::HasSubstr("position 1"));
    }
    for (std::size_t v = 0; v < 1000; ++v) ASSERT_EQ(d.get(1000 + v), 0) << v;
  }
}

INSTANTIATE_TEST_SUITE_P(Gpus, OfCapability, testing::Values(8, 9),
                         [](const auto& i) { return "sm_" + std::to_string(i.param) + "0"; });

}  // namespace
}  // namespace upmoe::test
