#pragma once
// Groups of experts that routers choose first: how many there may be, for configurations as for kernels.

namespace upmoe {

inline constexpr int kMostExpertGroups = 32;

}  // namespace upmoe
