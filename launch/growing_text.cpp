#include "launch/growing_text.h"

#include <string_view>

namespace upmoe {

namespace {

// What the beginning of a character decodes to, or each of its bytes: up to three, as a fourth would end it.
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
constexpr int kBegun = 3;
constexpr std::size_t kContext = 8, kLongest = 40;  // tokens: that are left when there are more

}  // namespace

std::string GrowingText::since(std::size_t end) {
  if (end <= shown_) return {};
  const std::string fresh = text_.substr(shown_, end - shown_);
  shown_ = end;
  return fresh;
}

// How far a text can change no more.
std::size_t GrowingText::certain() const {
  const std::span<const std::int32_t> all = tokens_;
  std::size_t before = all.size();
  while (before > 0 && bytes_.contains(all[before - 1])) --before;
  if (before < all.size()) return decode_(all.first(before)).size();
  std::string_view text = text_;
  for (int i = 0; i < kBegun && text.ends_with(kReplacement); ++i) text.remove_suffix(kReplacement.size());
  return text.size();
}

void GrowingText::shorten() {
  const std::size_t held_back = text_.size() - shown_;
  const std::span<const std::int32_t> last = std::span(tokens_).last(kContext);
  std::string text = decode_(last);
  if (text.size() <= held_back || !text_.ends_with(text)) return;  // the next token may be a better place
  tokens_ = {last.begin(), last.end()};
  text_ = std::move(text);
  shown_ = text_.size() - held_back;
}

std::string GrowingText::add(std::int32_t token) {
  tokens_.push_back(token);
  text_ = decode_(tokens_);
  std::string fresh = since(certain());
  if (tokens_.size() > kLongest) shorten();
  return fresh;
}

std::string GrowingText::finish() {
  return since(text_.size());
}

}  // namespace upmoe
