#pragma once
// AdamW over the slices this rank owns: fp32 moments, and fp32 masters beside bf16 weights (with fp32 weights
// the weight is its own master).

#include <string>
#include <vector>

#include "kernels/ops/adamw.h"
#include "parallel/mesh.h"
#include "trainer/model/param_store.h"

namespace upmoe {

struct OwnedSlice {  // flat views of length param->owned.size()
  const StoredParam* param = nullptr;
  TensorView weight, grad;  // into the ParamStore
  TensorView master, m, v;  // fp32; master is `weight` itself when that is fp32
};

class Optimizer {
 public:
  struct Config {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    double clip = 1.0;  // 0 = none
  };
  Optimizer(const ParamStore& params, Config config, Device device);

  // Masters from the current weights, moments zero: call after the weights were loaded or initialised.
  void reset(Exec& ex);
  // Global gradient norm over all parameters, each counted once. Collective over `world`.
  double gradient_norm(Exec& ex, Communicator& world) const;
  // Clips by `norm` and updates the owned slices; `step` counts from 1.
  void update(Exec& ex, double lr, double norm, std::int64_t step);
  // Name of the first parameter of which this rank's owned gradient is not finite; empty when all are.
  std::string first_nonfinite(Exec& ex) const;
  const std::vector<OwnedSlice>& slices() const { return slices_; }
  bool has_masters() const { return masters_; }
  std::size_t bytes() const { return state_.bytes(); }

 private:
  Config config_;
  bool masters_ = false;
  Buffer state_;
  std::vector<OwnedSlice> slices_;
};

}  // namespace upmoe
