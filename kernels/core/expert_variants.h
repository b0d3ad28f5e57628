#pragma once
// Which variant of the experts' fused kernels is taken: a table of those that a tool timed
// (tests/bench/time_variants.cpp) names the fastest for some shapes on some devices. Bits do not depend on it.

#include <map>
#include <string>
#include <string_view>

#include "kernels/core/expert_variant.h"

namespace upmoe {

// Of all experts of a rank together: `rows` are tokens times choices.
struct ExpertProductShape {
  ExpertKernel kernel = ExpertKernel::kUp;
  std::int64_t experts = 0, width = 0, neurons = 0, rows = 0;
  auto operator<=>(const ExpertProductShape&) const = default;
};

using VariantOfShape = std::map<ExpertProductShape, ExpertVariant>;
struct ExpertVariants {
  std::map<std::string, VariantOfShape, std::less<>> tables;  // by the device's name, "NVIDIA H200"
};

// Among the table's shapes that differ in their rows alone, that of the nearest number of them, by no more than a
// factor of two; else the first variant that is compiled and can compute the shape. A variant that is not compiled, or
// cannot, is an Error(kUsage) with words.
ExpertVariant choose(const ExpertVariants& variants, std::string_view device,
                     const ExpertProductShape& shape);

// Why a table must not name it: in words, empty where it may.
std::string why_not(const ExpertVariant& variant, const ExpertProductShape& shape);

std::string words_of(const ExpertProductShape& shape);

}  // namespace upmoe
