#pragma once
// AdamW over the slices this rank owns. `adamw` keeps fp32 moments, and fp32 masters beside bf16 weights
// (an fp32 weight is its own master). `adamw8bit` codes the moments of large parameters in 8
// bits and keeps no masters for them (kernels/ops/adamw8bit.h); small ones (norms, biases: fewer than 4096
// elements) are as with adamw.

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/ops/adamw8bit.h"
#include "parallel/mesh.h"
#include "trainer/model/param_store.h"

namespace upmoe {

struct OwnedSlice {  // flat views of length param->owned.size()
  const StoredParam* param = nullptr;
  TensorView weight, grad;  // into the ParamStore
  bool coded = false;       // which of the next two lines holds
  TensorView master, m, v;  // fp32; master is `weight` itself when that is fp32
  CodedMoments moments;
  Chance chance;
  std::int64_t begun = 0;  // behind which step the moments began
  std::size_t group = 0;   // of Optimizer::Config::groups, from 1; 0: of none
  double weight_decay = 0;
  bool has_master() const { return !coded && weight.dtype != DType::kF32; }
};

class Optimizer {
 public:
  struct Config {
    double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1;
    double clip = 1.0;     // 0 = none
    bool coded = false;    // adamw8bit
    bool offload = false;  // the state of a GPU's rank lies in pinned memory of the host
    std::uint64_t seed = 0;
    // Parameters with a rate, and perhaps a decay, of their own; no name in two of them.
    struct Group {
      std::vector<std::string> names;
      std::optional<double> weight_decay = {};
    };
    std::vector<Group> groups = {};
  };
  Optimizer(const ParamStore& params, Config config, Device device);

  // Masters from the current weights, moments zero: call after the weights were loaded or initialised.
  void reset(Exec& ex);
  // Of parameters whose moments are zero behind a step that is not the first, as what was frozen until then: bias
  // correction counts from there, as of a run that begins.
  void begin_moments(const std::map<std::string, std::int64_t>& steps);
  // Global gradient norm over all parameters, each counted once. Collective over `world`.
  double gradient_norm(Exec& ex, Communicator& world) const;
  // Clips by `norm` and updates the owned slices; `step` counts from 1. lr: of what is in no group, then of each group.
  void update(Exec& ex, std::span<const double> lr, double norm, std::int64_t step);
  // Name of the first parameter of which this rank's owned gradient is not finite; empty when all are.
  std::string first_nonfinite(Exec& ex) const;
  const std::vector<OwnedSlice>& slices() const { return slices_; }
  std::size_t bytes() const { return state_.bytes() + codes_.bytes(); }

 private:
  void join_group(OwnedSlice& slice) const;
  void bind(OwnedSlice& slice, const StoredParam& p, TensorView floats, TensorView codes);

  Config config_;
  Buffer state_, codes_;
  std::vector<OwnedSlice> slices_;
};

// The moments of a slice to and from fp32 on the host, whatever they are kept in.
void save_moments(Exec& ex, const OwnedSlice& slice, TensorView m, TensorView v);
void load_moments(Exec& ex, const OwnedSlice& slice, ConstTensorView m, ConstTensorView v);

}  // namespace upmoe
