#pragma once
// Token files as one sequence of samples: their global order.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "data/token_file.h"

namespace upmoe {

inline constexpr std::int32_t kIgnoredTarget = -1;  // as in kernels/ops/loss.h

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
    bool loss_mask = false;  // targets that the file's mask leaves out do not count
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
  bool masks_targets() const;  // of any source
  std::int64_t counted_targets(std::int64_t sample) const;
  // tokens, targets: seq_len each; a target that does not count is kIgnoredTarget. documents, positions (both empty, or
  // both seq_len): document number within the sequence and position since the document's start or, for the first one,
  // since the sequence's; both from 0.
  void read(std::int64_t sample, std::span<std::int32_t> tokens, std::span<std::int32_t> targets,
            std::span<std::int32_t> documents, std::span<std::int32_t> positions) const;
  // A digest of what the order depends on (files' sizes, tokenizer, weights, seed, seq_len), kept in
  // checkpoints; where all files have an identity, followed by "-" and a digest of those.
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
