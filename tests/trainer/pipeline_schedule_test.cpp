#include "trainer/pipeline_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "kernels/core/check.h"

namespace upmoe {
namespace {

// Runs all stages of a schedule in lock step, each action one unit of time: every message must be there when
// it is wanted, and nothing may wait for ever. Returns the time it took.
int play(int stages, int chunks, int micro_batches) {
  std::vector<std::vector<PipelineAction>> schedule;
  for (int s = 0; s < stages; ++s) schedule.push_back(pipeline_schedule(stages, s, chunks, micro_batches));
  std::vector<std::size_t> at(static_cast<std::size_t>(stages));
  std::map<std::tuple<bool, int, int>, int> done;  // (forward, micro-batch, chunk of the model) -> when
  const int last = stages * chunks - 1;
  for (int time = 0;; ++time) {
    std::vector<std::tuple<bool, int, int>> now;
    bool finished = true;
    for (int s = 0; s < stages; ++s) {
      auto& next = at[static_cast<std::size_t>(s)];
      const auto& mine = schedule[static_cast<std::size_t>(s)];
      if (next == mine.size()) continue;
      finished = false;
      const PipelineAction& a = mine[next];
      const int chunk = a.chunk * stages + s;
      const auto is_done = [&](bool forward, int c) { return done.contains({forward, a.micro_batch, c}); };
      const bool ready = a.forward ? chunk == 0 || is_done(true, chunk - 1)
                                   : is_done(true, chunk) && (chunk == last || is_done(false, chunk + 1));
      if (!ready) continue;
      now.emplace_back(a.forward, a.micro_batch, chunk);
      ++next;
    }
    if (finished) return time;
    if (now.empty()) return -1;  // stuck
    for (const auto& n : now) EXPECT_TRUE(done.emplace(n, time).second);
  }
}

TEST(PipelineSchedule, EveryMicroBatchOnceThroughEveryChunkInOrder) {
  for (int stages = 1; stages <= 6; ++stages)
    for (int chunks = 1; chunks <= 3; ++chunks)
      for (int m = 0; m <= 12; ++m) {
        if (chunks > 1 && m % stages != 0) continue;
        for (int s = 0; s < stages; ++s) {
          std::set<std::tuple<bool, int, int>> seen;
          std::map<int, int> last_backward;
          for (const PipelineAction& a : pipeline_schedule(stages, s, chunks, m)) {
            EXPECT_TRUE(seen.insert({a.forward, a.micro_batch, a.chunk}).second);
            if (!a.forward) {
              EXPECT_TRUE(seen.contains({true, a.micro_batch, a.chunk}));
              EXPECT_EQ(last_backward[a.chunk]++, a.micro_batch) << "gradients add up in another order";
            }
          }
          EXPECT_EQ(static_cast<int>(seen.size()), 2 * m * chunks);
        }
      }
}

// 1F1B takes m + stages - 1 units each way; interleaving divides the bubble by the number of chunks.
TEST(PipelineSchedule, TakesTheTimeOfTheTheory) {
  for (int stages = 1; stages <= 6; ++stages)
    for (int chunks = 1; chunks <= 3; ++chunks)
      for (const int m : {stages, 2 * stages, 5 * stages})
        EXPECT_EQ(play(stages, chunks, m), 2 * m * chunks + 2 * (stages - 1))
            << stages << " stages, " << chunks << " chunks, " << m << " micro-batches";
}

// The largest number of (micro-batch, chunk) between their forward and their backward.
int most_in_flight(const std::vector<PipelineAction>& schedule) {
  int now = 0, most = 0;
  for (const PipelineAction& a : schedule) most = std::max(most, now += a.forward ? 1 : -1);
  return most;
}

TEST(PipelineSchedule, KeepsNoMoreInFlightThanNeeded) {
  for (int stages = 1; stages <= 6; ++stages)
    for (int s = 0; s < stages; ++s)
      EXPECT_EQ(most_in_flight(pipeline_schedule(stages, s, 1, 12)), stages - s);
  EXPECT_EQ(most_in_flight(pipeline_schedule(4, 0, 1, 2)), 2);  // fewer micro-batches than stages
}

TEST(PipelineSchedule, RefusesIncompleteGroups) {
  EXPECT_THROW(pipeline_schedule(2, 0, 2, 3), Error);
  EXPECT_THROW(pipeline_schedule(2, 2, 1, 3), Error);
}

}  // namespace
}  // namespace upmoe
