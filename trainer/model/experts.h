#pragma once
// The routed experts of one rank: pieces of experts in the order of their numbers (expert_shares.h), over the rows
// that chose them.

#include <optional>
#include <vector>

#include "kernels/ops/expert_ffn.h"
#include "trainer/model/adapter.h"
#include "trainer/model/keep.h"

namespace upmoe {

struct Experts {
  Param gate_up_eGD, down_eDF;
  Keep keeps;
  std::optional<Adapter> gate_up_adapter = {}, down_adapter = {};

  // What they are to compute, expert by expert.
  struct Rows {
    ops::PickedRows x;
    bool lasting = false;  // what x is picked out of is there in backward too: x can be picked again
    ConstTensorView weight_R1;
    ExpertRows experts;  // which of them are whose
  };
  struct Saved {
    ops::PickedRows x;  // where kept has no rows
    bool fused = false;
    ConstTensorView weight_R1;
    ConstTensorView offset_e1;
    std::vector<std::int64_t> offsets;  // the same on the host
    ExpertRows experts() const { return {offset_e1, offsets}; }
    ops::ExpertActivations kept;
  };
  // In temporary memory, of the caller's ScratchScope.
  struct Backward {
    // Kept or made again, the hidden rows only where they were kept; none of what frozen weights have no use for.
    ops::ExpertActivations activations;
    ops::ExpertGradients gradients;
    ops::PickedRows dy;  // as backward_rows() was given it
    LowRank gate_up_adapter = {}, down_adapter = {};
    TensorView dx_RD() const { return gradients.dx_RD; }
    TensorView dweight_R1() const { return gradients.dweight_R.reshape({gradients.dweight_R.elements(), 1}); }
  };

  void forward(Exec& ex, TensorView y_RD, const Rows& rows, Arena& keep, Saved& saved) const;
  // Backward in three parts, because rows travel meanwhile: before their gradients have arrived; what is sent
  // back; the weights' gradients.
  Backward begin_backward(Exec& ex, const Saved& saved) const;
  void backward_rows(Exec& ex, Backward& b, const ops::PickedRows& dy, const Saved& saved) const;
  void backward_weights(Exec& ex, const Backward& b, const Saved& saved) const;

  // By the kernels for all experts at once, which know no adapters; the others want ExpertRows::on_host.
  bool fuses(const Exec& ex) const;

 private:
  // Whether backward has a use for the rows, and for the hidden rows: for the gradients of weights, and to make gate_up
  // again.
  bool wants_rows() const {
    return gate_up_eGD.wants_grad() || wants_grad(gate_up_adapter) || !keeps.gate_up;
  }
  bool wants_hidden() const { return down_eDF.wants_grad() || wants_grad(down_adapter); }
  static bool wants_grad(const std::optional<Adapter>& a) { return a && a->wants_grad(); }
  ops::ExpertFfn ffn(const Saved& saved, const LowRank& gate_up, const LowRank& down) const;
  void backward_adapters(Exec& ex, const ops::WeightOperands& operands, const ops::ExpertFfn& f) const;
  void make_again(Exec& ex, Backward& b, const Saved& saved) const;
};

}  // namespace upmoe
