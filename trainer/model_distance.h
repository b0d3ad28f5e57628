#pragma once
// How far what a model predicts is from what another one does.

#include <cstdint>

#include "data/token_dataset.h"
#include "trainer/rank_model.h"

namespace upmoe {

struct ModelDistance {
  double loss = 0, origin_loss = 0;  // mean cross-entropy per token, in nats
  double divergence = 0;             // mean over the tokens of KL(origin || model), in nats
  std::int64_t tokens = 0;
};

// Of `model` from `origin` on the first `sequences` of `data` (at most all), one at a time. Both on one rank and with
// one vocabulary; the logits of one sequence are in memory, [seq_len, vocab] in fp32.
ModelDistance distance_between(RankModel& model, RankModel& origin, const TokenDataset& data,
                               std::int64_t sequences);

}  // namespace upmoe
