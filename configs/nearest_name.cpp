#include "configs/nearest_name.h"

#include <algorithm>
#include <utility>

namespace upmoe {

int edit_distance(const std::string& a, const std::string& b, int limit) {
  if (std::max(a.size(), b.size()) - std::min(a.size(), b.size()) > static_cast<std::size_t>(limit))
    return limit + 1;
  // Levenshtein's table, a row at a time: row[j] is the distance of the first i letters of a and the first j of b.
  std::vector<int> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const int above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

int distance_within(const std::string& a, const std::string& b, int limit) {
  int best = limit + 1;
  for (std::size_t at = 0; at < b.size(); ++at)
    best = std::min(best, edit_distance(a, b.substr(at, a.size()), limit));
  return best;
}

int closeness_limit(const std::string& name) {
  return std::max(2, static_cast<int>(name.size()) / 3);
}

std::vector<std::string> nearest_names(const std::string& name, const std::vector<std::string>& candidates,
                                       std::size_t most, NameDistance* distance) {
  const int limit = closeness_limit(name);
  std::vector<std::pair<int, std::string>> near;
  for (const std::string& candidate : candidates) {
    const int found = distance(name, candidate, limit);
    if (found <= limit) near.emplace_back(found, candidate);
  }
  std::stable_sort(near.begin(), near.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::string> names;
  for (std::size_t i = 0; i < std::min(most, near.size()); ++i) names.push_back(near[i].second);
  return names;
}

}  // namespace upmoe
