#pragma once
// Token files for reading: what every format says. The formats stand in data/token_formats, one table of them in
// token_file.cpp.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

// One token file, read by position: thread-safe. Every length in it is compared with the file before it is used. Damage
// that can be found, and a file that changes while it is open, are errors of the read that meets them. Errors:
// Error(kBadInput) naming file, found and expected.
class TokenFile {
 public:
  virtual ~TokenFile() = default;
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;
  virtual const char* format() const = 0;                      // its name, for people
  const std::filesystem::path& path() const { return path_; }  // the file with the tokens
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t vocab_size() const { return vocab_size_; }  // 0: the file does not say
  std::int64_t eos_id() const { return eos_id_; }          // -1: none, or the file does not say
  const std::string& tokenizer_sha256() const { return tokenizer_sha256_; }          // zeros: it does not say
  const std::vector<std::int64_t>& document_ends() const { return document_ends_; }  // exclusive, rising
  virtual bool checksummed() const = 0;  // whether damage to a token is found
  // What tells its contents from others, as far as the file can say without being read whole: kept in checkpoints.
  // Empty: nothing does.
  virtual std::string identity() const = 0;
  // Tokens [first, first + tokens.size()).
  virtual void read(std::int64_t first, std::span<std::uint32_t> tokens) const = 0;
  // Whether the file says of each token if it counts as a target, and what it says of tokens
  // [first, first + mask.size()): 1, or 0 for those that do not.
  virtual bool has_loss_mask() const = 0;
  virtual void read_loss_mask(std::int64_t first, std::span<std::uint8_t> mask) const = 0;
  void verify() const;  // reads all of it; also refuses tokens beyond vocab_size, where that is known

 protected:
  explicit TokenFile(std::filesystem::path path) : path_(std::move(path)) {}
  [[noreturn]] void bad(const std::string& what) const;
  [[noreturn]] void bad_change(std::uint64_t bytes_when_opened, std::uint64_t bytes_now) const;
  void check_range(std::int64_t first, std::int64_t count) const;

  std::int64_t num_tokens_ = 0, vocab_size_ = 0, eos_id_ = -1;
  std::string tokenizer_sha256_ = std::string(64, '0');
  std::vector<std::int64_t> document_ends_;

 private:
  std::filesystem::path path_;
};

// By the format that takes a path of this name.
std::unique_ptr<const TokenFile> open_token_file(const std::filesystem::path& path);

}  // namespace upmoe
