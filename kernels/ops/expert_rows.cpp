#include "kernels/ops/expert_rows.h"

#include <algorithm>

#include "kernels/ops/check_tensor.h"

namespace upmoe::ops {

void check_expert_rows(const Exec& ex, const ExpertRows& rows, std::int64_t experts, std::int64_t total,
                       std::source_location where) {
  check_tensor(ex, rows.offset_e1, {experts + 1}, DType::kI32, "offset_e1", where);
  if (!rows.on_host.empty()) {
    if (static_cast<std::int64_t>(rows.on_host.size()) != experts + 1)
      fail_check("an offset for each expert, and R", where,
                 fmt::format("{} offsets for {} experts", rows.on_host.size(), experts));
    check_offsets(rows.on_host, total, where);
  }
  if (ex.device.type != DeviceType::kCpu) return;
  const std::span offset_e1(rows.offset_e1.as<std::int32_t>(), static_cast<std::size_t>(experts + 1));
  check_offsets(offset_e1, total, where);
  if (!rows.on_host.empty() && !std::ranges::equal(offset_e1, rows.on_host))
    fail_check("both copies of the offsets agree", where, fmt::format("{} experts", experts));
}

double expert_weight_bytes(const ConstTensorView& w_eNK, const ExpertRows& rows) {
  std::int64_t experts = rows.on_host.empty() ? rows.experts() : 0;
  for (std::size_t i = 0; i + 1 < rows.on_host.size(); ++i)
    experts += rows.on_host[i] < rows.on_host[i + 1] ? 1 : 0;
  return static_cast<double>(experts) * static_cast<double>(w_eNK.shape[1]) *
         static_cast<double>(w_eNK.shape[2]) * static_cast<double>(size_of(w_eNK.dtype));
}

}  // namespace upmoe::ops
