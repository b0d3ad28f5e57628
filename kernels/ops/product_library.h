#pragma once
// What computes products on the CPU.

#include <string>

namespace upmoe::ops {

// "oneDNN 2.6.0, bf16 in matrix registers (AMX)": the library that was loaded, and what this build and processor take
// for products of bf16.
std::string product_library();

}  // namespace upmoe::ops
