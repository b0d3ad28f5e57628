#pragma once
// A rank's micro-batches, read ahead by one thread.

#include <cstdint>
#include <memory>
#include <vector>

#include "data/token_dataset.h"
#include "kernels/core/tensor.h"

namespace upmoe {

// One micro-batch on the host; views into the loader's memory, valid until the next next(). T =
// micro_batch * seq_len.
struct Batch {
  ConstTensorView tokens_T, targets_T, positions_T;  // int32
  ConstTensorView document_T;                        // int32; data null when documents are not masked
  std::int64_t index = -1;  // which micro-batch of the step; -1: none left for this rank
};

// Micro-batch b of step s (from 0) is samples [s*G + b*M, s*G + (b+1)*M). In round r of a step, data-parallel
// rank d of D takes micro-batch r*D + d; where there are fewer, the rank gets an empty one (T = 0, index -1),
// so that all ranks make the same number of rounds.
class BatchLoader {
 public:
  struct Options {
    std::int64_t global_batch = 0, micro_batch = 0;  // in sequences; micro_batch divides global_batch
    int dp_rank = 0, dp_size = 1;
    bool mask_documents = false;
  };
  BatchLoader(const TokenDataset& data, Options options,
              std::int64_t first_sample);  // first_sample: multiple of G
  ~BatchLoader();
  std::int64_t rounds() const;  // per step
  Batch next();  // micro-batches in order, step after step; errors of the thread are thrown here
  std::int64_t position() const;  // samples consumed by finished steps plus whole rounds of this one

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
