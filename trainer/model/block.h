#pragma once
// One transformer block: h = x + attention(norm1(x)); y = h + ffn(norm2(h)), ffn dense or a mixture of
// experts. What is kept for backward and what is computed again: keep.h.

#include <variant>
#include <vector>

#include "configs/run_choices.h"
#include "trainer/model/attention_layer.h"
#include "trainer/model/keep.h"
#include "trainer/model/moe_layer.h"
#include "trainer/model/norm.h"

namespace upmoe {

struct Block {
  Norm norm1, norm2;
  AttentionLayer attention;
  std::variant<DenseFfn, MoeLayer> ffn;
  Recompute recompute = Recompute::kNone;

  struct Saved {
    ConstTensorView x_TD;
    TokenPlaces places;
    TensorView normed1_TD, h_TD, normed2_TD;
    Norm::Saved norm1, norm2;
    AttentionLayer::Saved attention;
    std::variant<DenseFfn::Saved, MoeLayer::Saved> ffn;
    RouterBalance balance;  // of its router, if it is a mixture; set by the model
  };

  bool is_moe() const { return std::holds_alternative<MoeLayer>(ffn); }
  void forward(Exec& ex, TensorView y_TD, ConstTensorView x_TD, const TokenPlaces& places, Arena& keep,
               Saved& saved) const;
  // g_TD: gradient of y in, gradient of x out. `keep` as forward left it (recomputation takes memory above
  // and gives it back).
  void backward(Exec& ex, TensorView g_TD, Arena& keep, Saved& saved) const;

 private:
  void attention_half(Exec& ex, TensorView attended_TD, Arena& keep, Saved& saved) const;
  void ffn_half(Exec& ex, TensorView f_TD, Arena& keep, Saved& saved) const;
  void ffn_backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe
