#include "trainer/model/recompute.h"

#include "kernels/core/check.h"

namespace upmoe {

Recompute recompute_from(const std::string& name) {
  if (name == "none") return Recompute::kNone;
  if (name == "swiglu") return Recompute::kSwiglu;
  if (name == "routed_up") return Recompute::kRoutedUp;
  if (name == "up") return Recompute::kUp;
  if (name == "ffn") return Recompute::kFfn;
  if (name == "block") return Recompute::kBlock;
  fail(ExitCode::kUsage, "train.recompute: found '{}', expected none, swiglu, routed_up, up, ffn or block",
       name);
}

KeepOfKinds keep_of(Recompute recompute) {
  const Keep nothing{.rows = false, .gate_up = false, .hidden = false};
  switch (recompute) {
    case Recompute::kSwiglu:
      return {.dense = {.hidden = false}, .routed = {.rows = false, .hidden = false}};
    case Recompute::kRoutedUp:
      return {.dense = {.hidden = false}, .routed = nothing};
    case Recompute::kUp:
      return {.dense = nothing, .routed = nothing};
    case Recompute::kNone:
    case Recompute::kFfn:
    case Recompute::kBlock:
      break;
  }
  return {};
}

}  // namespace upmoe
