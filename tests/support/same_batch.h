#pragma once
// Micro-batches without files.

#include <vector>

#include "data/batch_source.h"

namespace upmoe::test {

// A view of sequences that the caller holds; without documents.
inline Batch batch_of(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& targets,
                      const std::vector<std::int32_t>& positions, std::int64_t seq_len) {
  const Shape shape{static_cast<std::int64_t>(tokens.size())};
  Batch batch;
  batch.tokens_T = host_view(tokens.data(), shape);
  batch.targets_T = host_view(targets.data(), shape);
  batch.positions_T = host_view(positions.data(), shape);
  batch.seq_len = seq_len;
  batch.index = 0;
  return batch;
}

// One micro-batch, `rounds` times in every step.
class SameBatch final : public BatchSource {
 public:
  SameBatch(const Batch& batch, std::int64_t rounds) : batch_(batch), rounds_(rounds) {}
  std::int64_t rounds() const override { return rounds_; }
  Batch next() override { return batch_; }

 private:
  Batch batch_;
  std::int64_t rounds_;
};

}  // namespace upmoe::test
