#include "kernels/cuda/choose/expert_ffn.h"

#include <fmt/format.h>

namespace upmoe::cuda {

namespace {

// Tiles of the kernels in kernels/cuda/sm90, and their tables.
constexpr std::int64_t kColumns = 256, kNeurons = 128, kMostExperts = 256;

std::string why_not(const ops::ExpertShape& s, const Gpu& gpu) {
  if (gpu.sm != 90)
    return fmt::format("they are for GPUs of compute capability 9.0, this one has {}.{}", gpu.sm / 10,
                       gpu.sm % 10);
  if (s.dtype != DType::kBF16)
    return fmt::format("weights are {}, not bf16 (train.precision)", name_of(s.dtype));
  if (s.gradient != DType::kBF16)
    return fmt::format("gradients are {}, not bf16 (parallel.reduce)", name_of(s.gradient));
  if (s.width % kColumns != 0)
    return fmt::format("the model's width is {}, no multiple of {}", s.width, kColumns);
  if (s.neurons % kNeurons != 0)
    return fmt::format("an expert has {} neurons here, no multiple of {}", s.neurons, kNeurons);
  if (s.experts > kMostExperts)
    return fmt::format("there are {} experts here, more than {}", s.experts, kMostExperts);
  return {};
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
