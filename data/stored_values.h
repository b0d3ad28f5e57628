#pragma once
// Numbers as safetensors files store them.

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/core/tensor.h"

namespace upmoe {

bool is_stored_float(const std::string& dtype);     // BF16, F32 or F16, which are read
std::size_t stored_size(const std::string& dtype);  // bytes of one of those
// n of them, of dtype `from` -> out[at..] in out's dtype, fp32 or bf16.
void convert_stored(const std::byte* in, const std::string& from, std::int64_t n, TensorView out,
                    std::int64_t at);

}  // namespace upmoe
