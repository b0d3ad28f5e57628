#pragma once
// What every router's backward asks of the balance terms' gradient.

#include "kernels/ops/check_tensor.h"
#include "kernels/ops/routing.h"

namespace upmoe::ops {

inline void check_terms(const Exec& ex, const TermGradient& terms, std::int64_t tokens, std::int64_t experts,
                        std::source_location where = std::source_location::current()) {
  if (!terms.row_T.given()) return check_tensor(ex, terms.aux, {experts}, DType::kF32, "aux", where);
  if (terms.aux.shape.rank != 2) fail_check("aux is [B, E]", where, terms.aux.shape.str());
  check_tensor(ex, terms.aux, {terms.aux.shape[0], experts}, DType::kF32, "aux", where);
  check_tensor(ex, terms.row_T, {tokens}, DType::kI32, "row_T", where);
}

inline double bytes_of(const TermGradient& terms) {
  return bytes_of(terms.aux) + (terms.row_T.given() ? bytes_of(terms.row_T) : 0.0);
}

}  // namespace upmoe::ops
