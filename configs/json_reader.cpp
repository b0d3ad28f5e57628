#include "configs/json_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

namespace upmoe {
namespace {

using nlohmann::json;

// Looks at the structure alone: the DOM parser keeps the last of duplicate keys in silence.
class StructureCheck : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    // Keys of each open object on the way down; a list has an empty set, which no key reaches.
    if (keys_.back().insert(name).second) return true;
    problem = fmt::format("the key '{}' is given twice", name);
    return false;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& e) override {
    const std::string_view words = e.what();  // "[name.of.the.exception] parse error at ..."
    const std::size_t behind = words.find("] ");
    problem = fmt::format("not valid JSON: {}",
                          behind == std::string_view::npos ? words : words.substr(behind + 2));
    return false;
  }
  std::string problem;

 private:
  static constexpr std::size_t kDepth = 32;
  bool enter() {
    keys_.emplace_back();
    if (keys_.size() <= kDepth) return true;
    problem = fmt::format("nested deeper than {} levels", kDepth);
    return false;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }
  std::vector<std::set<std::string>> keys_;
};

std::string shown(const json& value) {
  const std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  constexpr std::size_t kLongest = 60;
  return text.size() > kLongest ? text.substr(0, kLongest) + "..." : text;
}

// Nothing for what is no whole number in 64 bits; the library gives -1 and 2^63 without a word.
std::optional<std::int64_t> whole(const json& value) {
  if (value.is_number_unsigned()) {
    const auto u = value.get<std::uint64_t>();
    if (u > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return std::nullopt;
    return static_cast<std::int64_t>(u);
  }
  if (value.is_number_integer()) return value.get<std::int64_t>();
  return std::nullopt;
}

}  // namespace

struct JsonObject::Impl {
  json root = json::object();
};

JsonObject::JsonObject(const std::string& text, const std::string& where, Problems& problems)
    : impl_(std::make_unique<Impl>()), where_(where), problems_(problems) {
  if (!is_valid_utf8(text)) {
    problems_.add(where_, "is not valid UTF-8");
    return;
  }
  StructureCheck structure;
  if (!json::sax_parse(text, &structure)) {
    problems_.add(where_, structure.problem.empty() ? "not valid JSON" : structure.problem);
    return;
  }
  json root = json::parse(text);
  if (root.is_object()) {
    impl_->root = std::move(root);
  } else {
    problems_.add(where_, fmt::format("expected a JSON object, found {}", shown(root)));
  }
}

JsonObject::~JsonObject() = default;

bool JsonObject::has(const std::string& key) const {
  const auto it = impl_->root.find(key);
  return it != impl_->root.end() && !it->is_null();
}

bool JsonObject::is_null(const std::string& key) const {
  const auto it = impl_->root.find(key);
  return it != impl_->root.end() && it->is_null();
}

std::vector<std::string> JsonObject::keys() const {
  std::vector<std::string> all;
  for (const auto& [key, value] : impl_->root.items()) all.push_back(key);
  return all;
}

void JsonObject::refuse(const std::string& key, const std::string& text) {
  problems_.add(where_, key + ": " + text);
}

const void* JsonObject::find(const std::string& key, bool required) {
  if (has(key)) return &*impl_->root.find(key);
  if (required) refuse(key, "is missing");
  return nullptr;
}

std::optional<std::int64_t> JsonObject::integer(const std::string& key, std::int64_t least, std::int64_t most,
                                                bool required) {
  const auto* value = static_cast<const json*>(find(key, required));
  if (value == nullptr) return std::nullopt;
  const std::optional<std::int64_t> number = whole(*value);
  if (number && *number >= least && *number <= most) return number;
  refuse(key, fmt::format("found {}, expected a whole number from {} to {}", shown(*value), least, most));
  return std::nullopt;
}

std::optional<double> JsonObject::number(const std::string& key, bool required) {
  const auto* value = static_cast<const json*>(find(key, required));
  if (value == nullptr) return std::nullopt;
  if (value->is_number() && std::isfinite(value->get<double>())) return value->get<double>();
  refuse(key, fmt::format("found {}, expected a finite number", shown(*value)));
  return std::nullopt;
}

std::optional<bool> JsonObject::truth(const std::string& key, bool required) {
  const auto* value = static_cast<const json*>(find(key, required));
  if (value == nullptr) return std::nullopt;
  if (value->is_boolean()) return value->get<bool>();
  refuse(key, fmt::format("found {}, expected true or false", shown(*value)));
  return std::nullopt;
}

std::optional<std::string> JsonObject::text(const std::string& key, bool required) {
  const auto* value = static_cast<const json*>(find(key, required));
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  refuse(key, fmt::format("found {}, expected a text", shown(*value)));
  return std::nullopt;
}

std::optional<std::vector<std::int64_t>> JsonObject::integers(const std::string& key, std::int64_t least,
                                                              std::int64_t most) {
  const auto* value = static_cast<const json*>(find(key, false));
  if (value == nullptr) return std::nullopt;
  std::vector<std::int64_t> out;
  bool good = value->is_array();
  if (good) {
    for (const json& item : *value) {
      const std::optional<std::int64_t> number = whole(item);
      good = good && number && *number >= least && *number <= most;
      if (good) out.push_back(*number);
    }
  }
  if (good) return out;
  refuse(key,
         fmt::format("found {}, expected a list of whole numbers from {} to {}", shown(*value), least, most));
  return std::nullopt;
}

std::optional<std::vector<std::string>> JsonObject::texts(const std::string& key, bool required) {
  const auto* value = static_cast<const json*>(find(key, required));
  if (value == nullptr) return std::nullopt;
  if (value->is_array() &&
      std::all_of(value->begin(), value->end(), [](const json& item) { return item.is_string(); }))
    return value->get<std::vector<std::string>>();
  refuse(key, fmt::format("found {}, expected a list of texts", shown(*value)));
  return std::nullopt;
}

std::unique_ptr<JsonObject> JsonObject::object(const std::string& key) {
  const auto* value = static_cast<const json*>(find(key, false));
  if (value == nullptr) return nullptr;
  if (value->is_object()) return std::make_unique<JsonObject>(value->dump(), where_ + ": " + key, problems_);
  refuse(key, fmt::format("found {}, expected an object", shown(*value)));
  return nullptr;
}

std::string JsonObject::as_text(const std::string& key) const {
  return has(key) ? impl_->root.find(key)->dump() : std::string();
}

}  // namespace upmoe
