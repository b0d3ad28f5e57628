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
  // Interleaved: a group of micro-batches through every chunk but the last, and two for each stage behind this one,
  // there and back.
  if (chunks == 1) return stages - 1 - stage;
  return 2 * (stages - 1 - stage) + (chunks - 1) * stages;
}

}  // namespace

// 1F1B. A stage runs ahead by as many forwards as there are stages behind it, then does one backward after each
// forward: it has never more than one micro-batch beyond that in memory. 4 stages, 5 micro-batches (f forward, b
// backward):
//
//   stage 0   f0 f1 f2 f3 b0 f4 b1 b2 b3 b4
//   stage 1   f0 f1 f2 b0 f3 b1 f4 b2 b3 b4
//   stage 2   f0 f1 b0 f2 b1 f3 b2 f4 b3 b4
//   stage 3   f0 b0 f1 b1 f2 b2 f3 b3 f4 b4
//
// Interleaved, a stage has several chunks and takes `stages` micro-batches through one before it turns to the next: the
// first micro-batch is through all stages by then.
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

}  // namespace upmoe
