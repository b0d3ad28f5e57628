#include "configs/json_writer.h"

#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {

using nlohmann::ordered_json;

struct JsonWriter::Impl {
  ordered_json root;
};

JsonWriter::JsonWriter(const std::string& text)
    : impl_(std::make_unique<Impl>(Impl{ordered_json::parse(text, nullptr, false)})) {
  if (!impl_->root.is_object()) fail(ExitCode::kFailure, "not a JSON object: {}", text);
}

JsonWriter::~JsonWriter() = default;

bool JsonWriter::has(const std::string& key) const {
  return impl_->root.contains(key);
}

std::size_t JsonWriter::length(const std::string& key) const {
  const auto it = impl_->root.find(key);
  return it == impl_->root.end() || !it->is_array() ? 0 : it->size();
}

template <class T>
void JsonWriter::set(const std::string& key, const T& value) {
  impl_->root[key] = value;
}
template void JsonWriter::set(const std::string&, const bool&);
template void JsonWriter::set(const std::string&, const int&);
template void JsonWriter::set(const std::string&, const std::int64_t&);
template void JsonWriter::set(const std::string&, const double&);
template void JsonWriter::set(const std::string&, const std::string&);
template void JsonWriter::set(const std::string&, const std::vector<int>&);
template void JsonWriter::set(const std::string&, const std::vector<std::string>&);

void JsonWriter::set(const std::string& key, const JsonWriter& value) {
  impl_->root[key] = value.impl_->root;
}

void JsonWriter::set_null(const std::string& key) {
  impl_->root[key] = nullptr;
}

void JsonWriter::erase(const std::string& key) {
  impl_->root.erase(key);
}

std::string JsonWriter::text() const {
  return impl_->root.dump(2) + "\n";
}

}  // namespace upmoe
