#pragma once
// The library that computes products on the CPU.

#include <string>

namespace upmoe::ops {

// "oneDNN 2.6.0", the one that was loaded.
std::string product_library();

}  // namespace upmoe::ops
