#pragma once
// The keys of a configuration file, listed once. The same table reads a YAML tree and `section.key=value`
// overrides into plain structs, finds the nearest valid key of a misspelt one, writes the resolved
// configuration and prints the reference that tests/configs/frozen_keys.txt freezes.

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "configs/names.h"
#include "configs/yaml_reader.h"

namespace upmoe {

struct NumberCheck {
  double least = -std::numeric_limits<double>::infinity();
  double most = std::numeric_limits<double>::infinity();
  bool above = false;              // strictly above `least`
  bool below = false;              // strictly below `most`
  std::vector<double> built = {};  // not empty: other values are known but not built yet
  bool required = false;
};

struct TextCheck {
  bool required = false;
  bool may_be_empty = false;
  bool path = false;  // a place on the disk: ~ and ${NAME} are filled in (path_text.h)
};

// Holds references to the struct it was made for; lives as long as the reading or writing takes.
class Schema {
 public:
  using Read = std::function<void(const YamlNode& node, const std::string& key, Problems& problems)>;
  using Write = std::function<std::string()>;

  // Of the keys that follow; "" is the top level. One inside another, "outer.inner", comes behind the outer's keys.
  Schema& section(const std::string& name);
  Schema& key(const std::string& name, std::string& target, TextCheck check = {});
  Schema& key(const std::string& name, std::int64_t& target, NumberCheck check = {});
  Schema& key(const std::string& name, int& target, NumberCheck check = {});
  Schema& key(const std::string& name, double& target, NumberCheck check = {});
  Schema& key(const std::string& name, bool& target);
  Schema& key(const std::string& name, std::optional<int>& target, NumberCheck check = {});     // or `auto`
  Schema& key(const std::string& name, std::optional<double>& target, NumberCheck check = {});  // or `auto`
  Schema& key(const std::string& name, std::vector<std::string>& target);
  template <HasNames Enum>
  Schema& key(const std::string& name, Enum& target);  // one of its names
  template <HasNames Enum>
  Schema& key(const std::string& name, std::optional<Enum>& target);                          // or `auto`
  Schema& key(const std::string& name, std::vector<double>& target, NumberCheck check = {});  // or one number
  template <HasNames Enum>
  Schema& key(const std::string& name, std::vector<Enum>& target);  // one or more of its names, each once
  Schema& key(const std::string& name, const std::string& type, bool required, Read read, Write write);
  Schema& says(const std::string& meaning);  // of the key just added: what it does and in which unit

  void read(const YamlNode& root, Problems& problems);
  void apply_override(const std::string& assignment, Problems& problems);  // "section.key=value"
  void check_required(const std::string& origin, Problems& problems) const;

  bool was_given(const std::string& full_key) const { return !field_of(full_key).where.empty(); }
  // "file:3:7: train.steps" or "command line: train.steps" for messages about a key that was read; the bare
  // name when the default holds.
  std::string place_of(const std::string& full_key) const;

  // "optimizer.lr is given twice on the command line; 0.002 counts, not 0.001", one sentence each.
  const std::vector<std::string>& notes() const { return notes_; }

  std::string to_yaml() const;
  std::vector<std::pair<std::string, std::string>> values() const;  // key and value as to_yaml writes them
  std::string reference() const;  // one line per key: name, type and range, default
  std::string help() const;       // for people: the keys by section, with defaults and meanings

 private:
  // A key whose value is one of the names: `set` and `get` speak of its place among the built ones.
  Schema& choice(const std::string& name, const NameList& names, std::function<void(std::size_t)> set,
                 std::function<std::string()> get);
  // Likewise a list of them, or one alone.
  Schema& choices(const std::string& name, const NameList& names,
                  std::function<void(const std::vector<std::size_t>&)> set,
                  std::function<std::vector<std::string>()> get);
  struct Field {
    std::string section, name, type, meaning;
    bool required = false;
    Read read;
    Write write;
    std::string where;     // empty until the key was met
    std::string override;  // what the command line last gave it
    std::string full() const { return section.empty() ? name : section + "." + name; }
  };
  Field* find(const std::string& section, const std::string& name);
  const Field& field_of(const std::string& full_key) const;
  bool has_section(const std::string& name) const;
  void read_section(const std::string& section, const YamlNode& node, Problems& problems);
  void read_into(Field& field, const YamlNode& node, Problems& problems);
  std::string nearest(const std::string& section, const std::string& name) const;

  std::string section_;
  std::vector<Field> fields_;
  std::vector<std::string> notes_;
};

template <HasNames Enum>
Schema& Schema::key(const std::string& name, Enum& target) {
  return choice(
      name, name_list<Enum>(), [&target](std::size_t i) { target = kNames<Enum>.built.begin()[i].value; },
      [&target] { return std::string(name_of(target)); });
}

template <HasNames Enum>
Schema& Schema::key(const std::string& name, std::vector<Enum>& target) {
  return choices(
      name, name_list<Enum>(),
      [&target](const std::vector<std::size_t>& places) {
        target.clear();
        for (const std::size_t i : places) target.push_back(kNames<Enum>.built.begin()[i].value);
      },
      [&target] {
        std::vector<std::string> names;
        for (const Enum value : target) names.emplace_back(name_of(value));
        return names;
      });
}

template <HasNames Enum>
Schema& Schema::key(const std::string& name, std::optional<Enum>& target) {
  NameList names = name_list<Enum>();
  names.built.insert(names.built.begin(), "auto");
  return choice(
      name, names,
      [&target](std::size_t i) {
        target = i == 0 ? std::nullopt : std::optional(kNames<Enum>.built.begin()[i - 1].value);
      },
      [&target] { return std::string(target ? name_of(*target) : "auto"); });
}

}  // namespace upmoe
