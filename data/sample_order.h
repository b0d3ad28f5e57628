#pragma once
// Which sequence of which file sample i is: a pure function of (sizes, weights, seed, i), without a cursor,
// so that any layout and any resume sees the same order.

#include <cstdint>
#include <vector>

namespace upmoe {

class SampleOrder {
 public:
  // sequences[k], weights[k] > 0: of source k. Weights are taken as whole parts of the shortest period that
  // gives them exactly; where none up to kMaxPeriod does, rounded to 1/kMaxPeriod. Throws Error(kUsage) when
  // a weight is not positive and finite, or too small for that.
  SampleOrder(std::vector<std::int64_t> sequences, const std::vector<double>& weights, bool shuffle,
              std::uint64_t seed);

  struct Place {
    int source = 0;
    std::int64_t epoch = 0, sequence = 0;  // of that source
  };
  Place at(std::int64_t sample) const;
  // Samples of each source in one period.
  const std::vector<std::int64_t>& parts() const { return parts_; }

  static constexpr std::int64_t kMaxPeriod = 65536;

 private:
  struct Slot {
    std::int32_t source;
    std::int32_t earlier;  // samples of the same source before this one in the period
  };
  std::vector<std::int64_t> sequences_, parts_;
  std::vector<Slot> slots_;  // one period; empty for a single source
  bool shuffle_;
  std::uint64_t seed_;
};

// A bijection of [0, n) without a table: a Feistel network over Philox, walked until it lands inside.
std::int64_t permuted(std::int64_t index, std::int64_t n, std::uint64_t key);

}  // namespace upmoe
