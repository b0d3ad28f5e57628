#pragma once
// Which variant of a fused kernel computes a product of the experts: by the table of those that were timed.

#include <string>

#include "kernels/core/expert_variants.h"
#include "kernels/cuda/choose/gpu.h"

namespace upmoe::cuda {

struct ExpertVariantDescription {
  ExpertProductShape shape;
  const ExpertVariants* table = nullptr;  // null: of none
};

ExpertVariant choose(const ExpertVariantDescription& d, const Gpu& gpu);
// Without the rows, of which every step may have others.
std::string words_of(const ExpertVariantDescription& d);

}  // namespace upmoe::cuda
