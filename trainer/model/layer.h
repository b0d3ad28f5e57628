#pragma once
// What every layer is: a plain struct of parameters with
//   forward(ex, y, x, keep, saved)   writes y; what backward needs goes into `saved`, its memory comes from `keep`
//   backward(ex, dx, dy, saved)      overwrites dx, puts its part into the parameters' gradients (Param::write_grad)
// Saved activations are values, one per micro-batch, so several micro-batches can be in flight and
// recomputation is calling forward again. Layers are const in both directions: gradients are views into
// memory the ParamStore owns.

#include "kernels/core/exec.h"
#include "trainer/model/param.h"
