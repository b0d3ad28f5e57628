#pragma once

#include "configs/families/family.h"

namespace upmoe {

extern const Family kDbrx;

}  // namespace upmoe
