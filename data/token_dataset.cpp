#include "data/token_dataset.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "data/sample_order.h"
#include "kernels/core/check.h"
#include "kernels/core/philox.h"
#include "kernels/core/tensor.h"

namespace upmoe {

struct TokenDataset::Part {
  explicit Part(const Source& source) : file(open_token_file(source.path)), masked(source.loss_mask) {}
  std::unique_ptr<const TokenFile> file;
  bool masked;
  std::int64_t sequences = 0;
  // Of the targets of a sequence, which are the tokens from the second one on: whether they count.
  std::vector<std::uint8_t> mask(std::int64_t sequence, std::int64_t seq_len) const {
    std::vector<std::uint8_t> counts(static_cast<std::size_t>(seq_len), 1);
    if (masked) file->read_loss_mask(sequence * seq_len + 1, counts);
    return counts;
  }
};

TokenDataset::TokenDataset(const std::vector<Source>& sources, std::int64_t seq_len, bool shuffle,
                           std::uint64_t seed, std::int64_t vocab_size)
    : seq_len_(seq_len), vocab_size_(vocab_size), shuffle_(shuffle), seed_(seed) {
  UPMOE_CHECK(seq_len > 0 && vocab_size > 0, "seq_len {}, vocab_size {}", seq_len, vocab_size);
  if (sources.empty()) fail(ExitCode::kUsage, "data.train: no token file is given");
  std::vector<std::int64_t> sequences;
  std::vector<double> weights;
  for (const Source& source : sources) {
    auto part = std::make_unique<Part>(source);
    const TokenFile& file = *part->file;
    if (source.loss_mask && !file.has_loss_mask())
      fail(
          ExitCode::kBadInput,
          "{}: has no loss mask, which is asked of it; make it with data/tokenize.py --chat, or ask for none "
          "(loss_mask in data.train, data.valid_loss_mask, which is of all held-out files, eval --loss-mask)",
          source.path.string());
    if (file.vocab_size() > vocab_size) {
      fail(ExitCode::kBadInput,
           "{}: its vocabulary of {} tokens is larger than the model's {}; was it made with another "
           "tokenizer?",
           source.path.string(), file.vocab_size(), vocab_size);
    }
    // The targets are the tokens one further, so the last token is nobody's input.
    part->sequences = (file.num_tokens() - 1) / seq_len;
    if (part->sequences == 0) {
      fail(ExitCode::kBadInput, "{}: holds {} tokens; one sequence of {} needs {}", source.path.string(),
           file.num_tokens(), seq_len, seq_len + 1);
    }
    sequences.push_back(part->sequences);
    weights.push_back(source.weight);
    parts_.push_back(std::move(part));
  }
  order_ = std::make_unique<SampleOrder>(std::move(sequences), weights, shuffle, seed);
}

TokenDataset::~TokenDataset() = default;

std::int64_t TokenDataset::num_sequences() const {
  std::int64_t sum = 0;
  for (const auto& part : parts_) sum = checked_add(sum, part->sequences);
  return sum;
}

std::vector<const TokenFile*> TokenDataset::files() const {
  std::vector<const TokenFile*> all;
  for (const auto& part : parts_) all.push_back(part->file.get());
  return all;
}

bool TokenDataset::masks_targets() const {
  return std::any_of(parts_.begin(), parts_.end(), [](const auto& part) { return part->masked; });
}

std::int64_t TokenDataset::counted_targets(std::int64_t sample) const {
  const SampleOrder::Place place = order_->at(sample);
  const Part& part = *parts_[static_cast<std::size_t>(place.source)];
  if (!part.masked) return seq_len_;
  const std::vector<std::uint8_t> counts = part.mask(place.sequence, seq_len_);
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

std::vector<std::int64_t> TokenDataset::sequences_of_source() const {
  std::vector<std::int64_t> all;
  for (const auto& part : parts_) all.push_back(part->sequences);
  return all;
}

namespace {

//   ends 3, 8; begin 1, S 6      token      1 2 | 3 4 5 6
//                                document   0 0 | 1 1 1 1
//                                position   0 1 | 0 1 2 3
//
// Numbers documents and positions of tokens [begin, begin + S) of a file.
void mark_documents(const std::vector<std::int64_t>& ends, std::int64_t begin,
                    std::span<std::int32_t> documents, std::span<std::int32_t> positions) {
  // The first document that ends behind the sequence's first token, that is, the one the token is in.
  auto end = std::upper_bound(ends.begin(), ends.end(), begin);
  std::int32_t document = 0, position = 0;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    if (end != ends.end() && begin + static_cast<std::int64_t>(i) == *end) {
      ++end;
      ++document;
      position = 0;
    }
    documents[i] = document;
    positions[i] = position++;
  }
}

}  // namespace

void TokenDataset::read(std::int64_t sample, std::span<std::int32_t> tokens, std::span<std::int32_t> targets,
                        std::span<std::int32_t> documents, std::span<std::int32_t> positions) const {
  const auto length = static_cast<std::size_t>(seq_len_);
  UPMOE_CHECK(tokens.size() == length && targets.size() == length, "{} tokens, {} targets", tokens.size(),
              targets.size());
  UPMOE_CHECK(documents.size() == positions.size() && (documents.empty() || documents.size() == length),
              "{} documents, {} positions", documents.size(), positions.size());
  const SampleOrder::Place place = order_->at(sample);
  const Part& part = *parts_[static_cast<std::size_t>(place.source)];
  const TokenFile& file = *part.file;
  const std::int64_t begin = place.sequence * seq_len_;
  std::vector<std::uint32_t> in(length + 1);
  file.read(begin, in);
  for (std::size_t i = 0; i <= length; ++i) {
    if (static_cast<std::int64_t>(in[i]) >= vocab_size_) {
      fail(ExitCode::kBadInput,
           "{}: token {} is {}, but the model's vocabulary has {}; the file is damaged or of another "
           "tokenizer",
           file.path().string(), begin + static_cast<std::int64_t>(i), in[i], vocab_size_);
    }
    if (i < length) tokens[i] = static_cast<std::int32_t>(in[i]);
    if (i > 0) targets[i - 1] = static_cast<std::int32_t>(in[i]);
  }
  if (part.masked) {
    const std::vector<std::uint8_t> counts = part.mask(place.sequence, seq_len_);
    for (std::size_t i = 0; i < length; ++i)
      if (counts[i] == 0) targets[i] = kIgnoredTarget;
  }
  if (!documents.empty()) mark_documents(file.document_ends(), begin, documents, positions);
}

std::string TokenDataset::fingerprint() const {
  std::string all =
      fmt::format("tokens-1 seq_len {} shuffle {} seed {}", seq_len_, shuffle_, shuffle_ ? seed_ : 0);
  for (std::size_t k = 0; k < parts_.size(); ++k) {
    const TokenFile& file = *parts_[k]->file;
    all += fmt::format(" file {} {} {} {} parts {}", file.num_tokens(), file.document_ends().size(),
                       file.vocab_size(), file.tokenizer_sha256(), order_->parts()[k]);
    if (parts_[k]->masked) all += " loss_mask";
  }
  const auto digest = [](const std::string& text) {
    return fmt::format("{:016x}{:016x}", philox_key(0, text), philox_key(1, text));
  };
  std::string contents;
  for (const auto& part : parts_) {
    const std::string identity = part->file->identity();
    if (identity.empty()) return digest(all);
    contents += fmt::format(" {}", identity);
  }
  return digest(all) + "-" + digest(contents);
}

bool TokenDataset::continues(const std::string& earlier) const {
  const std::string now = fingerprint();
  const std::size_t order = now.find('-'), earlier_order = earlier.find('-');
  const bool both = order != std::string::npos && earlier_order != std::string::npos;
  return both ? now == earlier : now.substr(0, order) == earlier.substr(0, earlier_order);
}

}  // namespace upmoe
