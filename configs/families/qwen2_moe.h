#pragma once

#include "configs/families/family.h"

namespace upmoe {

extern const Family kQwen2Moe;

}  // namespace upmoe
