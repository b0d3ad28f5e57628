#include "kernels/core/expert_variants.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/core/check.h"

namespace upmoe {

namespace {

constexpr std::int64_t kColumns = 256;  // of a block's tile of a weight's gradient; sm90/experts_dweights.cu

bool computes(const ExpertVariant& variant, const ExpertProductShape& s) {
  const bool of_weights = s.kernel == ExpertKernel::kDwGateUp || s.kernel == ExpertKernel::kDwDown;
  return !of_weights || s.width % (variant.blocks * kColumns) == 0;
}

// That of the table whose rows are the nearest, seen as a ratio.
const VariantOfShape::value_type* nearest(const VariantOfShape& table, const ExpertProductShape& shape) {
  ExpertProductShape from = shape;
  from.rows = 0;
  const VariantOfShape::value_type* best = nullptr;
  const auto times = [&](std::int64_t rows) {
    return static_cast<double>(std::max(rows, shape.rows)) /
           static_cast<double>(std::max<std::int64_t>(1, std::min(rows, shape.rows)));
  };
  for (auto at = table.lower_bound(from); at != table.end(); ++at) {
    from.rows = at->first.rows;
    if (from != at->first) break;
    if (times(from.rows) <= 2 && (best == nullptr || times(from.rows) < times(best->first.rows))) best = &*at;
  }
  return best;
}

}  // namespace

ExpertVariant choose(const ExpertVariants& variants, std::string_view device,
                     const ExpertProductShape& shape) {
  const auto table = variants.tables.find(device);
  if (const auto* of_table = table == variants.tables.end() ? nullptr : nearest(table->second, shape)) {
    const std::string why = why_not(of_table->second, of_table->first);
    if (!why.empty())
      fail(ExitCode::kUsage,
           "the table of the experts' kernels (configs/cuda/expert_variants.yaml), {}: {}: {}", device,
           words_of(of_table->first), why);
    return of_table->second;
  }
  const auto compiled = variants_of(shape.kernel);
  const auto found = std::find_if(compiled.begin(), compiled.end(),
                                  [&](const ExpertVariant& v) { return computes(v, shape); });
  UPMOE_CHECK(found != compiled.end(), "no kernel for {}", words_of(shape));
  return *found;
}

std::string why_not(const ExpertVariant& variant, const ExpertProductShape& shape) {
  const auto compiled = variants_of(shape.kernel);
  if (std::find(compiled.begin(), compiled.end(), variant) == compiled.end())
    return fmt::format("{}: not among the variants of this program (kernels/core/expert_variant.h)",
                       words_of(variant));
  if (!computes(variant, shape))
    return fmt::format("{}: the width, {}, is no multiple of {}", words_of(variant), shape.width,
                       variant.blocks * kColumns);
  return {};
}

std::string words_of(const ExpertProductShape& s) {
  return fmt::format("{} of {} experts of {} neurons, width {}, {} rows", name_of(s.kernel), s.experts,
                     s.neurons, s.width, s.rows);
}

}  // namespace upmoe
