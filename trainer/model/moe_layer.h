#pragma once
// Mixture of experts: router, dropless dispatch along ep and etp, grouped SwiGLU experts, ordered combine;
// the shared expert runs while rows are in flight. Each rank's t tokens are its own: the exchange may span tp
// ranks. The routing weight multiplies the hidden row, before the down projection: the same product, and its
// gradient needs only what gate_up gives.

#include <optional>

#include "trainer/model/dense_ffn.h"
#include "trainer/model/node_exchange.h"
#include "trainer/model/token_dispatch.h"

namespace upmoe {

struct MoeLayer {
  ExpertShares shares;
  std::int64_t top_k = 0;
  bool renormalize_top_k = false;
  Communicator* exchange = nullptr;        // the ranks along ep and etp
  NodeGroups nodes;                        // of the exchange, where rows go by way of nodes; etp is 1 then
  Param router_ED, gate_up_eGD, down_eDF;  // pieces of experts of this rank: shares.pieces_of(rank, size)
  std::optional<DenseFfn> shared;
  // false: backward makes those rows of the experts again; their input where no rank is asked for it.
  bool keep_rows = true, keep_gate_up = true, keep_hidden = true;

  struct Saved {
    ConstTensorView x_TD;
    TensorView probs_TE, index_TK, weight_TK, lse_T;
    // fp64, [3 E + 1]: stats_3E and z_1 of ops::balance_stats. Set by the caller to have them there; else kept.
    TensorView load_L;
    NodePlan nodes;
    DispatchPlan plan;
    TensorView x_RD, weight_R1, gate_up_RG, h_RF;
    DenseFfn::Saved shared;
    // Set between forward and backward: the balance terms' gradients (balance.h).
    TensorView aux_E;
    float z_scale = 0;
  };

  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, Arena& keep, Saved& saved) const;
  void backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const;

 private:
  Communicator& group() const { return nodes ? *nodes.inside : *exchange; }  // where rows meet their experts
  PieceMap pieces() const;
  void start_dispatch(Exec& ex, ConstTensorView x_TD, std::optional<ToNodes>& crossing,
                      std::optional<ToExperts>& rows, const Saved& saved) const;
  void finish_dispatch(Exec& ex, TensorView x_RD, std::optional<ToNodes>& crossing,
                       std::optional<ToExperts>& rows, const Saved& saved) const;
  void plan_dispatch(Exec& ex, Arena& keep, Saved& saved) const;
  void add_to_tokens(Exec& ex, TensorView y_TD, ConstTensorView rows_ND, const Saved& saved) const;
  TensorView weight_gradients(Exec& ex, ConstTensorView rows_N1, const Saved& saved) const;
  void route(Exec& ex, ConstTensorView x_TD, Arena& keep, Saved& saved) const;
  void experts_forward(Exec& ex, TensorView y_RD, ConstTensorView x_RD, Arena& keep, Saved& saved) const;
  void experts_backward(Exec& ex, TensorView dx_RD, TensorView dweight_R1, TensorView dgate_up_RG,
                        ConstTensorView dy_RD, ConstTensorView gate_up_RG, const Saved& saved) const;
  bool keeps_rows() const { return keep_rows || exchange->size() > 1; }
  TensorView rows(Exec& ex, const Saved& saved) const;
  TensorView gate_up(Exec& ex, ConstTensorView x_RD, const Saved& saved) const;
  TensorView hidden(Exec& ex, ConstTensorView gate_up_RG, const Saved& saved) const;
  void router_backward(Exec& ex, TensorView dx_TD, ConstTensorView dweight_TK, const Saved& saved) const;
};

}  // namespace upmoe
