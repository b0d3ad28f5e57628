#pragma once
// Which layers of a dense model become mixtures; the others stay dense. As it is written: all · every:N (layers N-1,
// 2N-1, ...) · last:N · first_dense:N (all but the first N) · a list of layers.

#include <cstdint>
#include <string>
#include <vector>

namespace upmoe {

class Problems;
struct YamlNode;

struct LayerChoice {
  enum class Kind : std::uint8_t { kAll, kEvery, kLast, kFirstDense, kList } kind = Kind::kAll;
  int count = 0;            // the N
  std::vector<int> layers;  // of a list, ascending
  bool operator==(const LayerChoice&) const = default;
};

// What cannot be read is a problem and leaves the target as it is.
void read_layer_choice(const YamlNode& node, const std::string& key, Problems& problems, LayerChoice& target);
std::string to_text(const LayerChoice& choice);
// What makes the choice no choice among that many layers, in words; empty when all is well.
std::string problem_of(const LayerChoice& choice, int layers);
std::vector<int> dense_layers(const LayerChoice& choice, int layers);

}  // namespace upmoe
