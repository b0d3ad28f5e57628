#pragma once
// A low-rank adapter (configs/lora_form.h) of a product y = x w^T, dense or of experts.
//
// Several of PEFT's modules may be one product here. Their matrices are then laid side by side in temporary memory, so
// that all of them are two products as well; of queries and values, say, of rank L:
//
//           x_TK a^T         b      q columns  v columns
//   a   | a of queries |     q rows | b of q |    0    |
//       | a of values  |     k rows |    0   |    0    |
//                            v rows |    0   |  b of v |
//
// The same makes a gate's and an up's rows, which are neighbours, find their own columns.

#include <cstdint>
#include <vector>

#include "kernels/ops/low_rank.h"
#include "trainer/model/layer.h"

namespace upmoe {

// One of PEFT's. Row j of b is row first + j * step of the product's rows.
struct AdaptedModule {
  Param a, b;  // [L, K] and [N', L], of experts [e, L, K] and [e, N', L]
  std::int64_t first = 0, step = 1;
};

struct Adapter {
  std::vector<AdaptedModule> modules;  // of one shape of a
  std::int64_t rows = 0;               // N of the product
  float scale = 1;

  bool wants_grad() const { return modules.front().a.wants_grad(); }
  std::int64_t rank() const;  // of all modules together
  // In temporary memory of the caller's ScratchScope, unless the one module's own are the product's.
  LowRank factors(Exec& ex) const;
  // Where the gradients of these factors go, likewise; then, when they are written, on to the modules'.
  LowRankGradient gradients(Exec& ex) const;
  void share_gradients(Exec& ex, const LowRankGradient& dw) const;

 private:
  bool is_alone() const;
  Shape joined_a() const;
  Shape joined_b() const;
  TensorView place_of_b(const TensorView& joined, const AdaptedModule& module) const;
};

}  // namespace upmoe
