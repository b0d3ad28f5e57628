#pragma once
// Which token of the whole run a row's draws are of.

#include <cstdint>

#include "kernels/ops/router_draws.h"

namespace upmoe::cpu {

inline std::uint64_t token_of(const TokenDraws& draws, std::int64_t t) {
  return draws.first + static_cast<std::uint64_t>(draws.place_T.as<std::int32_t>()[t]);
}

}  // namespace upmoe::cpu
