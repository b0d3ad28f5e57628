#include "upcycle/unit_map.h"

#include <cmath>
#include <numeric>

#include "kernels/core/check.h"
#include "kernels/core/philox.h"

namespace upmoe {
namespace {

// Uniform in [0, n): the upper half of a 64 x 64 bit product; its bias is below 2^-32 for 32-bit n.
std::int64_t uniform_below(std::uint64_t key, std::uint64_t counter, std::int64_t n) {
  __extension__ using Wide = unsigned __int128;
  const Philox4 c = philox(key, counter);
  const std::uint64_t bits = (std::uint64_t{c[1]} << 32) | c[0];
  return static_cast<std::int64_t>((Wide{bits} * static_cast<std::uint64_t>(n)) >> 64);
}

// Marks `count` of `n` places, each set of places equally likely (the first steps of a Fisher-Yates shuffle).
std::vector<bool> choose(std::uint64_t key, std::int64_t count, std::int64_t n) {
  std::vector<std::int32_t> place(static_cast<std::size_t>(n));
  std::iota(place.begin(), place.end(), 0);
  std::vector<bool> chosen(static_cast<std::size_t>(n), false);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t j = i + uniform_below(key, static_cast<std::uint64_t>(i), n - i);
    std::swap(place[static_cast<std::size_t>(i)], place[static_cast<std::size_t>(j)]);
    chosen[static_cast<std::size_t>(place[static_cast<std::size_t>(i)])] = true;
  }
  return chosen;
}

}  // namespace

const char* name_of(FfnMatrix matrix) {
  switch (matrix) {
    case FfnMatrix::kGate:
      return "gate";
    case FfnMatrix::kUp:
      return "up";
    case FfnMatrix::kDown:
      return "down";
  }
  fail(ExitCode::kFailure, "no such FFN matrix");
}

std::vector<std::int32_t> make_permutation(std::uint64_t seed, int layer, std::int64_t round,
                                           std::int32_t n) {
  const std::uint64_t key = philox_key(seed, fmt::format("layers.{}.permutation.{}", layer, round));
  std::vector<std::int32_t> p(static_cast<std::size_t>(n));
  std::iota(p.begin(), p.end(), 0);
  for (std::int32_t i = n - 1; i > 0; --i) {
    const std::int64_t j = uniform_below(key, static_cast<std::uint64_t>(i), std::int64_t{i} + 1);
    std::swap(p[static_cast<std::size_t>(i)], p[static_cast<std::size_t>(j)]);
  }
  return p;
}

const std::vector<std::int32_t>& PermutationCache::get(int layer, std::int64_t round) const {
  const std::lock_guard lock(mutex_);
  auto& slot = made_[{layer, round}];
  if (slot == nullptr) {
    slot = std::make_unique<const std::vector<std::int32_t>>(make_permutation(seed_, layer, round, width_));
  }
  return *slot;
}

// Three experts of width 4 from a dense FFN of 5 neurons (begin = 0, 4, 8):
//
//   kRange     0 1 2 3 | 4 - - - | - - - -      -: padding
//   kWrap      0 1 2 3 | 4 0 1 2 | 3 4 0 1
//   kPermuted  p q r s | t p q r | s t p q
//   kShuffle   p q r s | t p'q'r'| s't'p"q"     p..t, p'..t': the first, the second permutation of 0..4
std::int32_t UnitMap::source_of(std::int64_t unit, const PermutationCache& permutations) const {
  UPMOE_CHECK(unit >= 0 && unit < width, "unit {} of {}", unit, width);
  const std::int64_t position = begin + unit;
  switch (rule) {
    case Rule::kRange:
      return position < source_width ? static_cast<std::int32_t>(position) : kPaddingUnit;
    case Rule::kWrap:
      return static_cast<std::int32_t>(position % source_width);
    case Rule::kPermuted:
      return permutations.get(layer, 0)[static_cast<std::size_t>(position % source_width)];
    case Rule::kGiven:
      UPMOE_CHECK(order != nullptr, "{}: no tokens were looked at", name);
      return order->at(static_cast<std::size_t>(position));
    case Rule::kShuffle:
      return permutations.get(layer,
                              position / source_width)[static_cast<std::size_t>(position % source_width)];
    case Rule::kNew:
      return kNewUnit;
    case Rule::kPadding:
      return kPaddingUnit;
  }
  fail(ExitCode::kFailure, "no such unit rule");
}

std::vector<std::int32_t> UnitMap::units_of(FfnMatrix matrix, std::uint64_t seed,
                                            const PermutationCache& permutations) const {
  std::vector<std::int32_t> units(static_cast<std::size_t>(width));
  for (std::int64_t j = 0; j < width; ++j) {
    units[static_cast<std::size_t>(j)] = source_of(j, permutations);
  }
  if (redrawn == 0) return units;
  const std::vector<bool> chosen = chosen_units("redrawn", redrawn, matrix, seed);
  for (std::size_t j = 0; j < units.size(); ++j) {
    if (chosen[j]) units[j] = kNewUnit;
  }
  return units;
}

std::vector<bool> UnitMap::noisy_units(FfnMatrix matrix, std::uint64_t seed) const {
  return noisy ? chosen_units("noisy", *noisy, matrix, seed) : std::vector<bool>{};
}

// The set's name is its key. Joint, all three matrices have one name and so one set: whole neurons are new. Apart, a
// neuron may get a new gate row and keep its up row.
std::vector<bool> UnitMap::chosen_units(const char* purpose, std::int64_t count, FfnMatrix matrix,
                                        std::uint64_t seed) const {
  std::string set = name + "." + purpose;
  if (!joint) set += std::string(".") + name_of(matrix);
  return choose(philox_key(seed, set), count, width);
}

std::int64_t redrawn_units(double fraction, std::int64_t width) {
  return static_cast<std::int64_t>(std::floor(fraction * static_cast<double>(width) + 1e-9));
}

}  // namespace upmoe
