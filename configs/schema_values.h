#pragma once
// Scalars of a YAML tree as values. What cannot be read is named in `problems` and gives nothing.

#include <cstdint>
#include <optional>
#include <string>

#include "configs/schema.h"

namespace upmoe {

std::optional<std::int64_t> integer_of(const YamlNode& node, const std::string& key, const NumberCheck& check,
                                       Problems& problems);
std::optional<double> number_of(const YamlNode& node, const std::string& key, const NumberCheck& check,
                                Problems& problems);
std::optional<bool> truth_of(const YamlNode& node, const std::string& key, Problems& problems);
std::optional<std::string> text_of(const YamlNode& node, const std::string& key, const TextCheck& check,
                                   Problems& problems);
// The place of a name among those that are built.
std::optional<std::size_t> choice_of(const YamlNode& node, const std::string& key, const NameList& names,
                                     Problems& problems);
std::string range_words(const NumberCheck& check);  // "at least 1", "0 to 1", empty without limits

}  // namespace upmoe
