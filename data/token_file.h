#pragma once
// A token file (HDF5, format upmoe-tokens-1) for reading. Its structure is read without the HDF5 library, which
// trusts what it reads (hdf5_structure.h); every size is compared with the file. Tokens are read by position, not
// mapped: a file that becomes shorter is an error with a name, not a signal.

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "data/posix_file.h"

namespace upmoe {

// One token file, read by position: thread-safe. Damage that the file's checksums find, and a file that
// changes while it is open, are errors of the read that meets them. Errors: Error(kBadInput) naming file,
// found and expected.
class TokenFile {
 public:
  explicit TokenFile(const std::filesystem::path& path);
  TokenFile(const TokenFile&) = delete;
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t vocab_size() const { return vocab_size_; }
  std::int64_t eos_id() const { return eos_id_; }
  const std::string& tokenizer_sha256() const { return tokenizer_sha256_; }
  const std::vector<std::int64_t>& document_ends() const { return document_ends_; }  // exclusive, rising
  const std::filesystem::path& path() const { return file_.path(); }
  // Files of other programs have no checksums (token_file_format.h).
  bool checksummed() const { return !chunk_checksums_.empty(); }
  std::int64_t checksum() const { return checksum_; }  // of the whole content; 0 without checksums
  // Tokens [first, first + tokens.size()).
  void read(std::int64_t first, std::span<std::uint32_t> tokens) const;
  void verify() const;  // reads all tokens; also refuses those beyond vocab_size

 private:
  [[noreturn]] void bad(const std::string& what) const;
  void check_description();
  void check_document_ends() const;
  void check_unchanged() const;
  void check_chunk(std::size_t chunk) const;

  PosixFile file_;
  std::uint64_t tokens_at_ = 0;  // byte offset
  std::int64_t num_tokens_ = 0, vocab_size_ = 0, eos_id_ = -1, checksum_ = 0;
  std::string tokenizer_sha256_;
  std::vector<std::int64_t> document_ends_;
  std::vector<std::uint32_t> chunk_checksums_;
  mutable std::mutex mutex_;  // of the two below
  mutable PosixFile::Stamp opened_;
  mutable std::vector<char> verified_;  // by chunk
};

}  // namespace upmoe
