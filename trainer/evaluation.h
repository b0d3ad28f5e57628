#pragma once
// Held-out loss.

#include <algorithm>
#include <functional>

#include "data/token_dataset.h"
#include "trainer/rank_model.h"

namespace upmoe {

struct EvalResult {
  double loss = 0;          // mean cross-entropy per token
  std::int64_t tokens = 0;  // of which there is a loss: the targets that count
  double seconds = 0;
};

// Of what was asked for, 0 for all, what there is.
inline std::int64_t sequences_asked(std::int64_t asked, std::int64_t available) {
  return asked == 0 ? available : std::min(asked, available);
}

struct EvalOptions {
  std::int64_t sequences = 0;    // 0 = all of the file from `begin` on
  std::int64_t micro_batch = 4;  // sequences at once per rank
  bool mask_documents = false;
  std::int64_t begin = 0;  // the first of them
};

// For evaluation alone: experts over as many of the ranks as divide them, which takes the least memory.
MeshSpec evaluation_mesh(const ModelConfig& config, int ranks);

// Sequences begin..begin+n-1 of `data` in file order, dealt to the data-parallel ranks. Collective; the same result on
// every rank. Throws Error(kBadInput) when a loss mask leaves no target.
// `sink` sees the logits (row = token index of the whole evaluation), `routing` what each mixture, in the order of the
// blocks, chose for the tokens of a micro-batch, whole sequences on the host; only with one rank.
using SeeRouting = std::function<void(ConstTensorView tokens_T, int block, const Choices& choices)>;
EvalResult evaluate(RankModel& model, const TokenDataset& data, const EvalOptions& options,
                    const LmHead::Sink& sink = {}, const SeeRouting& routing = {});

}  // namespace upmoe
