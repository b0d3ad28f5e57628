#pragma once
// The values of one JSON object, read strictly: duplicate keys and deep nesting are refused, whole numbers
// are checked before they are narrowed (the JSON library would wrap them), and everything wrong is collected.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "configs/yaml_reader.h"

namespace upmoe {

class JsonObject {
 public:
  // Adds a problem when `text` is not one JSON object; the object is empty then.
  JsonObject(const std::string& text, const std::string& where, Problems& problems);
  ~JsonObject();
  JsonObject(const JsonObject&) = delete;

  bool has(const std::string& key) const;  // present and not null
  bool is_null(const std::string& key) const;
  std::vector<std::string> keys() const;
  // Missing or null: nothing, and a problem if required. Wrong type or out of range: a problem.
  std::optional<std::int64_t> integer(const std::string& key, std::int64_t least, std::int64_t most,
                                      bool required);
  std::optional<double> number(const std::string& key, bool required);
  std::optional<bool> truth(const std::string& key, bool required);
  std::optional<std::string> text(const std::string& key, bool required);
  std::optional<std::vector<std::int64_t>> integers(const std::string& key, std::int64_t least,
                                                    std::int64_t most);
  std::optional<std::vector<std::string>> texts(const std::string& key, bool required);
  // A nested object; null when missing or null. Its problems are told as "WHERE: KEY: ...".
  std::unique_ptr<JsonObject> object(const std::string& key);
  // Any value as compact JSON, for comparing with fixed texts; empty when missing or null.
  std::string as_text(const std::string& key) const;
  void refuse(const std::string& key, const std::string& text);  // "WHERE: key: text"

 private:
  struct Impl;
  const void* find(const std::string& key, bool required);
  std::unique_ptr<Impl> impl_;
  std::string where_;
  Problems& problems_;
};

}  // namespace upmoe
