#pragma once
// A folder of token files for a test, and the words of their errors.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>

#include "data/token_formats/hdf5_token_file.h"
#include "kernels/core/check.h"
#include "tests/support/temporary_directory.h"
#include "tests/support/token_file_writer.h"

namespace upmoe {

class TokenFiles : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }

  // Tokens first, first + 1, ... so that a value tells its place.
  std::filesystem::path write(const std::string& name, std::uint32_t count,
                              std::vector<std::int64_t> ends = {}, std::int64_t vocab = 100000,
                              std::uint32_t first = 0) const {
    std::vector<std::uint32_t> tokens(count);
    std::iota(tokens.begin(), tokens.end(), first);
    write_token_file(dir_ / name, tokens, std::move(ends), vocab, 7, "abc");
    return dir_ / name;
  }

  // The same with a mask of the targets that count.
  std::filesystem::path write_masked(const std::string& name, std::span<const std::uint8_t> mask) const {
    std::vector<std::uint32_t> tokens(mask.size());
    std::iota(tokens.begin(), tokens.end(), 0u);
    write_token_file(dir_ / name, tokens, {}, 100000, 7, "abc", mask);
    return dir_ / name;
  }

  // Message of the error that `f` throws; it must be one of bad input.
  template <class F>
  static std::string message_of(const F& f) {
    try {
      f();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
  }
  static std::string opening(const std::filesystem::path& path) {
    return message_of([&] { open_token_file(path); });
  }

  static std::vector<std::uint32_t> all_tokens(const TokenFile& file) {
    std::vector<std::uint32_t> tokens(static_cast<std::size_t>(file.num_tokens()));
    file.read(0, tokens);
    return tokens;
  }

  const test::TemporaryDirectory folder_;
  const std::filesystem::path dir_ = folder_.path() / "files";
};

}  // namespace upmoe
