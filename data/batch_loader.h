#pragma once
// A rank's micro-batches, read ahead by one thread.

#include <cstdint>
#include <memory>

#include "data/batch_source.h"
#include "data/token_dataset.h"

namespace upmoe {

// Micro-batch b of step s (from 0) is samples [s*G + b*M, s*G + (b+1)*M).
class BatchLoader final : public BatchSource {
 public:
  struct Options {
    std::int64_t global_batch = 0, micro_batch = 0;  // in sequences; micro_batch divides global_batch
    int dp_rank = 0, dp_size = 1;
    bool mask_documents = false;
  };
  BatchLoader(const TokenDataset& data, Options options,
              std::int64_t first_sample);  // first_sample: multiple of G
  ~BatchLoader() override;
  std::int64_t rounds() const override;
  Batch next() override;  // errors of the thread are thrown here, and by the following
  std::optional<std::int64_t> counted_targets() override;
  std::int64_t position() const;  // samples consumed by finished steps plus whole rounds of this one

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
