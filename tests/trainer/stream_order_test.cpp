// On (pretended) GPUs every access of a training step is ordered behind those before it: by its stream, by
// events, or by what the host waits for. The watch sees a missing wait even where the order happened to be right.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/ops/grouped_gemm.h"
#include "parallel/thread_comm.h"
#include "tests/support/fake_cuda/fake_cuda.h"
#include "tests/support/fake_cuda/stream_order.h"
#include "tests/support/layout_run.h"
#include "tests/support/offsets.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"

namespace upmoe::test {
namespace {

using fake_cuda::StreamOrder;
using testing::HasSubstr;
using testing::IsEmpty;

// What an op is about to touch, on its stream.
class OpsOfStream final : public OpWatcher {
 public:
  explicit OpsOfStream(Stream& stream) : stream_(gpu::raw(stream)) {}
  void reads(const ConstTensorView& t) override {
    if (t.device.type == DeviceType::kCuda) fake_cuda::touched(stream_, "an op", {{t.data, t.bytes()}}, {});
  }
  void writes(const TensorView& t) override {
    if (t.device.type == DeviceType::kCuda) fake_cuda::touched(stream_, "an op", {}, {{t.data, t.bytes()}});
  }

 private:
  void* stream_;
};

// On GPUs a rank alone has several streams too.
std::vector<Layout> layouts() {
  std::vector<Layout> all = layouts_of_every_kind();
  all.push_back({"moe_a27b", {1, 1, 1, 1, 1, 1}, 1});
  Layout layout{"moe_a27b", {1, 2, 1, 1, 2, 1}, 1};
  layout.recompute = Recompute::kUp;
  all.push_back(layout);
  layout.recompute = Recompute::kNone;
  layout.precision = layout.reduce = Precision::kBf16;
  layout.optimizer = OptimizerKind::kAdamW8bit;
  all.push_back(layout);
  layout.width = 256;
  layout.experts = ExpertsPath::kFused;
  all.push_back(layout);
  return all;
}

class StreamOrderOf : public testing::TestWithParam<Layout> {};

TEST_P(StreamOrderOf, ATrainingStepIsWhole) {
  Layout layout = GetParam();
  layout.steps = 2;
  const Golden golden(layout.model);
  Outcome outcome;
  std::mutex mutex;
  StreamOrder order;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    std::unique_ptr<OpsOfStream> ops;
    run_rank(world, golden, layout, outcome, mutex, [&](Session& s) {
      ops = std::make_unique<OpsOfStream>(*s.memory.stream);
      s.memory.exec.watcher = ops.get();
    });
  });
  EXPECT_THAT(order.mistakes(), IsEmpty());
  EXPECT_GT(order.accesses(), 1000u);
  // The step's own stream, those beside it for experts, and one for each group of ranks.
  const std::size_t beside = layout.experts == ExpertsPath::kFused ? 0 : 3;
  EXPECT_GE(order.streams(), static_cast<std::size_t>(layout.mesh.world()) * (2 + beside));
}

INSTANTIATE_TEST_SUITE_P(Layouts, StreamOrderOf, testing::ValuesIn(layouts()), [](const auto& i) {
  return i.param.str() + "_" + name_of(i.param.precision) + (i.param.zero == 2 ? "_zero2" : "") +
         (i.param.node_ranks > 0 ? "_nodes" : "") + (i.param.experts == ExpertsPath::kFused ? "_fused" : "") +
         (i.param.recompute != Recompute::kNone ? std::string("_") + name_of(i.param.recompute) : "");
});

// --- the watch itself, by waits that are left out

struct Experts {
  HostTensor x = random_tensor({12, 8}, DType::kF32, 1), w = random_tensor({3, 6, 8}, DType::kF32, 2),
             y{{12, 6}, DType::kF32}, sum{{12, 6}, DType::kF32};
  Offsets rows{0, 4, 8, 12};
  void run(Exec& ex, int left_out) {
    ops::fill(ex, x, 1.0f);
    if (left_out > 0) fake_cuda::fail_next("forget a wait", 1, left_out);
    ops::grouped_gemm_forward(ex, y, x, w, rows);
    ops::add(ex, sum, y, y);
    finish_ops();
  }
};

std::vector<std::string> mistakes_without(int waits) {
  OpExec ex;
  OpsOfStream ops(*static_cast<Exec&>(ex).stream);
  static_cast<Exec&>(ex).watcher = &ops;
  Experts experts;
  experts.run(ex, 0);  // tensors go to the device, algorithms are chosen
  const StreamOrder order;
  experts.run(ex, waits);
  return order.mistakes();
}

TEST(StreamOrderItself, SeesAForkThatIsMissing) {
  EXPECT_THAT(mistakes_without(0), IsEmpty());
  const auto mistakes = mistakes_without(1);  // the first expert's stream does not wait for the fill
  ASSERT_FALSE(mistakes.empty());
  EXPECT_THAT(mistakes.front(), HasSubstr("a product reads"));
  EXPECT_GT(mistakes_without(6).size(), mistakes.size()) << "nor is anything waited for at the end";
}

TEST(StreamOrderItself, SeesTransfersThatNobodyWaitsFor) {
  for (const bool forget : {false, true}) {
    const StreamOrder order;
    run_in_threads(2, [&](Communicator& world) {
      gpu::use(world.rank());
      const std::unique_ptr<Communicator> gpus = make_nccl_communicator(world.split(0, world.rank()));
      const std::unique_ptr<Stream> stream = gpu::make_stream();
      OpsOfStream ops(*stream);
      Exec ex;
      ex.device = {DeviceType::kCuda, world.rank()};
      ex.stream = stream.get();
      ex.watcher = &ops;
      const Buffer memory = Buffer::allocate(ex.device, 64 * 3, "test");
      const TensorView in = memory.view({16}, DType::kF32), out = memory.view({48}, DType::kF32).rows(16, 48);
      ops::fill(ex, in, 1.0f);
      Pending pending = gpus->all_gather(out, in, stream.get());
      if (!forget) pending.wait();
      ops::scale(ex, out, 2.0f);
      stream->synchronize();
      pending.wait();
      stream->synchronize();
    });
    EXPECT_EQ(order.mistakes().empty(), !forget);
    if (forget) {
      EXPECT_THAT(order.mistakes(), testing::Contains(HasSubstr("NCCL writes")));
    }
  }
}

// A sum of slices is launched outside of ops, and gets them in a struct.
TEST(StreamOrderItself, SeesPointersInStructs) {
  const std::unique_ptr<Stream> copies = gpu::make_stream(), sums = gpu::make_stream();
  const Buffer memory = Buffer::allocate({DeviceType::kCuda, 0}, 64 * 3, "test");
  std::byte *out = memory.data(), *staged = out + 64, *own = out + 128;
  const std::vector<std::byte> arrives(64);
  for (const bool forget : {false, true}) {
    for (std::byte* part : {staged, own}) {
      const StreamOrder order;
      gpu::copy(*copies, part, arrives.data(), 64);
      gpu::Event event;
      event.record(*copies);
      if (!forget) event.hold(*sums);
      gpu::fold_slices(*sums, ReduceOp::kSum, DType::kF32, out, staged, own, 1, 2, 8);
      EXPECT_EQ(order.mistakes().empty(), !forget);
      if (forget) {
        EXPECT_THAT(order.mistakes().front(), HasSubstr("a kernel reads"));
      }
      copies->synchronize();
      sums->synchronize();
    }
  }
}

TEST(StreamOrderItself, HostWaitsAndEventsOrder) {
  const std::unique_ptr<Stream> one = gpu::make_stream(), two = gpu::make_stream();
  const int memory = 0;
  const auto touch = [&](Stream& s, bool writes) {
    const fake_cuda::Ranges range{{&memory, sizeof memory}};
    fake_cuda::touched(gpu::raw(s), "it", writes ? fake_cuda::Ranges{} : range,
                       writes ? range : fake_cuda::Ranges{});
  };
  const StreamOrder order;
  touch(*one, true);
  one->synchronize();
  touch(*two, false);  // the host waited
  gpu::Event event;
  event.record(*two);
  event.hold(*one);
  touch(*one, true);  // its stream waits for the reader
  EXPECT_THAT(order.mistakes(), IsEmpty());
  touch(*one, false);
  touch(*two, false);  // behind a write of the other stream
  EXPECT_EQ(order.mistakes().size(), 1u);
  touch(*two, true);  // behind that write and a read
  EXPECT_EQ(order.mistakes().size(), 3u);
}

}  // namespace
}  // namespace upmoe::test
