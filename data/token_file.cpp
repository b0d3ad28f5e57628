#include "data/token_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <system_error>

#include "data/token_formats/hdf5_token_file.h"
#include "data/token_formats/megatron_token_file.h"
#include "kernels/core/check.h"

namespace upmoe {

namespace fs = std::filesystem;

namespace {

constexpr std::int64_t kVerifyTokens = std::int64_t{1} << 18;  // read at a time

struct Format {
  bool (*takes)(const fs::path&);  // by its name: what lies there is the format's own to judge
  std::unique_ptr<const TokenFile> (*open)(const fs::path&);
};

template <class File>
constexpr Format format_of() {
  return {&File::takes, [](const fs::path& path) -> std::unique_ptr<const TokenFile> {
            return std::make_unique<File>(path);
          }};
}

// The first that takes a name opens the file; the last takes every name.
constexpr Format kFormats[] = {format_of<MegatronTokenFile>(), format_of<Hdf5TokenFile>()};

}  // namespace

std::unique_ptr<const TokenFile> open_token_file(const fs::path& path) {
  // Megatron-LM's own options name a set by what its two files begin with.
  std::error_code unknown;
  const fs::path tokens = path.string() + ".bin", index = path.string() + ".idx";
  if (!fs::exists(path, unknown) && fs::exists(tokens, unknown) && fs::exists(index, unknown))
    fail(ExitCode::kBadInput,
         "{}: no such file; the indexed data set of Megatron-LM that begins so is given as {}", path.string(),
         tokens.string());
  return std::find_if(std::begin(kFormats), std::end(kFormats),
                      [&](const Format& f) { return f.takes(path); })
      ->open(path);
}

void TokenFile::bad(const std::string& what) const {
  fail(ExitCode::kBadInput, "{}: {}", path_.string(), what);
}

void TokenFile::bad_change(std::uint64_t bytes_when_opened, std::uint64_t bytes_now) const {
  bad(
      fmt::format("was changed while it was in use ({} bytes, {} when it was opened); restore it and start "
                  "the same command again",
                  bytes_now, bytes_when_opened));
}

void TokenFile::check_range(std::int64_t first, std::int64_t count) const {
  UPMOE_CHECK(first >= 0 && count <= num_tokens_ && first <= num_tokens_ - count, "tokens {} + {} of {}",
              first, count, num_tokens_);
}

void TokenFile::verify() const {
  std::vector<std::uint32_t> tokens;
  std::vector<std::uint8_t> mask;
  for (std::int64_t first = 0; first < num_tokens_; first += kVerifyTokens) {
    tokens.resize(static_cast<std::size_t>(std::min(kVerifyTokens, num_tokens_ - first)));
    read(first, tokens);
    for (std::size_t i = 0; i < tokens.size(); ++i)
      if (vocab_size_ > 0 && static_cast<std::int64_t>(tokens[i]) >= vocab_size_)
        bad(fmt::format("token {} at position {} is beyond the vocabulary of {}", tokens[i],
                        first + static_cast<std::int64_t>(i), vocab_size_));
    mask.resize(has_loss_mask() ? tokens.size() : 0);
    if (has_loss_mask()) read_loss_mask(first, mask);
  }
}

}  // namespace upmoe
