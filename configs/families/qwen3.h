#pragma once

#include "configs/families/family.h"

namespace upmoe {

extern const Family kQwen3;

}  // namespace upmoe
