#pragma once
// What the weights in a model's files are, by the names that its config.json has for it (torch_dtype, dtype).

#include <cstdint>
#include <optional>

#include "configs/names.h"
#include "kernels/core/tensor.h"

namespace upmoe {

enum class FileDType : std::uint8_t { kBf16, kFp32, kFp16 };
template <>
inline constexpr Names<FileDType> kNames<FileDType>{
    .built = {{FileDType::kBf16, "bfloat16"}, {FileDType::kFp32, "float32"}, {FileDType::kFp16, "float16"}}};

// None of what no tensor here holds: fp16 is read, and widened.
inline std::optional<DType> dtype_of(FileDType stored) {
  if (stored == FileDType::kBf16) return DType::kBF16;
  if (stored == FileDType::kFp32) return DType::kF32;
  return std::nullopt;
}

inline FileDType file_dtype_of(DType dtype) {
  UPMOE_CHECK(dtype == DType::kBF16 || dtype == DType::kF32, "no model's file is in {}", name_of(dtype));
  return dtype == DType::kBF16 ? FileDType::kBf16 : FileDType::kFp32;
}

}  // namespace upmoe
