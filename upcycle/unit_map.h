#pragma once
// Where the hidden neurons ("units") of an expert come from. A unit is a gate row, an up row and a down
// column; a map speaks of units, so the three cannot come apart, whatever the method.

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace upmoe {

enum class FfnMatrix : std::uint8_t { kGate, kUp, kDown };
const char* name_of(FfnMatrix matrix);  // "gate", "up", "down"

// In place of a source neuron:
inline constexpr std::int32_t kNewUnit = -1;  // drawn anew in gate, up and down
// Random gate and up rows, zero down column: adds nothing, can learn.
inline constexpr std::int32_t kPaddingUnit = -2;

// A permutation of 0..n-1 as a pure function of its arguments.
std::vector<std::int32_t> make_permutation(std::uint64_t seed, int layer, std::int64_t round, std::int32_t n);

// Permutations made once. Safe for several threads.
class PermutationCache {
 public:
  PermutationCache(std::uint64_t seed, std::int32_t width) : seed_(seed), width_(width) {}
  const std::vector<std::int32_t>& get(int layer, std::int64_t round) const;

 private:
  std::uint64_t seed_;
  std::int32_t width_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int, std::int64_t>, std::unique_ptr<const std::vector<std::int32_t>>> made_;
};

// The units of one expert (routed or shared).
struct UnitMap {
  enum class Rule : std::uint8_t {
    kRange,     // neurons begin, begin+1, ...; past the last one: padding
    kWrap,      // the same, wrapping round to neuron 0
    kPermuted,  // the same in the order of the layer's first permutation
    kGiven,     // positions begin, begin+1, ... of `order`
    kShuffle,   // positions begin, begin+1, ... of an endless row of copies, each a fresh permutation of all
                // neurons
    kNew,       // every unit is drawn anew
    kPadding,   // every unit is padding
  };
  Rule rule = Rule::kShuffle;
  std::int64_t source_width = 0, width = 0;  // of the dense FFN and of this expert; need not divide
  std::int64_t begin = 0;
  std::int64_t redrawn = 0;           // units drawn anew out of `width`, whatever the rule says
  std::optional<std::int64_t> noisy;  // units that may get noise out of `width`; empty: all
  bool joint = true;                  // false: gate, up and down each draw sets of their own
  // Of kGiven: all neurons in an order that tokens told; null where a recipe is only described.
  std::shared_ptr<const std::vector<std::int32_t>> order = nullptr;
  int layer = 0;
  std::string name;  // of the expert; keys the choice of redrawn and noisy units

  // Source neuron of a unit before the redraw, or kNewUnit or kPaddingUnit.
  std::int32_t source_of(std::int64_t unit, const PermutationCache& permutations) const;
  // Source of every unit of one matrix after the redraw.
  std::vector<std::int32_t> units_of(FfnMatrix matrix, std::uint64_t seed,
                                     const PermutationCache& permutations) const;
  // Which units of one matrix may get noise, redrawn or not; empty: all.
  std::vector<bool> noisy_units(FfnMatrix matrix, std::uint64_t seed) const;

 private:
  std::vector<bool> chosen_units(const char* purpose, std::int64_t count, FfnMatrix matrix,
                                 std::uint64_t seed) const;
};

// floor(fraction * width), where a product that misses a whole number by rounding alone counts as that number.
std::int64_t redrawn_units(double fraction, std::int64_t width);

}  // namespace upmoe
