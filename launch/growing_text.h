#pragma once
// A text that grows token by token, shown as far as it is certain: a character may take several tokens.
//
// What tokens decode to depends on those before them: a text's first word has no blank, a character has several bytes.
// So the last tokens that were shown are decoded again with every new one, but no more than a few dozen of them:
//
//   shown and forgotten | shown, decoded again | new
//                         the context: its text is known, what is behind it is what the new token adds
//
// Some tokenizers decode a run of tokens for single bytes as one: all of it is a text, or each of its bytes a
// replacement character. So a character that was whole becomes none when the first byte of the next one comes, and
// nothing of the run is certain before it ends.
//
// The context is cut to its last tokens only where their text alone is the end of what was shown, so not within a
// character, and not where nothing but control tokens would be left.

#include <cstdint>
#include <functional>
#include <set>
#include <span>
#include <string>
#include <vector>

namespace upmoe {

// The text of tokens, in UTF-8.
using DecodeTokens = std::function<std::string(std::span<const std::int32_t> tokens)>;

class GrowingText {
 public:
  // `bytes`: the tokens for single bytes of a tokenizer that decodes a run of them as one; empty for others.
  explicit GrowingText(DecodeTokens decode, std::set<std::int32_t> bytes = {})
      : decode_(std::move(decode)), bytes_(std::move(bytes)) {}
  // What is new; may be empty.
  std::string add(std::int32_t token);
  // What was held back.
  std::string finish();

 private:
  std::string since(std::size_t end);
  std::size_t certain() const;
  void shorten();

  DecodeTokens decode_;
  std::set<std::int32_t> bytes_;
  std::vector<std::int32_t> tokens_;  // the context and what is new
  std::string text_;                  // of them
  std::size_t shown_ = 0;             // of that, bytes
};

}  // namespace upmoe
