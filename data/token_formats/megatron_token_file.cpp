#include "data/token_formats/megatron_token_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <utility>

#include "data/crc.h"
#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

static_assert(std::endian::native == std::endian::little, "numbers are read as they are");

constexpr std::string_view kMark{"MMIDIDX\0\0", 9};
constexpr std::uint64_t kVersion = 1, kHeaderBytes = 34;
constexpr std::uint64_t kSequenceBytes = sizeof(std::int32_t) + sizeof(std::int64_t),
                        kBoundaryBytes = sizeof(std::int64_t);
constexpr std::int64_t kBlock = std::int64_t{1} << 16;  // numbers of the index read at a time
constexpr const char* kTokensEnd = ".bin";
constexpr const char* kIndexEnd = ".idx";

struct NoToken {
  std::size_t at = 0;
  std::int64_t value = 0;
};

// Tokens of type T as 32 bits; the first number that cannot be a token ends it.
template <class T>
std::optional<NoToken> widen(std::span<const std::byte> from, std::span<std::uint32_t> to) {
  for (std::size_t i = 0; i < to.size(); ++i) {
    T number{};
    std::memcpy(&number, from.data() + i * sizeof(T), sizeof(T));
    const auto value = static_cast<std::int64_t>(number);
    if (value < 0 || value > std::numeric_limits<std::uint32_t>::max()) return NoToken{i, value};
    to[i] = static_cast<std::uint32_t>(value);
  }
  return {};
}

// The other file of the two, which must be there.
fs::path beside(const fs::path& path, const char* end) {
  fs::path other = path;
  other.replace_extension(end);
  std::error_code unknown;  // then opening it says what is wrong
  if (other != path && fs::exists(path, unknown) && !fs::exists(other, unknown) && !unknown)
    fail(ExitCode::kBadInput,
         "{}: {} is missing; by its name this is one half of an indexed data set of Megatron-LM, "
         "PREFIX{} with the tokens and PREFIX{}; token files in HDF5 have other names",
         path.string(), other.string(), kTokensEnd, kIndexEnd);
  return other;
}

}  // namespace

struct MegatronTokenType {
  std::uint8_t code;
  const char* name;
  std::uint64_t bytes;                                                                    // of a token
  std::optional<NoToken> (*widen)(std::span<const std::byte>, std::span<std::uint32_t>);  // null: no integers
};

namespace {

constexpr std::array kTypes{MegatronTokenType{1, "uint8", 1, &widen<std::uint8_t>},
                            MegatronTokenType{2, "int8", 1, &widen<std::int8_t>},
                            MegatronTokenType{3, "int16", 2, &widen<std::int16_t>},
                            MegatronTokenType{4, "int32", 4, &widen<std::int32_t>},
                            MegatronTokenType{5, "int64", 8, &widen<std::int64_t>},
                            MegatronTokenType{6, "float64", 8, nullptr},
                            MegatronTokenType{7, "float32", 4, nullptr},
                            MegatronTokenType{8, "uint16", 2, &widen<std::uint16_t>},
                            MegatronTokenType{9, "uint32", 4, &widen<std::uint32_t>}};

}  // namespace

// PREFIX.idx from its beginning to its end, with a digest of what was read. Its counts are those of the file's length.
class MegatronIndex {
 public:
  explicit MegatronIndex(const fs::path& path) : file_(PosixFile::open_read(path)), bytes_(file_.size()) {
    if (bytes_ < kHeaderBytes) bad(fmt::format("{} bytes, its header alone has {}", bytes_, kHeaderBytes));
    std::array<char, kMark.size()> mark{};
    read(std::as_writable_bytes(std::span(mark)));
    if (std::string_view(mark.data(), mark.size()) != kMark)
      bad("is no index of Megatron-LM: it does not begin with MMIDIDX");
    if (const auto version = number<std::uint64_t>(); version != kVersion)
      bad(fmt::format("version {}, expected {}", version, kVersion));
    const auto code = number<std::uint8_t>();
    const auto found =
        std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& t) { return t.code == code; });
    if (found == kTypes.end()) bad(fmt::format("type {} of tokens, expected 1 to {}", code, kTypes.size()));
    if (found->widen == nullptr)
      bad(fmt::format("tokens of type {} ({}), expected integers", code, found->name));
    type_ = &*found;
    const auto sequences = number<std::uint64_t>();
    check_counts(sequences, number<std::uint64_t>());
  }
  [[noreturn]] void bad(const std::string& what) const {
    fail(ExitCode::kBadInput, "{}: {}", file_.path().string(), what);
  }
  const MegatronTokenType& type() const { return *type_; }
  std::int64_t sequences() const { return sequences_; }
  std::int64_t boundaries() const { return boundaries_; }
  std::string digest() const { return fmt::format("{} bytes {:08x}", bytes_, crc_); }

  // use(i, number) of the next `count` numbers.
  template <class T, class Use>
  void each(std::int64_t count, const Use& use) {
    std::vector<T> block;
    for (std::int64_t first = 0; first < count; first += kBlock) {
      block.resize(static_cast<std::size_t>(std::min(kBlock, count - first)));
      read(std::as_writable_bytes(std::span(block)));
      for (std::size_t i = 0; i < block.size(); ++i) use(first + static_cast<std::int64_t>(i), block[i]);
    }
  }

 private:
  void read(std::span<std::byte> out) {
    file_.read(at_, out);
    crc_ = crc32c(out.data(), out.size(), crc_);
    at_ += out.size();
  }
  template <class T>
  T number() {
    T value{};
    read(std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  void check_counts(std::uint64_t sequences, std::uint64_t boundaries) {
    const auto words = [&](const char* end) {
      return fmt::format("{} bytes, which {} sequences and {} document boundaries do not give{}", bytes_,
                         sequences, boundaries, end);
    };
    const std::uint64_t left = bytes_ - kHeaderBytes;
    if (sequences > left / kSequenceBytes || boundaries > left / kBoundaryBytes) bad(words(""));
    const std::uint64_t expected = sequences * kSequenceBytes + boundaries * kBoundaryBytes;
    if (left == expected + sequences && sequences > 0)
      bad(
          words(": it has a mode for each sequence, as sets of several "
                "kinds of data have, of which text alone is read"));
    if (left != expected) bad(words(""));
    sequences_ = static_cast<std::int64_t>(sequences);
    boundaries_ = static_cast<std::int64_t>(boundaries);
  }

  PosixFile file_;
  std::uint64_t bytes_, at_ = 0;
  std::uint32_t crc_ = 0;
  const MegatronTokenType* type_ = nullptr;
  std::int64_t sequences_ = 0, boundaries_ = 0;
};

bool MegatronTokenFile::takes(const fs::path& path) {
  return path.extension() == kTokensEnd || path.extension() == kIndexEnd;
}

MegatronTokenFile::MegatronTokenFile(const fs::path& path)
    : TokenFile(beside(path, kTokensEnd)),
      tokens_(PosixFile::open_read(this->path())),
      opened_(tokens_.stamp()) {
  MegatronIndex index(beside(path, kIndexEnd));
  type_ = &index.type();
  if (opened_.bytes % type_->bytes != 0)
    bad(fmt::format("{} bytes are no whole number of tokens of {} bytes ({})", opened_.bytes, type_->bytes,
                    type_->name));
  num_tokens_ = static_cast<std::int64_t>(opened_.bytes / type_->bytes);
  if (num_tokens_ == 0) bad("holds no tokens");
  const std::vector<std::int64_t> begins = read_sequences(index, index.sequences());
  read_documents(index, index.boundaries(), begins);
  identity_ = fmt::format("{} bytes, index {}", opened_.bytes, index.digest());
}

// The token that each sequence begins with, and last the number of all: sequences lie one behind the other, as
// Megatron-LM writes them.
std::vector<std::int64_t> MegatronTokenFile::read_sequences(MegatronIndex& index, std::int64_t count) {
  std::vector<std::int64_t> begins{0};
  begins.reserve(static_cast<std::size_t>(count) + 1);
  index.each<std::int32_t>(count, [&](std::int64_t i, std::int32_t length) {
    if (length < 0 || length > num_tokens_ - begins.back())
      index.bad(
          fmt::format("sequence {} has {} tokens, expected 0 to {}, which is what {} has behind the others",
                      i, length, num_tokens_ - begins.back(), path().string()));
    begins.push_back(begins.back() + length);
  });
  if (begins.back() != num_tokens_)
    index.bad(fmt::format("its {} sequences have {} tokens, but {} has {}", count, begins.back(),
                          path().string(), num_tokens_));
  index.each<std::int64_t>(count, [&](std::int64_t i, std::int64_t at) {
    const std::int64_t expected =
        begins[static_cast<std::size_t>(i)] * static_cast<std::int64_t>(type_->bytes);
    if (at != expected)
      index.bad(fmt::format("sequence {} begins at byte {}, expected {}, where the one before it ends", i, at,
                            expected));
  });
  return begins;
}

void MegatronTokenFile::read_documents(MegatronIndex& index, std::int64_t count,
                                       const std::vector<std::int64_t>& begins) {
  const auto sequences = static_cast<std::int64_t>(begins.size()) - 1;
  std::int64_t before = 0;
  index.each<std::int64_t>(count, [&](std::int64_t i, std::int64_t sequence) {
    if (i == 0 ? sequence != 0 : sequence < before || sequence > sequences)
      index.bad(fmt::format("document {} begins with sequence {}, expected {} to {}", i, sequence, before,
                            i == 0 ? 0 : sequences));
    before = sequence;
    const std::int64_t end = begins[static_cast<std::size_t>(sequence)];
    if (end > (document_ends_.empty() ? 0 : document_ends_.back())) document_ends_.push_back(end);
  });
  if (before != sequences)
    index.bad(fmt::format("the last document ends before sequence {}, expected {} (all of them)", before,
                          sequences));
}

void MegatronTokenFile::read(std::int64_t first, std::span<std::uint32_t> tokens) const {
  check_range(first, static_cast<std::int64_t>(tokens.size()));
  if (tokens.empty()) return;
  if (const PosixFile::Stamp now = tokens_.stamp(); now != opened_) bad_change(opened_.bytes, now.bytes);
  std::vector<std::byte> numbers(tokens.size() * type_->bytes);
  tokens_.read(static_cast<std::uint64_t>(first) * type_->bytes, std::span(numbers));
  if (const std::optional<NoToken> wrong = type_->widen(numbers, tokens))
    bad(fmt::format("token {} is {}, which is no token", first + static_cast<std::int64_t>(wrong->at),
                    wrong->value));
}

void MegatronTokenFile::read_loss_mask(std::int64_t, std::span<std::uint8_t>) const {
  UPMOE_CHECK(false, "{} has no loss mask", path().string());
}

}  // namespace upmoe
