#pragma once
// Which of some names a misspelt one may have meant.

#include <string>
#include <vector>

namespace upmoe {

// Anything above `limit` where that is passed: words of very different lengths are not compared at all.
int edit_distance(const std::string& a, const std::string& b, int limit = 1 << 20);
// The same to the stretch of `b` that is nearest to `a`.
int distance_within(const std::string& a, const std::string& b, int limit = 1 << 20);
int closeness_limit(const std::string& name);  // names further away are not worth proposing
// The names within the limit, the nearest first, at most `most`.
using NameDistance = int(const std::string& name, const std::string& candidate, int limit);
std::vector<std::string> nearest_names(const std::string& name, const std::vector<std::string>& candidates,
                                       std::size_t most = 1, NameDistance* distance = edit_distance);

}  // namespace upmoe
