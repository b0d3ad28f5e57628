#pragma once
// Writes a whole token file at once, for small ones; data/tokenize.py is the tool for text.

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

// document_ends: exclusive and rising, the last one = tokens.size(); empty = one document. eos_id -1 = none. Tokens
// are written as given, also beyond vocab_size: the reader is who must not trust them, nor numbers of the mask (empty:
// none) other than 0 and 1. Replaces an existing file.
void write_token_file(const std::filesystem::path& path, std::span<const std::uint32_t> tokens,
                      std::vector<std::int64_t> document_ends, std::int64_t vocab_size,
                      std::int64_t eos_id = -1, const std::string& tokenizer_sha256 = std::string(64, '0'),
                      std::span<const std::uint8_t> loss_mask = {});

}  // namespace upmoe
