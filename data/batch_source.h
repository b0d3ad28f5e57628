#pragma once
// Where micro-batches come from, and the one form in which they come.

#include <cstdint>
#include <optional>

#include "kernels/core/tensor.h"

namespace upmoe {

// One micro-batch on the host: T tokens, whole sequences one behind the other. Views into the source's memory, valid
// until its next next(). T = 0 and index -1: a rank without work in this round, which takes part in the exchange of
// expert rows all the same.
struct Batch {
  ConstTensorView tokens_T, targets_T, positions_T;  // int32; a target of -1 does not count
  ConstTensorView document_T;                        // int32; not given where documents are not masked
  std::int64_t seq_len = 0;
  std::int64_t index = -1;  // which micro-batch of the step
  std::int64_t sequences() const { return tokens_T.rows() / seq_len; }
};

// How the micro-batches of a step are dealt to the data-parallel ranks: in round r rank d of D takes number r*D + d.
// Where there are fewer it gets an empty one, so that all ranks make the same number of rounds.
struct Deal {
  std::int64_t micro_batches = 0;
  int rank = 0, ranks = 1;
  std::int64_t rounds() const { return (micro_batches + ranks - 1) / ranks; }
  std::int64_t index(std::int64_t round) const {  // -1: none left
    const std::int64_t i = round * ranks + rank;
    return i < micro_batches ? i : -1;
  }
  // Rounds that have one for the rank.
  std::int64_t own() const { return (micro_batches - rank + ranks - 1) / ranks; }
};

// The micro-batches of one data-parallel rank, step after step.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  virtual std::int64_t rounds() const = 0;  // of one step: as often is next() called for it
  virtual Batch next() = 0;
  // How many targets count of this rank's micro-batches of the step that begins with the next next(). Empty, on all
  // ranks alike: every one of all of them.
  virtual std::optional<std::int64_t> counted_targets() { return {}; }
};

}  // namespace upmoe
