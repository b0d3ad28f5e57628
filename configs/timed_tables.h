#pragma once
// What tables of choices that a tool timed on a GPU have in common as text: a list `tables`, each of a device, with a
// list of lines (product_algorithms.h, expert_variants.h).

#include <array>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/core.h>

#include "configs/schema.h"

namespace upmoe {

using ReadItem = std::function<void(const YamlNode& node, Problems& problems)>;

// A required key of the schema's section: a list, whose items are read one by one. By hand: a schema knows lists of
// words alone.
void add_list(Schema& schema, const std::string& name, ReadItem read_item);

// Every table of the text. Throws Error(kUsage) that lists everything wrong, with its line.
void read_timed_tables(std::string_view yaml, const std::string& where, const ReadItem& read_table);

// What a tool timed, into its file. Throws Error(kBadInput) where that cannot be written.
void write_timed_tables(const std::filesystem::path& file, std::string_view yaml);

// The value that `words` has for `text`; a problem, and the first, where it has none.
template <class T, std::size_t kWords>
T read_word(const std::array<std::pair<std::string_view, T>, kWords>& words, const std::string& text,
            const std::string& where, Problems& problems) {
  std::string all;
  for (const auto& [word, value] : words) {
    if (text == word) return value;
    all += fmt::format("{}{}", all.empty() ? "" : ", ", word);
  }
  problems.add(where, fmt::format("'{}' is none of {}", text, all));
  return words[0].second;
}

}  // namespace upmoe
