#pragma once
// A token file (HDF5, format upmoe-tokens-1) for reading. Its structure is read without the HDF5 library, which
// trusts what it reads (hdf5_structure.h); every size is compared with the file. Tokens are read by position, not
// mapped: a file that becomes shorter is an error with a name, not a signal.

#include <cstddef>
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
  bool checksummed() const { return !tokens_.checksums.empty(); }
  std::int64_t checksum() const { return checksum_; }  // of the whole content; 0 without checksums
  // Tokens [first, first + tokens.size()).
  void read(std::int64_t first, std::span<std::uint32_t> tokens) const;
  // Whether the file says of each token if it counts as a target, and what it says of tokens
  // [first, first + mask.size()): 1, or 0 for those that do not.
  bool has_loss_mask() const { return loss_mask_.bytes > 0; }
  void read_loss_mask(std::int64_t first, std::span<std::uint8_t> mask) const;
  void verify() const;  // reads all of it; also refuses tokens beyond vocab_size

 private:
  // A number for each token.
  struct Column {
    const char* what = "";                      // of it, for messages
    std::uint64_t at = 0, bytes = 0;            // offset in the file, and of one number; 0: not there
    std::vector<std::uint32_t> checksums = {};  // by chunk; empty: unknown
    mutable std::vector<char> verified = {};    // by chunk
  };
  [[noreturn]] void bad(const std::string& what) const;
  void check_description();
  void check_document_ends() const;
  void check_unchanged() const;
  void check_chunk(const Column& column, std::size_t chunk) const;
  void read_column(const Column& column, std::int64_t first, std::span<std::byte> numbers) const;

  PosixFile file_;
  Column tokens_{.what = "tokens"}, loss_mask_{.what = "numbers of loss_mask"};
  std::int64_t num_tokens_ = 0, vocab_size_ = 0, eos_id_ = -1, checksum_ = 0;
  std::string tokenizer_sha256_;
  std::vector<std::int64_t> document_ends_;
  mutable std::mutex mutex_;  // of the stamp, and of which chunks are verified
  mutable PosixFile::Stamp opened_;
};

}  // namespace upmoe
