#include "data/token_file_format.h"

#include <fmt/format.h>

#include <algorithm>

#include "data/crc.h"

namespace upmoe {

std::string token_file_summary(const TokenFileFacts& f) {
  return fmt::format("{} vocab_size {} eos_id {} tokenizer_sha256 {} tokens {} documents {}\n",
                     kTokenFileFormat, f.vocab_size, f.eos_id, f.tokenizer_sha256, f.num_tokens,
                     f.num_documents);
}

std::uint32_t token_file_checksum(const TokenFileFacts& facts, std::span<const std::int64_t> document_ends,
                                  std::span<const std::uint32_t> chunks,
                                  std::span<const std::uint32_t> loss_mask_chunks) {
  const std::string summary = token_file_summary(facts);
  const std::uint32_t first = crc32(summary.data(), summary.size());
  const std::uint32_t tokens = crc32(chunks.data(), chunks.size_bytes(),
                                     crc32(document_ends.data(), document_ends.size_bytes(), first));
  return crc32(loss_mask_chunks.data(), loss_mask_chunks.size_bytes(), tokens);
}

namespace {

template <class T>
std::vector<std::uint32_t> sums_of(std::span<const T> values) {
  std::vector<std::uint32_t> sums;
  for (; !values.empty(); values = values.subspan(std::min(values.size(), kTokenFileChunk))) {
    const auto chunk = values.first(std::min(values.size(), kTokenFileChunk));
    sums.push_back(crc32(chunk.data(), chunk.size_bytes()));
  }
  return sums;
}

}  // namespace

std::vector<std::uint32_t> checksums_of_chunks(std::span<const std::uint32_t> tokens) {
  return sums_of(tokens);
}
std::vector<std::uint32_t> checksums_of_chunks(std::span<const std::uint8_t> loss_mask) {
  return sums_of(loss_mask);
}

}  // namespace upmoe
