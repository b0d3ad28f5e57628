#include "trainer/param_patterns.h"

#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>

#include "configs/nearest_name.h"
#include "data/hf_model.h"
#include "kernels/core/check.h"

namespace upmoe {

namespace {

struct Preset {
  std::string_view name;
  std::vector<Role> roles;
};

const std::array<Preset, 4>& presets() {
  static const std::array<Preset, 4> all{{
      {"experts", {Role::kExpertGateUp, Role::kExpertDown}},
      {"router", {Role::kRouter, Role::kRouterNoise}},
      {"attention",
       {Role::kQuery, Role::kKey, Role::kValue, Role::kQueryBias, Role::kKeyBias, Role::kValueBias,
        Role::kQueryNorm, Role::kKeyNorm, Role::kAttentionOutput}},
      {"shared", {Role::kSharedGate, Role::kSharedGateUp, Role::kSharedDown}},
  }};
  return all;
}

constexpr std::string_view kMark = "@", kOthers = "@non_";  // before a preset's name: it, and all but it

bool is_preset(const std::string& pattern) {
  return pattern.starts_with(kMark);
}

// What a preset catches.
struct Roles {
  const Preset* preset = nullptr;
  bool others = false;
  bool has(Role role) const {
    const std::vector<Role>& roles = preset->roles;
    return (std::find(roles.begin(), roles.end(), role) != roles.end()) != others;
  }
};

Roles roles_of(const std::string& pattern, const std::string& key) {
  const bool others = pattern.starts_with(kOthers);
  const std::string_view name = std::string_view(pattern).substr(others ? kOthers.size() : kMark.size());
  for (const Preset& preset : presets())
    if (preset.name == name) return {&preset, others};
  std::vector<std::string> names;
  for (const std::string_view mark : {kMark, kOthers})
    for (const Preset& preset : presets()) names.push_back(fmt::format("{}{}", mark, preset.name));
  fail(ExitCode::kUsage, "{}: there is no preset '{}'; there are {}", key, pattern, fmt::join(names, ", "));
}

// Patterns, and which of them have caught something.
class Patterns {
 public:
  Patterns(const std::vector<std::string>& patterns, const std::string& key)
      : patterns_(patterns), used_(patterns.size()) {
    for (const std::string& pattern : patterns)
      presets_.push_back(is_preset(pattern) ? roles_of(pattern, key) : Roles{});
  }
  bool match(const std::string& name) {
    return any([&](std::size_t i) {
      return presets_[i].preset == nullptr && fnmatch(patterns_[i].c_str(), name.c_str(), 0) == 0;
    });
  }
  bool match(Role role) {
    return any([&](std::size_t i) { return presets_[i].preset != nullptr && presets_[i].has(role); });
  }
  const std::string* first_unused() const {
    const auto found = std::find(used_.begin(), used_.end(), false);
    return found == used_.end() ? nullptr : &patterns_[static_cast<std::size_t>(found - used_.begin())];
  }

 private:
  template <class Matches>
  bool any(const Matches& matches) {
    bool any = false;
    for (std::size_t i = 0; i < patterns_.size(); ++i)
      if (matches(i)) any = used_[i] = true;
    return any;
  }
  const std::vector<std::string>& patterns_;
  std::vector<Roles> presets_;
  std::vector<bool> used_;
};

constexpr std::size_t kProposed = 3;

// Names to propose for a pattern, which is compared without its wildcards.
std::vector<std::string> names_near(const std::string& pattern, const std::vector<std::string>& names) {
  std::string bare;
  std::copy_if(pattern.begin(), pattern.end(), std::back_inserter(bare),
               [](char c) { return c != '*' && c != '?'; });
  std::vector<std::string> near = nearest_names(bare, names, kProposed);
  if (!near.empty() || bare.empty()) return near;
  return nearest_names(bare, names, kProposed, distance_within);  // a part of a name
}

[[noreturn]] void refuse_unmatched(const std::string& pattern, const std::vector<std::string>& names,
                                   const std::string& key) {
  if (is_preset(pattern))
    fail(ExitCode::kUsage, "{}: '{}' matches no parameter: the model has none of that kind; leave it out",
         key, pattern);
  const std::vector<std::string> near = names_near(pattern, names);
  fail(ExitCode::kUsage,
       "{}: pattern '{}' matches no parameter, neither by our names nor by Hugging Face's{}; "
       "`upmoe inspect` of the model or of a checkpoint lists the names",
       key, pattern,
       near.empty() ? fmt::format(", such as '{}' or '{}'", names.front(), names.back())
                    : fmt::format("; near it: '{}'", fmt::join(near, "', '")));
}

}  // namespace

std::vector<std::string> matched_params(const std::vector<std::string>& patterns, const ModelConfig& config,
                                        const std::string& key) {
  std::vector<std::string> caught, partly, names;
  Patterns wanted(patterns, key);
  for (const ParamSpec& p : make_param_table(config)) {
    if (!p.trained) continue;
    const std::vector<HfTensor> tensors = hf_tensors_of(config, p);
    std::string left, hit;
    // Our parameter may be several tensors on disk (the gates, the ups of all experts): a pattern must match all or
    // none.
    for (const HfTensor& t : tensors) {
      std::string& example = wanted.match(t.name) ? hit : left;
      if (example.empty()) example = t.name;
    }
    // What training adds has no tensor on disk, and our name alone. Both are asked, so that both count as used.
    const bool by_name = wanted.match(p.name), by_role = wanted.match(p.role);
    const bool whole = by_name || by_role || (!tensors.empty() && left.empty());
    if (whole) caught.push_back(p.name);
    if (!whole && !hit.empty())
      partly.push_back(fmt::format("{}, which '{}' is a part of, beside '{}'", p.name, hit, left));
    if (p.layer <= 0) names.push_back(p.name);
    if (p.layer <= 0 && !tensors.empty() && tensors.front().name != p.name)
      names.push_back(tensors.front().name);
  }
  if (const std::string* pattern = wanted.first_unused()) refuse_unmatched(*pattern, names, key);
  if (!partly.empty())
    fail(ExitCode::kUsage,
         "{}: a parameter is taken as a whole, and these patterns match only a part of {}{}; "
         "add a pattern for the rest, or take these out",
         key, partly.front(), partly.size() > 1 ? fmt::format(" (and of {} more)", partly.size() - 1) : "");
  return caught;
}

}  // namespace upmoe
