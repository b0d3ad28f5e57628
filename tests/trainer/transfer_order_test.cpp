// Every transfer of a training step is waited for before its buffers are touched, in every kind of layout.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/support/layout_run.h"
#include "tests/support/transfer_watch.h"

namespace upmoe::test {
namespace {

using testing::HasSubstr;

class TransferOrder : public testing::TestWithParam<Layout> {};

TEST_P(TransferOrder, NothingUnderWayIsTouched) {
  Layout layout = GetParam();
  layout.steps = 2;
  const Golden golden(layout.model);
  Outcome outcome;
  std::mutex mutex;
  std::size_t most = 0;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    TransferWatch watch;
    run_rank(world, golden, layout, outcome, mutex, [&](Session& s) { s.memory.exec.watcher = &watch; });
    const std::lock_guard lock(mutex);
    EXPECT_THAT(watch.mistakes(), testing::IsEmpty()) << "rank " << world.rank();
    EXPECT_GT(watch.begun(), 0u);
    most = std::max(most, watch.most_under_way());
  });
  EXPECT_GT(most, 1u) << "transfers overlap";
}

INSTANTIATE_TEST_SUITE_P(Layouts, TransferOrder, testing::ValuesIn(layouts_of_every_kind()),
                         [](const auto& i) {
                           return i.param.str() + (i.param.zero == 2 ? "_zero2" : "") +
                                  (i.param.node_ranks > 0 ? "_nodes" : "") +
                                  (i.param.recompute != Recompute::kNone ? "_recomputed" : "");
                         });

TEST(TransferWatchItself, SeesWhatIsTouchedTooEarly) {
  TransferWatch watch;
  const std::unique_ptr<Communicator> self = make_self_communicator();
  Exec ex;
  ex.watcher = &watch;
  std::vector<float> in(8, 1), out(8, 0), other(4, 2);
  const TensorView in_8 = host_view(in.data(), {8}), out_8 = host_view(out.data(), {8}),
                   other_4 = host_view(other.data(), {4});
  Pending pending = self->all_gather(out_8, in_8, ex);
  ops::add(ex, other_4, other_4, in_8.rows(0, 4));  // reading what is sent is allowed
  EXPECT_THAT(watch.mistakes(), testing::IsEmpty());
  ops::add(ex, other_4, other_4, out_8.rows(4, 8));
  ops::fill(ex, in_8.rows(7, 8), 0.0f);
  Pending second = self->all_gather(in_8, out_8, ex);
  ASSERT_EQ(watch.mistakes().size(), 4u);
  EXPECT_THAT(watch.mistakes()[0],
              HasSubstr("an op reads fp32 [4], which a all_gather that is under way writes"));
  EXPECT_THAT(watch.mistakes()[1],
              HasSubstr("an op writes fp32 [1], which a all_gather that is under way reads"));
  second.wait();
  pending.wait();
  ops::add(ex, other_4, other_4, out_8.rows(4, 8));
  EXPECT_EQ(watch.mistakes().size(), 4u);
}

}  // namespace
}  // namespace upmoe::test
