#pragma once
// One transformer block: h = x + attention(norm1(x)); y = h + ffn(norm2(h)), ffn dense or a mixture of
// experts. Every sum but one that no norm follows is made by the norm that reads it. What is kept for backward and what
// is computed again: keep.h.

#include <variant>

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
    ConstTensorView x_TD;  // whole, once forward has run
    TokenPlaces places;
    TensorView normed1_TD, h_TD, normed2_TD;
    Norm::Saved norm1, norm2;
    AttentionLayer::Saved attention;
    std::variant<DenseFfn::Saved, MoeLayer::Saved> ffn;
    RouterBalance balance;  // of its router, if it is a mixture; set by the model
  };

  bool is_moe() const { return std::holds_alternative<MoeLayer>(ffn); }
  // Where a block's output goes: the sum, and what is left to be added for it. The latter may be the input's own, which
  // is read first. Both of as many tokens as are made: all, or the picked ones (CachedPlaces).
  struct Output {
    TensorView y_TD, branch_TD;
    // Where shares_norms(): for the outputs of both norms, which nobody reads at one time. Of all blocks of a
    // micro-batch, and there until the last backward; what stands in it, backward makes again.
    TensorView normed_TD = {};
  };
  bool shares_norms() const { return recompute == Recompute::kNorms || recompute == Recompute::kElementwise; }
  // The output; of what lies in `keep` and `out`.
  Residual forward(Exec& ex, const Output& out, const Residual& x, const TokenPlaces& places, Arena& keep,
                   Saved& saved) const;
  // g_TD: gradient of y in, gradient of x out. `keep` as forward left it (recomputation takes memory above
  // and gives it back).
  void backward(Exec& ex, TensorView g_TD, Arena& keep, Saved& saved) const;

 private:
  void attention_half(Exec& ex, const Output& out, const Residual& x, Arena& keep, Saved& saved) const;
  ConstTensorView passed_by(Exec& ex, const Shape& shape, Arena& keep, const Saved& saved) const;
  Residual ffn_half(Exec& ex, const Output& out, Arena& keep, Saved& saved) const;
  void ffn_backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, const Saved& saved) const;
};

}  // namespace upmoe
