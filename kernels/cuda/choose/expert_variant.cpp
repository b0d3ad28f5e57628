#include "kernels/cuda/choose/expert_variant.h"

#include <fmt/format.h>

namespace upmoe::cuda {

ExpertVariant choose(const ExpertVariantDescription& d, const Gpu& gpu) {
  static const ExpertVariants none;
  return upmoe::choose(d.table == nullptr ? none : *d.table, gpu.device, d.shape);
}

std::string words_of(const ExpertVariantDescription& d) {
  const ExpertProductShape& s = d.shape;
  return fmt::format("kernel {} of {} experts of {} neurons, width {}", name_of(s.kernel), s.experts,
                     s.neurons, s.width);
}

}  // namespace upmoe::cuda
