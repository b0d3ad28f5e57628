#pragma once
// Two models beside each other, wherever they lie and in whatever form.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/model_source.h"

namespace upmoe {

struct ParamDifference {
  enum class Kind { kValues, kShape, kOnlyInFirst, kOnlyInSecond };
  std::string name;
  Kind kind = Kind::kValues;
  Shape first{}, second{};  // of kShape
  // Of kValues. Elements that are not finite in one of the two enter no distance: they are counted, unless the
  // bits agree.
  double max_abs = 0;
  std::optional<double> relative_l2{};  // none where the first is zero everywhere
  std::int64_t not_finite = 0;
};

// In the order of the first model's parameters, then those of the second alone. Equal ones are left out.
std::vector<ParamDifference> differences(const ModelSource& first, const ModelSource& second);

}  // namespace upmoe
