#pragma once
// What every layer is: a plain struct of parameters with
//   forward(ex, y, x, keep, saved)   writes y; what backward needs goes into `saved`, its memory comes from `keep`
//   backward(ex, dx, dy, saved)      overwrites dx, puts its part into the parameters' gradients (Param::write_grad)
// Saved activations are values, one per micro-batch, so several micro-batches can be in flight and
// recomputation is calling forward again. Layers are const in both directions: gradients are views into
// memory the ParamStore owns.

#include "kernels/core/exec.h"
#include "trainer/model/param.h"

namespace upmoe {

// For an op that makes this gradient together with another one: of a frozen parameter it goes nowhere, in temporary
// memory of the caller's ScratchScope.
inline GradientView gradient_or_scratch(Exec& ex, const Param& p, const char* what) {
  if (p.wants_grad()) return p.write_grad();
  return {ex.scratch->take(p.value.shape, p.value.dtype, what), Accumulate::kOverwrite};
}

}  // namespace upmoe
