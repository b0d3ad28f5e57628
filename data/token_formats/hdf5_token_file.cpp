#include "data/token_formats/hdf5_token_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

#include "data/crc.h"
#include "data/hdf5_structure.h"
#include "kernels/core/check.h"

namespace upmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "tokens are read as they are");

constexpr std::int64_t kMaxVocab = std::numeric_limits<std::int32_t>::max();

template <class T>
std::vector<T> read_numbers(const PosixFile& file, const Hdf5Structure::Extent& extent) {
  std::vector<T> values(static_cast<std::size_t>(extent.elements));  // not more than the file holds
  file.read(extent.offset, std::as_writable_bytes(std::span(values)));
  return values;
}

}  // namespace

Hdf5TokenFile::Hdf5TokenFile(const std::filesystem::path& path)
    : TokenFile(path), file_(PosixFile::open_read(path)), opened_(file_.stamp()) {
  const Hdf5Structure in(file_);
  if (const std::string format = in.text("format"); format != kTokenFileFormat)
    bad(fmt::format("attribute format is '{}', expected '{}'", format, kTokenFileFormat));
  vocab_size_ = in.integer("vocab_size");
  if (vocab_size_ < 1 || vocab_size_ > kMaxVocab)
    bad(fmt::format("attribute vocab_size is {}, expected 1 to {}", vocab_size_, kMaxVocab));
  eos_id_ = in.integer("eos_id");
  if (eos_id_ < -1 || eos_id_ >= vocab_size_)
    bad(fmt::format("attribute eos_id is {}, expected -1 (none) to {}", eos_id_, vocab_size_ - 1));
  tokenizer_sha256_ = in.text("tokenizer_sha256");
  const Hdf5Structure::Extent tokens = in.contiguous("tokens", sizeof(std::uint32_t), false);
  tokens_.at = tokens.offset;
  tokens_.bytes = sizeof(std::uint32_t);
  num_tokens_ = tokens.elements;
  const Hdf5Structure::Extent ends = in.contiguous("document_ends", sizeof(std::int64_t), true);
  if (ends.elements > num_tokens_)
    bad(fmt::format("{} documents, but {} tokens", ends.elements, num_tokens_));
  document_ends_ = read_numbers<std::int64_t>(file_, ends);
  if (in.has_dataset("loss_mask")) {
    const Hdf5Structure::Extent mask = in.contiguous("loss_mask", sizeof(std::uint8_t), false);
    if (mask.elements != num_tokens_)
      bad(fmt::format("a loss_mask of {} numbers for {} tokens", mask.elements, num_tokens_));
    loss_mask_.at = mask.offset;
    loss_mask_.bytes = sizeof(std::uint8_t);
  }
  // Both or neither: damage to the name of one is not to pass for a file that never had them.
  if (in.has_attribute("checksum") || in.has_dataset("checksums")) {
    checksum_ = in.integer("checksum");
    const auto sums = [&](const char* name) {
      return read_numbers<std::uint32_t>(file_, in.contiguous(name, sizeof(std::uint32_t), false));
    };
    tokens_.checksums = sums("checksums");
    if (has_loss_mask()) loss_mask_.checksums = sums("loss_mask_checksums");
    check_description();
  }
  check_document_ends();
}

void Hdf5TokenFile::check_description() {
  const TokenFileFacts facts{vocab_size_, eos_id_, tokenizer_sha256_, num_tokens_,
                             static_cast<std::int64_t>(document_ends_.size())};
  const std::uint32_t found =
      token_file_checksum(facts, document_ends_, tokens_.checksums, loss_mask_.checksums);
  const std::size_t chunks = (static_cast<std::size_t>(num_tokens_) + kTokenFileChunk - 1) / kTokenFileChunk;
  if (found != checksum_ || tokens_.checksums.size() != chunks ||
      (has_loss_mask() && loss_mask_.checksums.size() != chunks))
    bad(
        fmt::format("damaged, or changed after it was made: the checksum of its attributes and document_ends "
                    "is {:08x}, expected {:08x}; make it anew with data/tokenize.py",
                    found, checksum_));
  for (const Column* column : {&tokens_, &loss_mask_}) column->verified.assign(chunks, 0);
}

void Hdf5TokenFile::check_document_ends() const {
  std::int64_t before = 0;
  for (std::size_t i = 0; i < document_ends_.size(); ++i) {
    if (document_ends_[i] <= before || document_ends_[i] > num_tokens_)
      bad(fmt::format("document_ends[{}] = {}, expected more than {} and at most {}", i, document_ends_[i],
                      before, num_tokens_));
    before = document_ends_[i];
  }
  if (before != num_tokens_)
    bad(fmt::format("the last of document_ends is {}, expected {} (all tokens)", before, num_tokens_));
}

// Somebody else's write into the open file. Where there are checksums they decide; elsewhere nothing can.
void Hdf5TokenFile::check_unchanged() const {
  const PosixFile::Stamp now = file_.stamp();
  if (now == opened_) return;
  if (now.bytes != opened_.bytes || !checksummed()) bad_change(opened_.bytes, now.bytes);
  opened_ = now;
  for (const Column* column : {&tokens_, &loss_mask_})
    std::fill(column->verified.begin(), column->verified.end(), char{0});
}

// A chunk is checked once, before its first use.
void Hdf5TokenFile::check_chunk(const Column& column, std::size_t chunk) const {
  if (column.verified[chunk] != 0) return;
  const std::size_t first = chunk * kTokenFileChunk,
                    count = std::min(kTokenFileChunk, static_cast<std::size_t>(num_tokens_) - first);
  std::vector<std::byte> numbers(count * column.bytes);
  file_.read(column.at + first * column.bytes, std::span(numbers));
  const std::uint32_t found = crc32(numbers.data(), numbers.size());
  if (found != column.checksums[chunk])
    bad(
        fmt::format("{} {} to {} are damaged: checksum {:08x}, expected {:08x}; make it anew with "
                    "data/tokenize.py",
                    column.what, first, first + count - 1, found, column.checksums[chunk]));
  column.verified[chunk] = 1;
}

void Hdf5TokenFile::read_column(const Column& column, std::int64_t first,
                                std::span<std::byte> numbers) const {
  const auto count = static_cast<std::int64_t>(numbers.size() / column.bytes);
  check_range(first, count);
  if (numbers.empty()) return;
  {
    // One thread at a time checks chunks; the reading below needs no lock.
    const std::lock_guard lock(mutex_);
    check_unchanged();
    if (!column.checksums.empty()) {
      const std::size_t begin = static_cast<std::size_t>(first) / kTokenFileChunk,
                        end = static_cast<std::size_t>(first + count - 1) / kTokenFileChunk;
      for (std::size_t chunk = begin; chunk <= end; ++chunk) check_chunk(column, chunk);
    }
  }
  file_.read(column.at + static_cast<std::uint64_t>(first) * column.bytes, numbers);
}

std::string Hdf5TokenFile::identity() const {
  return checksummed() ? std::to_string(checksum_) : "";
}

void Hdf5TokenFile::read(std::int64_t first, std::span<std::uint32_t> tokens) const {
  read_column(tokens_, first, std::as_writable_bytes(tokens));
}

void Hdf5TokenFile::read_loss_mask(std::int64_t first, std::span<std::uint8_t> mask) const {
  UPMOE_CHECK(has_loss_mask(), "{} has no loss mask", path().string());
  read_column(loss_mask_, first, std::as_writable_bytes(mask));
  for (std::size_t i = 0; i < mask.size(); ++i)
    if (mask[i] > 1)
      bad(fmt::format("loss_mask[{}] = {}, expected 0 or 1", first + static_cast<std::int64_t>(i), mask[i]));
}

}  // namespace upmoe
