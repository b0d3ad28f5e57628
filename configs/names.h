#pragma once
// What the values of an enum are called in files and messages: one table for each enum, beside it. Who reads a
// configuration compares enums; a text is compared here and nowhere else.

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/check.h"

namespace upmoe {

template <class Enum>
struct Named {
  Enum value;
  const char* name;
};

template <class Enum>
struct Names {
  std::initializer_list<Named<Enum>> built;
  std::initializer_list<const char*> planned = {};  // known, not built yet: values that no enumerator has
};

// The table of an enum is a specialisation of this; an enum without one has no names.
template <class Enum>
inline constexpr std::nullopt_t kNames = std::nullopt;

template <class Enum>
concept HasNames = requires {
  kNames<Enum>.built;
};

template <HasNames Enum>
const char* name_of(Enum value) {
  for (const Named<Enum>& entry : kNames<Enum>.built)
    if (entry.value == value) return entry.name;
  fail(ExitCode::kFailure, "value {} has no name", static_cast<int>(value));
}

template <HasNames Enum>
std::optional<Enum> value_named(std::string_view name) {
  for (const Named<Enum>& entry : kNames<Enum>.built)
    if (entry.name == name) return entry.value;
  return std::nullopt;
}

// A table without its enum, for messages.
struct NameList {
  std::vector<std::string> built, planned;
};
template <HasNames Enum>
NameList name_list() {
  NameList list;
  for (const Named<Enum>& entry : kNames<Enum>.built) list.built.emplace_back(entry.name);
  for (const char* name : kNames<Enum>.planned) list.planned.emplace_back(name);
  return list;
}

}  // namespace upmoe
