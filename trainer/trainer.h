#pragma once
// The training step; nothing else.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "trainer/session.h"

namespace upmoe {

struct StepReport {
  std::int64_t step = 0;     // from 1
  double loss = 0;           // mean cross-entropy over the global batch's targets that count
  std::int64_t targets = 0;  // how many those are
  double distill_loss = 0;   // mean of temperature^2 KL from the teacher over the same, before its weight
  double aux_loss = 0,
         z_loss = 0;  // before their coefficients, mean over micro-batches; of several terms the sum
  std::vector<double> aux_losses;  // each term's, in the order of router.aux_kind
  double lr = 0, grad_norm = 0;
  double seconds = 0;
  double flops_per_rank = 0;  // of the model (products and attention), mean over ranks, from the ledger
  double computed_flops_per_rank = 0;  // and what of it is computed twice, and the teacher's
  double teacher_flops_per_rank = 0;   // those of its forward
  double bytes_sent = 0;               // by this rank from the step's start to its end, from the ledger
  // Of `seconds`, how long this rank stood still for transfers: where one began, and where its end was waited for. Not
  // known on a GPU, where streams wait.
  std::optional<double> seconds_waited;
  std::size_t tensors_peak = 0;  // bytes that this rank's tensors have taken at most, MemoryUse::total()
  bool skipped = false;          // a non-finite loss or gradient: no update was made
  std::string culprit;           // then: the first parameter with a non-finite gradient on this rank
  // Per MoE layer and expert: share of all assignments of the step.
  std::vector<std::vector<double>> expert_load;
  std::vector<std::vector<double>> assigned;  // the same, as numbers of assignments
  double dropped = 0;         // share of all assignments, over all layers, beyond the capacity
  std::int64_t requests = 0;  // sum over ranks of the `request` argument of step()
};

class Trainer {
 public:
  explicit Trainer(Session& session) : s_(session) {}

  // One optimizer step over the next global batch. Collective. `request` is summed over the ranks along the
  // way, so that all ranks learn of a signal at the same step. Returns while updated weights still travel:
  // settle() before anything but the next step reads weights that other ranks own. Throws Error(kBadInput), on all
  // ranks, when loss masks leave the step no target.
  StepReport step(std::int64_t step, std::int64_t request = 0);
  void settle() { s_.reducer.await_all_values(s_.memory.exec); }

 private:
  std::int64_t count_targets(std::int64_t step);
  StepSums accumulate(std::int64_t step, std::int64_t targets);
  void reduce(const StepSums& sums, std::int64_t request, StepReport& report);
  Session& s_;
};

}  // namespace upmoe
