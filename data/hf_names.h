#pragma once
// Our parameters as the tensors that transformers writes: the family names them (configs/families), their shapes and
// parts follow from the parameter's dims.

#include <cstdint>
#include <string>
#include <vector>

#include "configs/families/family.h"
#include "parallel/layout.h"

namespace upmoe {

// One tensor on disk and the part of one of our parameters it holds: in Qwen2's mixtures, for
// layers.3.moe.gate_up_EF2D, expert 7, the gates, model.layers.3.mlp.experts.7.gate_proj.weight. `part` is that
// part as a box of the global parameter; its row-major order is the order of the elements on disk.
//
// A tensor on disk may hold several parts, of one parameter (all experts) or of several (queries, keys and values):
// there is one of these for each, with the name and the shape of the whole.
struct HfTensor {
  std::string name;
  std::vector<std::int64_t> shape;  // on disk
  Box part;
  std::int64_t begin = 0;  // the part's first element in the tensor
  // Its last two dims lie the other way round on disk; three in all, the first of extent 1.
  bool transposed = false;
  Half half = Half::kWhole;
  std::int64_t expert = -1;  // -1: not of one routed expert
  // Written in fp32 whatever the dtype of the others, as transformers keeps it (ParamSpec::fp32).
  bool fp32 = false;
  // Part of no parameter: transformers makes the modules of a shared expert of width 0, too, a gate included.
  // Written as zeros; a file need not hold it, and its values change nothing.
  bool zeros = false;
  std::int64_t elements() const;  // of the tensor on disk
};
// Those of one parameter, named as transformers writes them; none of a buffer that the family does not have.
std::vector<HfTensor> hf_tensors_of(const ModelConfig& config, const ParamSpec& param);
// Every tensor of a model in the order in which transformers' state dict lists them (embedding, layers, norm, head).
std::vector<HfTensor> hf_tensors_of(const ModelConfig& config);

}  // namespace upmoe
