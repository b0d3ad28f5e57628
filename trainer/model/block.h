#pragma once
// One transformer block: h = x + attention(norm1(x)); y = h + ffn(norm2(h)), ffn dense or a mixture of
// experts. What is kept for backward and what is computed again is decided here and nowhere else.

#include <string>
#include <variant>
#include <vector>

#include "trainer/model/attention_layer.h"
#include "trainer/model/balance.h"
#include "trainer/model/moe_layer.h"
#include "trainer/model/rms_norm.h"

namespace upmoe {

// What backward makes again instead of keeping it, each with what stands before it: kSwiglu, what lies
// between the two products of a feed-forward network (an elementwise op) and the rows that experts are given
// (copies, where one rank has all experts); kRoutedUp, the experts' first product; kUp, that of dense
// networks and of the shared expert; kFfn, the feed-forward half; kBlock, everything but the block's input.
enum class Recompute { kNone, kSwiglu, kRoutedUp, kUp, kFfn, kBlock };
Recompute recompute_from(const std::string& name);

struct Block {
  RmsNorm norm1, norm2;
  AttentionLayer attention;
  std::variant<DenseFfn, MoeLayer> ffn;
  Recompute recompute = Recompute::kNone;

  struct Saved {
    ConstTensorView x_TD;
    TokenPlaces places;
    TensorView normed1_TD, h_TD, normed2_TD;
    RmsNorm::Saved norm1, norm2;
    AttentionLayer::Saved attention;
    std::variant<DenseFfn::Saved, MoeLayer::Saved> ffn;
    TensorView load_L;  // set by the model before forward: where a mixture's load goes, see MoeLayer::Saved
    TensorView aux_E;   // set by the model between forward and backward
    float z_scale = 0;
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
  void ffn_backward(Exec& ex, TensorView dx_TD, ConstTensorView dy_TD, Saved& saved) const;
};

}  // namespace upmoe
