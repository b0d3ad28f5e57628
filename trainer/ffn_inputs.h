#pragma once
// What the feed-forward networks of a model read on tokens: the hidden states behind the second norm of each block.

#include <cstdint>
#include <functional>
#include <vector>

#include "data/token_dataset.h"
#include "trainer/rank_model.h"

namespace upmoe {

// see(layer, x_TD) for every layer and each of the first `sequences` of `data` (at most all), in their order, one
// sequence at a time; x_TD [seq_len, hidden] on the host in the model's dtype, there until `see` returns. The model is
// whole on one rank of the CPU.
void for_each_ffn_input(RankModel& model, const TokenDataset& data, std::int64_t sequences,
                        const std::function<void(int layer, ConstTensorView x_TD)>& see);

// Of every layer the mean over all those tokens, scaled to length 1: [layers][hidden]. A model in fp32. Throws
// Error(kBadInput) where a mean is zero.
std::vector<std::vector<float>> mean_directions(RankModel& model, const TokenDataset& data,
                                                std::int64_t sequences);

}  // namespace upmoe
