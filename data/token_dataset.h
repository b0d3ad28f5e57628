#pragma once
// Token files (HDF5, format upmoe-tokens-1) and the global order of samples.

#include <cstdint>
#include <filesystem>
#include <memory>
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

// Several weighted files as one endless sequence of samples. Sample i is a pure function of (files, weights,
// seed, i): no hidden cursor, so any layout and any resume sees the same order. Within a file, sequence j is
// tokens [j*S, (j+1)*S) and its targets are the same shifted by one; shuffle permutes the sequences anew in
// each epoch (a counter-based bijection, no table); several sources are interleaved so that after any n
// samples each source has given its share within one (sample_order.h).
class TokenDataset {
 public:
  struct Source {
    std::filesystem::path path;
    double weight = 1.0;
  };
  // vocab_size: the model's; a file whose vocabulary is larger, or that holds a token >= vocab_size
  // when read, throws.
  TokenDataset(const std::vector<Source>& sources, std::int64_t seq_len, bool shuffle, std::uint64_t seed,
               std::int64_t vocab_size);
  ~TokenDataset();
  std::int64_t num_sequences() const;                     // of one epoch over all files
  std::vector<std::int64_t> sequences_of_source() const;  // of one epoch, file by file
  std::vector<const TokenFile*> files() const;            // of the sources, in their order
  std::int64_t seq_len() const { return seq_len_; }
  // tokens, targets: seq_len each. documents, positions (both empty, or both seq_len): document number within the
  // sequence and position since the document's start or, for the first one, since the sequence's; both from 0.
  void read(std::int64_t sample, std::span<std::int32_t> tokens, std::span<std::int32_t> targets,
            std::span<std::int32_t> documents, std::span<std::int32_t> positions) const;
  // A digest of what the order depends on (files' sizes, tokenizer, weights, seed, seq_len), kept in
  // checkpoints; where all files have checksums, followed by "-" and a digest of their content.
  std::string fingerprint() const;
  // Whether a run that kept `earlier` goes on with the same data. Contents count where both know them: a file
  // without checksums may be replaced by the same one with checksums.
  bool continues(const std::string& earlier) const;

 private:
  struct Part;
  std::vector<std::unique_ptr<Part>> parts_;
  std::unique_ptr<class SampleOrder> order_;
  std::int64_t seq_len_, vocab_size_;
  bool shuffle_;
  std::uint64_t seed_;
};

}  // namespace upmoe
