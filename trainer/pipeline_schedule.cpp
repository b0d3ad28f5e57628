#include "trainer/pipeline_schedule.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace upmoe {

namespace {

// The n-th forward of a stage (or the n-th backward: the same with the chunks in falling order).
PipelineAction action(bool forward, int n, int stages, int chunks) {
  const int group = n / (stages * chunks), chunk = n / stages % chunks;
  return {forward, group * stages + n % stages, forward ? chunk : chunks - 1 - chunk};
}

int warm_up(int stages, int stage, int chunks) {
  if (chunks == 1) return stages - 1 - stage;
  return 2 * (stages - 1 - stage) + (chunks - 1) * stages;
}

}  // namespace

std::vector<PipelineAction> pipeline_schedule(int stages, int stage, int chunks, int micro_batches) {
  UPMOE_CHECK(0 <= stage && stage < stages && chunks >= 1 && micro_batches >= 0, "stage {} of {}, {} chunks",
              stage, stages, chunks);
  UPMOE_CHECK(chunks == 1 || micro_batches % stages == 0, "{} micro-batches for {} interleaved stages",
              micro_batches, stages);
  std::vector<PipelineAction> schedule;
  const int total = micro_batches * chunks, ahead = std::min(total, warm_up(stages, stage, chunks));
  // With one chunk the groups are of one micro-batch, so that any number of them will do.
  const int turn = chunks == 1 ? 1 : stages;
  for (int n = 0; n < ahead; ++n) schedule.push_back(action(true, n, turn, chunks));
  for (int n = ahead; n < total; ++n) {
    schedule.push_back(action(true, n, turn, chunks));
    schedule.push_back(action(false, n - ahead, turn, chunks));
  }
  for (int n = total - ahead; n < total; ++n) schedule.push_back(action(false, n, turn, chunks));
  return schedule;
}

int most_in_flight(const std::vector<PipelineAction>& schedule) {
  int now = 0, most = 0;
  for (const PipelineAction& a : schedule) most = std::max(most, now += a.forward ? 1 : -1);
  return most;
}

}  // namespace upmoe
