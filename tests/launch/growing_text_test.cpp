// What is shown of an answer while it comes is, all together, the text of all its tokens, at a cost in their number.

#include "launch/growing_text.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <set>

#include "kernels/core/philox.h"

namespace upmoe {
namespace {

using Tokens = std::vector<std::int32_t>;

// Everything that is shown; how many tokens were decoded for it.
struct Shown {
  std::string text;
  std::size_t decoded = 0, empty = 0, most_at_once = 0;
};

Shown show(const Tokens& tokens, const DecodeTokens& decode) {
  Shown shown;
  GrowingText growing([&](std::span<const std::int32_t> some) {
    shown.decoded += some.size();
    shown.most_at_once = std::max(shown.most_at_once, some.size());
    return decode(some);
  });
  for (const std::int32_t token : tokens) {
    const std::string fresh = growing.add(token);
    shown.empty += fresh.empty() ? 1 : 0;
    shown.text += fresh;
  }
  shown.text += growing.finish();
  return shown;
}

std::uint32_t drawn(std::uint64_t seed, std::size_t i) {
  return philox(seed, i)[0];
}

// A byte a token: a character that is cut off is one replacement character, as is every byte that can begin none.
std::string of_bytes(std::span<const std::int32_t> tokens) {
  std::string text;
  for (std::size_t i = 0; i < tokens.size();) {
    const auto lead = static_cast<unsigned>(tokens[i]);
    const std::size_t length = lead >= 0xF8 ? 1 : lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    std::size_t n = 1;
    while (n < length && i + n < tokens.size() && (tokens[i + n] & 0xC0) == 0x80) ++n;
    if (lead < 0x80 || (length > 1 && n == length)) {
      for (std::size_t k = 0; k < n; ++k) text += static_cast<char>(tokens[i + k]);
    } else {
      text += "\xEF\xBF\xBD";
    }
    i += n;
  }
  return text;
}

Tokens bytes_of(const std::string& text) {
  Tokens tokens;
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

TEST(GrowingText, OfCharactersOfManyBytes) {
  const std::array<std::string, 5> characters{"a", " ", "\xC3\xA9", "\xE6\xBC\xA2", "\xF0\x9F\x98\x80"};
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    std::string text;
    for (std::size_t i = 0; i < 400; ++i) text += characters[drawn(seed, i) % characters.size()];
    const Tokens tokens = bytes_of(text);
    const Shown shown = show(tokens, of_bytes);
    EXPECT_EQ(shown.text, text);
    EXPECT_LT(shown.decoded, 60 * tokens.size()) << "linear";
    EXPECT_LT(shown.most_at_once, 80u);
  }
}

// Tokens below 256 are bytes: a run of them is a text, or each of them a replacement character.
std::string of_fallback(std::span<const std::int32_t> tokens) {
  std::string text;
  for (std::size_t i = 0; i < tokens.size();) {
    std::size_t end = i;
    while (end < tokens.size() && tokens[end] < 256) ++end;
    if (end == i) {
      text += fmt::format(" w{}", tokens[i++]);
      continue;
    }
    const std::string run = of_bytes(tokens.subspan(i, end - i));
    const bool whole = run.find("\xEF\xBF\xBD") == std::string::npos;
    for (std::size_t k = i; k < end; ++k) text += whole ? std::string() : "\xEF\xBF\xBD";
    text += whole ? run : std::string();
    i = end;
  }
  return text;
}

// "\xE4\xB8\xAD" is whole after three tokens, and three replacement characters more after the fourth.
TEST(GrowingText, OfRunsOfBytesThatAreDecodedAsOne) {
  std::set<std::int32_t> bytes;
  for (int i = 0; i < 256; ++i) bytes.insert(i);
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    Tokens tokens;
    for (std::size_t i = 0; i < 300; ++i) {
      const std::uint32_t u = drawn(seed, i);
      if (u % 3 == 0) tokens.push_back(static_cast<std::int32_t>(300 + u % 50));
      for (const std::int32_t byte : bytes_of(u % 3 == 1 ? "\xE4\xB8\xAD" : "\xC3\xA9"))
        if (u % 11 != 0 || byte != 0xC3) tokens.push_back(byte);  // some of them cut off
    }
    std::string text;
    GrowingText growing(of_fallback, bytes);
    for (const std::int32_t token : tokens) text += growing.add(token);
    text += growing.finish();
    ASSERT_EQ(text, of_fallback(tokens)) << seed;
  }
}

// No half of a character is ever shown, though the whole text ends in one.
TEST(GrowingText, ThatEndsWithinACharacter) {
  Tokens tokens = bytes_of(std::string(100, 'x') + "\xE6\xBC\xA2");
  tokens.pop_back();
  GrowingText growing(of_bytes);
  std::string text;
  for (const std::int32_t token : tokens) text += growing.add(token);
  EXPECT_EQ(text, std::string(100, 'x'));
  EXPECT_EQ(growing.finish(), "\xEF\xBF\xBD");
}

// Bytes that are no text are shown as they come, and cost no more than others.
TEST(GrowingText, OfWhatIsNoText) {
  for (const std::int32_t byte : {0xE6, 0xBC, 0xFF}) {
    const Tokens tokens(2000, byte);
    const Shown shown = show(tokens, of_bytes);
    EXPECT_EQ(shown.text, of_bytes(tokens)) << byte;
    EXPECT_LT(shown.decoded, 60 * tokens.size()) << byte;
  }
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Tokens tokens;
    for (std::size_t i = 0; i < 600; ++i)
      tokens.push_back(std::array{0x41, 0xC3, 0xA9, 0xE6, 0xBC, 0xF0, 0x9F}[drawn(seed, i) % 7]);
    EXPECT_EQ(show(tokens, of_bytes).text, of_bytes(tokens)) << seed;
  }
}

// Words with their blanks before them, of which the first of a text has none; and words joined by blanks; numbers below
// 5 are control tokens, which have no text.
std::string of_words(std::span<const std::int32_t> tokens) {
  std::string text;
  for (const std::int32_t token : tokens)
    if (token >= 5) text += fmt::format("{}w{}", text.empty() ? "" : " ", token);
  return text;
}
std::string of_stripped(std::span<const std::int32_t> tokens) {
  std::string text;
  for (const std::int32_t token : tokens)
    if (token >= 5) text += fmt::format("{}{}", token % 3 == 0 ? "" : " ", token);
  return text.starts_with(' ') ? text.substr(1) : text;
}
// Every fourth number is a full stop, with no blank before it.
std::string of_cleaned(std::span<const std::int32_t> tokens) {
  std::string text;
  for (const std::int32_t token : tokens) {
    if (token < 5) continue;
    if (token % 4 == 0) {
      text += ".";
    } else {
      text += fmt::format("{}w{}", text.empty() ? "" : " ", token);
    }
  }
  return text;
}

// 5 turns capitals on and off, for all that follows: no place between two of them can begin a context.
std::string of_capitals(std::span<const std::int32_t> tokens) {
  std::string text;
  bool capitals = false;
  for (const std::int32_t token : tokens) {
    if (token == 5) capitals = !capitals;
    if (token > 5) text += fmt::format("{}{}", capitals ? 'W' : 'w', token);
  }
  return text;
}

TEST(GrowingText, WhoseTokensKnowWhatStandsBeforeThem) {
  for (const auto& decode : {of_words, of_stripped, of_cleaned, of_capitals})
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      Tokens tokens;
      for (std::size_t i = 0; i < 600; ++i) tokens.push_back(static_cast<std::int32_t>(drawn(seed, i) % 40));
      // A long run of control tokens, which are no context.
      std::fill(tokens.begin() + 200, tokens.begin() + 290, 1);
      const Shown shown = show(tokens, decode);
      EXPECT_EQ(shown.text, decode(tokens)) << seed;
      EXPECT_LT(shown.most_at_once, 300u) << "the context and what cannot begin one";
    }
}

// A token is shown when it is certain, not later.
TEST(GrowingText, IsShownAtOnce) {
  Tokens tokens;
  for (std::int32_t i = 0; i < 300; ++i) tokens.push_back(5 + i % 30);
  EXPECT_EQ(show(tokens, of_words).empty, 0u);
}

TEST(GrowingText, CostsALittleForEveryToken) {
  Tokens tokens(4000, 7);
  const Shown shown = show(tokens, of_words);
  EXPECT_LT(shown.decoded, 50u * tokens.size());
  EXPECT_EQ(shown.text, of_words(tokens));
}

TEST(GrowingText, OfNothing) {
  GrowingText growing(of_words);
  EXPECT_EQ(growing.finish(), "");
  EXPECT_EQ(growing.add(1), "");
  EXPECT_EQ(growing.finish(), "");
}

}  // namespace
}  // namespace upmoe
