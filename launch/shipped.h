#pragma once
// The folders of what the project ships and commands take by a short name.

#include "configs/shipped_file.h"

namespace upmoe {

inline const ShippedFolder kMachines{std::filesystem::path(UPMOE_SOURCE_DIR) / "configs" / "machines",
                                     ".yaml", "machine"};

}  // namespace upmoe
