#include "configs/schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "configs/nearest_name.h"
#include "configs/path_text.h"
#include "configs/schema_values.h"

namespace upmoe {
namespace {

std::string number_type(const std::string& kind, const NumberCheck& check) {
  std::string words = range_words(check);
  if (!check.built.empty()) {
    words += fmt::format("{}built: {}", words.empty() ? "" : "; ", fmt::join(check.built, ", "));
  }
  return words.empty() ? kind : fmt::format("{} ({})", kind, words);
}

std::string text_type(const TextCheck& check) {
  if (!check.path) return "text";
  return check.may_be_empty ? "path or nothing" : "path";
}

std::string choice_type(const NameList& names) {
  std::string words = fmt::format("{}", fmt::join(names.built, " | "));
  if (!names.planned.empty()) words += fmt::format(" (not built yet: {})", fmt::join(names.planned, ", "));
  return words;
}

bool is_auto(const YamlNode& node) {
  return node.kind == YamlNode::Kind::kScalar && !node.quoted && node.text == "auto";
}

}  // namespace

Schema& Schema::section(const std::string& name) {
  section_ = name;
  return *this;
}

// A key binds a name to a variable by two functions: read checks a node and sets the variable, write gives its text
// back. All else (help, to_yaml, comparing two configurations) goes through them.
Schema& Schema::key(const std::string& name, const std::string& type, bool required, Read read, Write write) {
  fields_.push_back({section_, name, type, "", required, std::move(read), std::move(write), "", ""});
  return *this;
}

Schema& Schema::says(const std::string& meaning) {
  fields_.back().meaning = meaning;
  return *this;
}

Schema& Schema::key(const std::string& name, std::string& target, TextCheck check) {
  const bool required = check.required;
  return key(
      name, text_type(check), required,
      [&target, check](const YamlNode& node, const std::string& full, Problems& problems) {
        if (auto value = text_of(node, full, check, problems)) target = *std::move(value);
      },
      [&target, check] { return yaml_quoted(check.path ? path_as_text(target) : target); });
}

Schema& Schema::key(const std::string& name, std::int64_t& target, NumberCheck check) {
  return key(
      name, number_type("whole number", check), check.required,
      [&target, check](const YamlNode& node, const std::string& full, Problems& problems) {
        if (const auto value = integer_of(node, full, check, problems)) target = *value;
      },
      [&target] { return std::to_string(target); });
}

Schema& Schema::key(const std::string& name, int& target, NumberCheck check) {
  NumberCheck bounded = check;
  bounded.least = std::max(check.least, static_cast<double>(std::numeric_limits<int>::min()));
  bounded.most = std::min(check.most, static_cast<double>(std::numeric_limits<int>::max()));
  return key(
      name, number_type("whole number", check), check.required,
      [&target, bounded](const YamlNode& node, const std::string& full, Problems& problems) {
        if (const auto value = integer_of(node, full, bounded, problems)) target = static_cast<int>(*value);
      },
      [&target] { return std::to_string(target); });
}

Schema& Schema::key(const std::string& name, double& target, NumberCheck check) {
  return key(
      name, number_type("number", check), check.required,
      [&target, check](const YamlNode& node, const std::string& full, Problems& problems) {
        if (const auto value = number_of(node, full, check, problems)) target = *value;
      },
      [&target] { return fmt::format("{}", target); });
}

Schema& Schema::key(const std::string& name, bool& target) {
  return key(
      name, "true | false", false,
      [&target](const YamlNode& node, const std::string& full, Problems& problems) {
        if (const auto value = truth_of(node, full, problems)) target = *value;
      },
      [&target] { return std::string(target ? "true" : "false"); });
}

Schema& Schema::key(const std::string& name, std::optional<int>& target, NumberCheck check) {
  NumberCheck bounded = check;
  bounded.most = std::min(check.most, static_cast<double>(std::numeric_limits<int>::max()));
  bounded.least = std::max(check.least, static_cast<double>(std::numeric_limits<int>::min()));
  return key(
      name, "auto | " + number_type("whole number", check), false,
      [&target, bounded](const YamlNode& node, const std::string& full, Problems& problems) {
        if (is_auto(node)) {
          target.reset();
        } else if (const auto value = integer_of(node, full + " (auto or a number)", bounded, problems)) {
          target = static_cast<int>(*value);
        }
      },
      [&target] { return target ? std::to_string(*target) : std::string("auto"); });
}

Schema& Schema::key(const std::string& name, std::optional<double>& target, NumberCheck check) {
  return key(
      name, "auto | " + number_type("number", check), false,
      [&target, check](const YamlNode& node, const std::string& full, Problems& problems) {
        if (is_auto(node)) {
          target.reset();
        } else if (const auto value = number_of(node, full + " (auto or a number)", check, problems)) {
          target = *value;
        }
      },
      [&target] { return target ? fmt::format("{}", *target) : std::string("auto"); });
}

Schema& Schema::key(const std::string& name, std::vector<std::string>& target) {
  return key(
      name, "list of texts", false,
      [&target](const YamlNode& node, const std::string& full, Problems& problems) {
        if (node.kind != YamlNode::Kind::kList) {
          problems.add(node.where, full + ": expected a list of texts, such as [a, b]");
          return;
        }
        std::vector<std::string> items;
        for (const YamlNode& item : node.items) {
          if (auto value = text_of(item, full, {}, problems)) items.push_back(*std::move(value));
        }
        target = std::move(items);
      },
      [&target] {
        std::vector<std::string> quoted;
        for (const std::string& item : target) quoted.push_back(yaml_quoted(item));
        return fmt::format("[{}]", fmt::join(quoted, ", "));
      });
}

namespace {

// A list's items, or the one value that stands for a list of one. An empty list is a problem.
std::vector<const YamlNode*> items_of(const YamlNode& node, const std::string& key, Problems& problems) {
  std::vector<const YamlNode*> items;
  if (node.kind != YamlNode::Kind::kList) return {&node};
  for (const YamlNode& item : node.items) items.push_back(&item);
  if (items.empty()) problems.add(node.where, key + ": the list is empty");
  return items;
}

std::string one_or_list(const std::vector<std::string>& items) {
  return items.size() == 1 ? items.front() : fmt::format("[{}]", fmt::join(items, ", "));
}

}  // namespace

Schema& Schema::key(const std::string& name, std::vector<double>& target, NumberCheck check) {
  return key(
      name, number_type("number", check) + " | list of them", false,
      [&target, check](const YamlNode& node, const std::string& full, Problems& problems) {
        std::vector<double> values;
        for (const YamlNode* item : items_of(node, full, problems))
          if (const auto value = number_of(*item, full, check, problems)) values.push_back(*value);
        if (!values.empty()) target = std::move(values);
      },
      [&target] {
        std::vector<std::string> items;
        for (const double value : target) items.push_back(fmt::format("{}", value));
        return one_or_list(items);
      });
}

Schema& Schema::choices(const std::string& name, const NameList& names,
                        std::function<void(const std::vector<std::size_t>&)> set,
                        std::function<std::vector<std::string>()> get) {
  return key(
      name, choice_type(names) + " | list of them", false,
      [names, set = std::move(set)](const YamlNode& node, const std::string& full, Problems& problems) {
        std::vector<std::size_t> places;
        for (const YamlNode* item : items_of(node, full, problems)) {
          const auto place = choice_of(*item, full, names, problems);
          if (!place) continue;
          if (std::find(places.begin(), places.end(), *place) != places.end())
            problems.add(item->where, fmt::format("{}: {} is given twice", full, names.built[*place]));
          places.push_back(*place);
        }
        if (!places.empty()) set(places);
      },
      [get = std::move(get)] { return one_or_list(get()); });
}

Schema& Schema::choice(const std::string& name, const NameList& names, std::function<void(std::size_t)> set,
                       std::function<std::string()> get) {
  return key(
      name, choice_type(names), false,
      [names, set = std::move(set)](const YamlNode& node, const std::string& full, Problems& problems) {
        if (const auto place = choice_of(node, full, names, problems)) set(*place);
      },
      std::move(get));
}

Schema::Field* Schema::find(const std::string& section, const std::string& name) {
  for (Field& field : fields_) {
    if (field.section == section && field.name == name) return &field;
  }
  return nullptr;
}

bool Schema::has_section(const std::string& name) const {
  return std::any_of(fields_.begin(), fields_.end(),
                     [&](const Field& f) { return !f.section.empty() && f.section == name; });
}

// What the user most likely meant: a key of the same section, one of the same name elsewhere, or, for a name
// at the top level, a section.
std::string Schema::nearest(const std::string& section, const std::string& name) const {
  // Each offer is measured up to the best so far: distances beyond it need not be known.
  int best = closeness_limit(name) + 1;
  std::string choice;
  const auto offer = [&](const std::string& candidate, int distance) {
    if (distance < best) {
      best = distance;
      choice = candidate;
    }
  };
  const std::string prefix = section.empty() ? "" : section + ".";
  for (const Field& f : fields_) {
    const bool same = f.section == section;
    offer(f.full(), edit_distance(name, f.name, best) + (same ? 0 : 1));
    if (!f.section.empty() && f.section.starts_with(prefix))
      offer(f.section, edit_distance(prefix + name, f.section, best));
    if (!section.empty()) offer(f.full(), edit_distance(prefix + name, f.full(), best));
  }
  if (!choice.empty()) return fmt::format("; did you mean {}?", choice);
  std::vector<std::string> valid;
  for (const Field& f : fields_) {
    if (!f.full().starts_with(prefix)) continue;
    const std::string inside = f.full().substr(prefix.size()), shown = inside.substr(0, inside.find('.'));
    if (std::find(valid.begin(), valid.end(), shown) == valid.end()) valid.push_back(shown);
  }
  return fmt::format("; valid here: {}", fmt::join(valid, ", "));
}

void Schema::read_into(Field& field, const YamlNode& node, Problems& problems) {
  field.where = node.where;
  if (node.kind == YamlNode::Kind::kNull) {
    problems.add(node.where, fmt::format("{}: has no value; expected {}", field.full(), field.type));
    return;
  }
  field.read(node, field.full(), problems);
}

void Schema::read(const YamlNode& root, Problems& problems) {
  if (root.kind != YamlNode::Kind::kMap) {
    if (!root.where.empty())
      problems.add(root.where, "expected sections with keys, such as `train: {steps: 10}`");
    return;
  }
  read_section("", root, problems);
}

// The keys of `section`, and the sections inside it.
void Schema::read_section(const std::string& section, const YamlNode& node, Problems& problems) {
  for (const auto& [key, value] : node.entries) {
    const std::string full = section.empty() ? key.text : section + "." + key.text;
    if (Field* field = find(section, key.text)) {
      read_into(*field, value, problems);
    } else if (!has_section(full)) {
      problems.add(key.where, fmt::format("unknown key '{}'{}", full, nearest(section, key.text)));
    } else if (value.kind != YamlNode::Kind::kMap) {
      problems.add(value.where, fmt::format("{}: is a section and needs keys, such as `{}: {{key: value}}`",
                                            full, key.text));
    } else {
      read_section(full, value, problems);
    }
  }
}

void Schema::apply_override(const std::string& assignment, Problems& problems) {
  const std::string where = "command line";
  const std::size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) {
    problems.add(where, fmt::format("'{}' is not section.key=value", assignment));
    return;
  }
  const std::string full = assignment.substr(0, equals), value = assignment.substr(equals + 1);
  std::size_t dot = full.rfind('.');
  if (dot != std::string::npos && !has_section(full.substr(0, dot))) dot = full.find('.');
  const std::string section = dot == std::string::npos ? "" : full.substr(0, dot);
  const std::string name = dot == std::string::npos ? full : full.substr(dot + 1);
  Field* field = find(section, name);
  if (field == nullptr) {
    problems.add(where, has_section(full) ? fmt::format("'{}' is a section; write {}.key=value", full, full)
                                          : fmt::format("unknown key '{}'{}", full, nearest(section, name)));
    return;
  }
  if (!is_valid_utf8(value)) {
    problems.add(where, full + ": the value is not valid UTF-8");
    return;
  }
  // The shell has already undone one layer of quotes, so plain text is taken as it stands; only what opens
  // like a YAML list, map or quoted text is parsed.
  YamlNode node;
  if (!value.empty() && std::string("[{\"'").find(value[0]) != std::string::npos) {
    Problems found;
    node = parse_yaml(value, where, found);
    for (const std::string& text : found.list()) problems.add(full + ": " + text);
    if (!found.empty()) return;
  } else {
    node.kind = YamlNode::Kind::kScalar;
    node.text = value;
    node.where = where;
  }
  // A key of the file may be overridden without a word; two overrides of one key are more likely a slip.
  if (field->where == where && field->override != value) {
    notes_.push_back(fmt::format("{} is given twice on the command line; {} counts, not {}", full, value,
                                 field->override));
  }
  field->override = value;
  read_into(*field, node, problems);
}

void Schema::check_required(const std::string& origin, Problems& problems) const {
  for (const Field& field : fields_) {
    if (field.required && field.where.empty()) {
      problems.add(origin, fmt::format("{} is missing: {}", field.full(), field.type));
    }
  }
}

const Schema::Field& Schema::field_of(const std::string& full_key) const {
  for (const Field& field : fields_) {
    if (field.full() == full_key) return field;
  }
  fail(ExitCode::kFailure, "'{}' is not a key", full_key);
}

std::string Schema::place_of(const std::string& full_key) const {
  const std::string& where = field_of(full_key).where;
  return where.empty() ? full_key : where + ": " + full_key;
}

std::string Schema::to_yaml() const {
  std::string out, section;
  for (const Field& field : fields_) {
    const auto inside = static_cast<std::size_t>(std::count(field.section.begin(), field.section.end(), '.'));
    if (field.section != section) {
      section = field.section;
      if (!section.empty())
        out += std::string(2 * inside, ' ') + section.substr(section.rfind('.') + 1) + ":\n";
    }
    const std::size_t depth = section.empty() ? 0 : inside + 1;
    out += fmt::format("{}{}: {}\n", std::string(2 * depth, ' '), field.name, field.write());
  }
  return out;
}

std::vector<std::pair<std::string, std::string>> Schema::values() const {
  std::vector<std::pair<std::string, std::string>> all;
  for (const Field& field : fields_) all.emplace_back(field.full(), field.write());
  return all;
}

std::string Schema::help() const {
  std::string out;
  for (const Field& field : fields_) {
    out += fmt::format("  {} = {}   [{}]\n      {}\n", field.full(),
                       field.required ? "(required)" : field.write(), field.type, field.meaning);
  }
  return out;
}

std::string Schema::reference() const {
  std::string out;
  for (const Field& field : fields_) {
    out += fmt::format("{} : {} : {}\n", field.full(), field.type,
                       field.required ? "required" : "default " + field.write());
  }
  return out;
}

}  // namespace upmoe
