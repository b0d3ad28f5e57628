#pragma once

#include "configs/families/family.h"

namespace upmoe {

extern const Family kDots1;

}  // namespace upmoe
