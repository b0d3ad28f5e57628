#pragma once
// config.json in tests: changed by a key, read, and the words with which it is refused.

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "configs/model_config.h"
#include "kernels/core/check.h"

namespace upmoe::test {

inline nlohmann::json with(nlohmann::json j, const std::string& key, nlohmann::json value) {
  j[key] = std::move(value);
  return j;
}
inline nlohmann::json without(nlohmann::json j, const std::string& key) {
  j.erase(key);
  return j;
}

inline ModelConfig parse(const nlohmann::json& j) {
  return parse_model_config(j.dump(), "config.json");
}
// Empty where the text is read.
inline std::string refusal_of(const std::string& text) {
  try {
    parse_model_config(text, "config.json");
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    return e.what();
  }
  return "";
}
inline std::string refusal(const nlohmann::json& j) {
  return refusal_of(j.dump());
}

}  // namespace upmoe::test
