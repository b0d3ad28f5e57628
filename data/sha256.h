#pragma once
// SHA-256 (FIPS 180-4), for the digests of tokenizers that token files carry.

#include <string>
#include <string_view>

namespace upmoe {

std::string sha256(std::string_view bytes);  // 64 lower-case hexadecimal digits

}  // namespace upmoe
