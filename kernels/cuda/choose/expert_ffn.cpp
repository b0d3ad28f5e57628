#include "kernels/cuda/choose/expert_ffn.h"

#include <fmt/format.h>

namespace upmoe::cuda {

namespace {

std::string why_not(const ops::ExpertShape& s, const Gpu& gpu) {
  if (gpu.sm != 90)
    return fmt::format("they are for GPUs of compute capability 9.0, this one has {}.{}", gpu.sm / 10,
                       gpu.sm % 10);
  return ops::why_not_fused(s);
}

}  // namespace

ExpertFfnChoice choose(const ExpertFfnDescription& d, const Gpu& gpu) {
  if (d.wish != ExpertsPath::kFused || d.shape.experts == 0) return {};
  std::string why = why_not(d.shape, gpu);
  if (!why.empty())
    return {false, "kernels.experts: fused: " + why + "; a product for each expert takes their place"};
  return {true, {}};
}

std::string words_of(const ExpertFfnDescription& d) {
  return fmt::format("{} experts of {} neurons, width {}, {}, gradients {}", d.shape.experts, d.shape.neurons,
                     d.shape.width, name_of(d.shape.dtype), name_of(d.shape.gradient));
}

std::string words_of(const ExpertFfnChoice& c) {
  return c.fused ? "kernels for all experts at once" : "a product for each";
}

}  // namespace upmoe::cuda
