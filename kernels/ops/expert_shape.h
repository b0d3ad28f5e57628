#pragma once
// Which experts the fused kernels take, whatever GPU there is: known without one, so that a rehearsal counts them too.

#include <fmt/core.h>

#include <string>

#include "kernels/core/tensor.h"

namespace upmoe::ops {

struct ExpertShape {
  std::int64_t experts = 0, width = 0, neurons = 0;   // e, D, F
  DType dtype = DType::kF32, gradient = DType::kF32;  // of the weights
};

// Tiles of the kernels in kernels/cuda/sm90, and their tables; kernels/cuda/experts.cpp holds them to those.
constexpr std::int64_t kExpertColumns = 256, kExpertNeurons = 128, kMostFusedExperts = 256;

// Empty where they take it.
inline std::string why_not_fused(const ExpertShape& s) {
  if (s.dtype != DType::kBF16)
    return fmt::format("weights are {}, not bf16 (train.precision)", name_of(s.dtype));
  if (s.gradient != DType::kBF16)
    return fmt::format("gradients are {}, not bf16 (parallel.reduce)", name_of(s.gradient));
  if (s.width % kExpertColumns != 0)
    return fmt::format("the model's width is {}, no multiple of {}", s.width, kExpertColumns);
  if (s.neurons % kExpertNeurons != 0)
    return fmt::format("an expert has {} neurons here, no multiple of {}", s.neurons, kExpertNeurons);
  if (s.experts > kMostFusedExperts)
    return fmt::format("there are {} experts here, more than {}", s.experts, kMostFusedExperts);
  return {};
}

}  // namespace upmoe::ops
