#pragma once
// How long an op and a transfer take a rank of a machine (configs/machine.h): the longer of what products, or memory,
// need, and what a call takes besides.

#include <string>
#include <string_view>
#include <vector>

#include "configs/machine.h"
#include "configs/run_choices.h"
#include "kernels/core/ledger.h"

namespace upmoe {

class RankSpeed {
 public:
  // Of one of `ranks` ranks that compute in `precision`. Throws Error(kUsage) that names every key that the machine's
  // file lacks for it.
  RankSpeed(const Machine& machine, Precision precision, int ranks);

  // As long as its products take, or its bytes if that is longer.
  double op_seconds(Work work, const Cost& cost) const;
  double call_seconds() const { return machine_.rates.op_us * 1e-6; }  // of it, besides its work
  double skew() const { return machine_.rates.skew; }
  // The rate of a product, FLOP/s, by the edge of a cube (Machine::Rates).
  double product_rate(const std::vector<double>& rates, double edge) const;

  int ranks_per_node() const { return ranks_per_node_; }
  const Machine::Link& inside_node() const { return machine_.inside_node; }
  const Machine::Link& between_nodes() const { return machine_.between_nodes; }
  double peak_flops_per_s() const;  // of a rank
  double memory_bytes() const;      // of a rank
  double overhead_bytes() const { return machine_.overhead_gb * 1e9; }
  const Machine& machine() const { return machine_; }

 private:
  double flops_per_s(Work work, const Cost& cost) const;  // infinite for what only memory bounds

  Machine machine_;
  Precision precision_;
  int ranks_per_node_;  // that there are
  double share_;        // of the machine's rates and memory, a rank's
};

// Keys of the machine's file without which steps of such a run cannot be timed.
std::vector<std::string> missing_keys(const Machine& machine, Precision precision, int ranks);

}  // namespace upmoe
