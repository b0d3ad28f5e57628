#include "data/stored_values.h"

#include <bit>
#include <cstring>
#include <type_traits>

namespace upmoe {

namespace {

float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu,
                      mantissa = h & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  // 112 = 127 - 15, the difference of the exponents' biases; 13 = 23 - 10 bits more of fraction.
  if (exponent != 0) return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float magnitude = static_cast<float>(mantissa) * (1.0f / 16777216.0f);  // 2^-24: subnormal
  return sign != 0 ? -magnitude : magnitude;
}

struct Half {
  std::uint16_t bits;
};
float value_of(float v) {
  return v;
}
float value_of(bf16 v) {
  return to_float(v);
}
float value_of(Half v) {
  return half_to_float(v.bits);
}

template <class From, class To>
void convert_to(const std::byte* in, std::int64_t n, To* out) {
  for (std::int64_t i = 0; i < n; ++i) {
    From stored;
    std::memcpy(&stored, in + static_cast<std::size_t>(i) * sizeof(From), sizeof(From));
    if constexpr (std::is_same_v<To, float>) {
      out[i] = value_of(stored);
    } else {
      out[i] = to_bf16(value_of(stored));
    }
  }
}

template <class From>
void convert_from(const std::byte* in, std::int64_t n, TensorView out, std::int64_t at) {
  if (out.dtype == DType::kF32) return convert_to<From>(in, n, out.as<float>() + at);
  convert_to<From>(in, n, out.as<bf16>() + at);
}

}  // namespace

bool is_stored_float(const std::string& dtype) {
  return dtype == "BF16" || dtype == "F32" || dtype == "F16";
}

std::size_t stored_size(const std::string& dtype) {
  return dtype == "F32" ? 4 : 2;
}

void convert_stored(const std::byte* in, const std::string& from, std::int64_t n, TensorView out,
                    std::int64_t at) {
  if ((from == "F32" && out.dtype == DType::kF32) || (from == "BF16" && out.dtype == DType::kBF16)) {
    std::memcpy(out.data + static_cast<std::size_t>(at) * size_of(out.dtype), in,
                static_cast<std::size_t>(n) * size_of(out.dtype));
  } else if (from == "F32") {
    convert_from<float>(in, n, out, at);
  } else if (from == "BF16") {
    convert_from<bf16>(in, n, out, at);
  } else {
    convert_from<Half>(in, n, out, at);
  }
}

}  // namespace upmoe
