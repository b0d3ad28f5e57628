#pragma once

namespace upmoe {

enum class ReduceOp { kSum, kMax, kMin };

}  // namespace upmoe
