#pragma once
// Whether the kernels for all experts at once compute them, or a product for each (expert_products.h).

#include <string>

#include "kernels/core/kernel_paths.h"
#include "kernels/cuda/choose/gpu.h"
#include "kernels/ops/experts.h"

namespace upmoe::cuda {

struct ExpertFfnDescription {
  ExpertsPath wish = ExpertsPath::kAuto;
  ops::ExpertShape shape;
};

struct ExpertFfnChoice {
  bool fused = false;
  std::string reason;  // why not, where it was asked for; to be said once
};

ExpertFfnChoice choose(const ExpertFfnDescription& d, const Gpu& gpu);
std::string words_of(const ExpertFfnDescription& d);
std::string words_of(const ExpertFfnChoice& c);

}  // namespace upmoe::cuda
