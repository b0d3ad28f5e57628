#pragma once
// A JSON object to be written: it goes on from a text, keys that are set keep the place that they have in it.

#include <cstddef>
#include <memory>
#include <string>

namespace upmoe {

class JsonWriter {
 public:
  explicit JsonWriter(const std::string& text = "{}");  // one JSON object; anything else is a broken contract
  ~JsonWriter();
  JsonWriter(const JsonWriter&) = delete;

  bool has(const std::string& key) const;            // null counts
  std::size_t length(const std::string& key) const;  // of a list; 0 when there is none
  // bool, int, int64, double, std::string, std::vector<int>, std::vector<std::string>
  template <class T>
  void set(const std::string& key, const T& value);
  void set(const std::string& key, const char* value) { set(key, std::string(value)); }
  void set(const std::string& key, const JsonWriter& value);
  void set_null(const std::string& key);
  void erase(const std::string& key);
  std::string text() const;  // indented, with a newline at the end

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace upmoe
