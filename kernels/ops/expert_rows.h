#pragma once
// Which of R rows belong to which of e experts.

#include <source_location>
#include <span>

#include "kernels/core/exec.h"

namespace upmoe {

// Rows [offset_e1[i], offset_e1[i + 1]) are expert i's, who may have none; from 0 to R.
struct ExpertRows {
  ConstTensorView offset_e1;                   // int32, where the rows are
  std::span<const std::int64_t> on_host = {};  // the same where the host knows it; else empty
  std::int64_t experts() const { return offset_e1.shape[0] - 1; }
};

namespace ops {

template <class Offset>
void check_offsets(std::span<const Offset> offset_e1, std::int64_t rows,
                   std::source_location where = std::source_location::current()) {
  if (offset_e1.empty() || offset_e1.front() != 0 || offset_e1.back() != rows)
    fail_check("offsets run from 0 to R", where, fmt::format("{} offsets, {} rows", offset_e1.size(), rows));
  for (std::size_t i = 0; i + 1 < offset_e1.size(); ++i)
    if (offset_e1[i] > offset_e1[i + 1])
      fail_check("offsets ascend", where,
                 fmt::format("expert {}: {} to {}", i, offset_e1[i], offset_e1[i + 1]));
}

// What every op of experts asks of its rows, `rows.experts()` being those of the weights.
void check_expert_rows(const Exec& ex, const ExpertRows& rows, std::int64_t experts, std::int64_t total,
                       std::source_location where);

// Of the weights only those of experts with rows are touched; all, for who does not know.
double expert_weight_bytes(const ConstTensorView& w_eNK, const ExpertRows& rows);

}  // namespace ops

}  // namespace upmoe
