#pragma once
// What reader and writers of token files share. The checksums are of what a file says, not of where it says
// it: whatever else changes in the HDF5 file changes nothing that is read. data/token_file_writer.py computes the same.
//   dataset `checksums` (uint32): CRC-32 of each chunk of kTokenFileChunk tokens;
//   dataset `loss_mask_checksums` (uint32), where there is a `loss_mask`: the same of its bytes, one for each token;
//   attribute `checksum` (integer): CRC-32 of the summary line, then document_ends, then `checksums`, then
//   `loss_mask_checksums`.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

inline constexpr const char* kTokenFileFormat = "upmoe-tokens-1";
inline constexpr std::size_t kTokenFileChunk = 16384;  // tokens: 64 KiB

struct TokenFileFacts {
  std::int64_t vocab_size = 0, eos_id = -1;
  std::string tokenizer_sha256;
  std::int64_t num_tokens = 0, num_documents = 0;
};

std::string token_file_summary(const TokenFileFacts& facts);
std::vector<std::uint32_t> checksums_of_chunks(std::span<const std::uint32_t> tokens);
std::vector<std::uint32_t> checksums_of_chunks(std::span<const std::uint8_t> loss_mask);
std::uint32_t token_file_checksum(const TokenFileFacts& facts, std::span<const std::int64_t> document_ends,
                                  std::span<const std::uint32_t> chunks,
                                  std::span<const std::uint32_t> loss_mask_chunks = {});

}  // namespace upmoe
