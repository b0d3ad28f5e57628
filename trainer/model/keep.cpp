#include "trainer/model/keep.h"

namespace upmoe {

KeepOfKinds keep_of(Recompute recompute) {
  const Keep nothing{.rows = false, .gate_up = false, .hidden = false};
  switch (recompute) {
    case Recompute::kSwiglu:
    case Recompute::kElementwise:
      return {.dense = {.hidden = false}, .routed = {.rows = false, .hidden = false}};
    case Recompute::kRoutedUp:
      return {.dense = {.hidden = false}, .routed = nothing};
    case Recompute::kUp:
      return {.dense = nothing, .routed = nothing};
    case Recompute::kNone:
    case Recompute::kNorms:
    case Recompute::kFfn:
    case Recompute::kBlock:
      break;
  }
  return {};
}

}  // namespace upmoe
