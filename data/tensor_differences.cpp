#include "data/tensor_differences.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "data/stored_values.h"
#include "kernels/core/check.h"

namespace upmoe {

void TensorDifferences::expect(const std::string& name, const std::vector<std::int64_t>& shape,
                               const SafetensorsEntry* found) {
  expected_.insert(name);
  if (found == nullptr) return add(name, "missing");
  if (found->shape != shape)
    add(name,
        fmt::format("shape [{}], expected [{}]", fmt::join(found->shape, ", "), fmt::join(shape, ", ")));
  if (!is_stored_float(found->dtype))
    add(name, fmt::format("dtype {}, expected BF16, F32 or F16; save it in one of them", found->dtype));
}

void TensorDifferences::throw_if_any(const std::string& what) const {
  constexpr std::size_t kListed = 20;
  if (list_.empty()) return;
  std::string text;
  for (std::size_t i = 0; i < std::min(kListed, list_.size()); ++i) text += "\n  " + list_[i];
  if (list_.size() > kListed) text += fmt::format("\n  and {} more", list_.size() - kListed);
  fail(ExitCode::kBadInput, "{}:{}", what, text);
}

}  // namespace upmoe
