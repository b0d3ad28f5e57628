#include "trainer/freeze.h"

#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <iterator>

#include "configs/nearest_name.h"
#include "data/hf_model.h"
#include "kernels/core/check.h"

namespace upmoe {

namespace {

bool matches(const std::string& pattern, const std::string& name) {
  return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
}

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

[[noreturn]] void refuse_unmatched(const std::string& pattern, const std::vector<std::string>& names) {
  const std::vector<std::string> near = names_near(pattern, names);
  fail(ExitCode::kUsage,
       "freeze: pattern '{}' matches no parameter, neither by our names nor by Hugging Face's{}; "
       "`upmoe inspect` of the model or of a checkpoint lists the names",
       pattern,
       near.empty() ? fmt::format(", such as '{}' or '{}'", names.front(), names.back())
                    : fmt::format("; near it: '{}'", fmt::join(near, "', '")));
}

}  // namespace

std::vector<std::string> frozen_names(const std::vector<std::string>& patterns, const ModelConfig& config) {
  std::vector<std::string> frozen, partly, names;
  std::vector<bool> used(patterns.size());
  const auto any_matches = [&](const std::string& name) {
    bool any = false;
    for (std::size_t i = 0; i < patterns.size(); ++i)
      if (matches(patterns[i], name)) any = used[i] = true;
    return any;
  };
  std::size_t parameters = 0;
  for (const ParamSpec& p : make_param_table(config)) {
    if (!p.trained) continue;
    ++parameters;
    const std::vector<HfTensor> tensors = hf_tensors_of(config, p);
    std::string left, hit;
    // Our parameter may be several tensors on disk (the gates, the ups of all experts): a pattern must match all or
    // none.
    for (const HfTensor& t : tensors) {
      std::string& example = any_matches(t.name) ? hit : left;
      if (example.empty()) example = t.name;
    }
    // What training adds has no tensor on disk, and our name alone.
    const bool whole = any_matches(p.name) || (!tensors.empty() && left.empty());
    if (whole) frozen.push_back(p.name);
    if (!whole && !hit.empty())
      partly.push_back(fmt::format("{}, which '{}' is a part of, beside '{}'", p.name, hit, left));
    if (p.layer <= 0) names.push_back(p.name);
    if (p.layer <= 0 && !tensors.empty() && tensors.front().name != p.name)
      names.push_back(tensors.front().name);
  }
  for (std::size_t i = 0; i < patterns.size(); ++i)
    if (!used[i]) refuse_unmatched(patterns[i], names);
  if (!partly.empty())
    fail(ExitCode::kUsage,
         "freeze: a parameter freezes as a whole, and these patterns match only a part of {}{}; "
         "add a pattern for the rest, or take these out",
         partly.front(), partly.size() > 1 ? fmt::format(" (and of {} more)", partly.size() - 1) : "");
  if (frozen.size() == parameters)
    fail(ExitCode::kUsage, "freeze: all {} parameters would be frozen, and nothing would train", parameters);
  return frozen;
}

}  // namespace upmoe
