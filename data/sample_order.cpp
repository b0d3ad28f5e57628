#include "data/sample_order.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "kernels/core/check.h"
#include "kernels/core/philox.h"

namespace upmoe {
namespace {

// share[k] * period as whole numbers, or nothing where that is not (nearly) exact.
std::vector<std::int64_t> exact_parts(const std::vector<double>& share, std::int64_t period) {
  constexpr double kRounding = 1e-9;  // far above that of the division, far below 1 / kMaxPeriod
  std::vector<std::int64_t> parts;
  for (double s : share) {
    const double part = s * static_cast<double>(period), whole = std::round(part);
    if (whole < 1 || std::abs(part - whole) > kRounding) return {};
    parts.push_back(static_cast<std::int64_t>(whole));
  }
  return parts;
}

// Largest remainders first, so that the parts add up to the period.
std::vector<std::int64_t> rounded_parts(const std::vector<double>& share, std::int64_t period) {
  std::vector<std::int64_t> parts;
  std::vector<std::size_t> order(share.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::int64_t left = period;
  for (double s : share) {
    parts.push_back(static_cast<std::int64_t>(s * static_cast<double>(period)));
    left -= parts.back();
  }
  const auto remainder = [&](std::size_t k) {
    return share[k] * static_cast<double>(period) - static_cast<double>(parts[k]);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return remainder(a) > remainder(b); });
  for (std::size_t i = 0; left > 0; ++i, --left) ++parts[order[i % order.size()]];
  for (std::size_t k = 0; k < parts.size(); ++k) {
    if (parts[k] > 0) continue;
    fail(ExitCode::kUsage,
         "data.train[{}]: its weight is less than 1/{} of all weights; leave the source out", k, period);
  }
  return parts;
}

std::vector<std::int64_t> parts_of(const std::vector<double>& weights) {
  double sum = 0;
  for (std::size_t k = 0; k < weights.size(); ++k) {
    if (!(weights[k] > 0) || !std::isfinite(weights[k])) {
      fail(ExitCode::kUsage, "data.train[{}]: weight {} is not a positive number", k, weights[k]);
    }
    sum += weights[k];
  }
  std::vector<double> share;
  for (double w : weights) share.push_back(w / sum);
  // The shortest period wins: weights of 0.5 and 0.5 make a table of two slots, not of 65536.
  for (std::int64_t period = 1; period <= SampleOrder::kMaxPeriod; ++period) {
    std::vector<std::int64_t> parts = exact_parts(share, period);
    if (!parts.empty() && std::accumulate(parts.begin(), parts.end(), std::int64_t{0}) == period)
      return parts;
  }
  return rounded_parts(share, SampleOrder::kMaxPeriod);
}

// Tijdeman's chairman assignment: of the sources that may go next without being ahead of their share, the one
// whose deadline is the nearest. After n samples, count[k] differs from n * parts[k] / period by at most 1 -
// 1 / (2 (sources - 1)). In whole numbers, so that every machine deals alike.
std::vector<int> deal(const std::vector<std::int64_t>& parts) {
  const std::int64_t period = std::accumulate(parts.begin(), parts.end(), std::int64_t{0});
  const auto sources = static_cast<std::int64_t>(parts.size());
  const std::int64_t unit = 2 * (sources - 1);
  std::vector<std::int64_t> count(parts.size(), 0);
  std::vector<int> dealt;
  for (std::int64_t n = 1; n <= period; ++n) {
    int best = -1;
    std::int64_t best_slack = 0;
    for (std::size_t k = 0; k < parts.size(); ++k) {
      // owed is what source k lacks at slot n of its share. It may go once it lacks 1 / unit of a sample (sooner it
      // would be too far ahead), and has to by the time that it lacks 1 - 1 / unit (later it would be too far behind).
      const std::int64_t owed = (parts[k] * n - period * count[k]) * unit;  // in 1 / (period * unit)
      if (owed < period) continue;
      const std::int64_t slack = period * (unit - 1) - owed;  // over parts[k]: steps until the deadline
      // slack_k / parts_k < slack_best / parts_best, without a division; among equals the first source goes.
      const bool nearer = best < 0 || slack * parts[static_cast<std::size_t>(best)] < best_slack * parts[k];
      if (!nearer) continue;
      best = static_cast<int>(k);
      best_slack = slack;
    }
    UPMOE_CHECK(best >= 0, "no source may go at slot {}", n);
    ++count[static_cast<std::size_t>(best)];
    dealt.push_back(best);
  }
  return dealt;
}

}  // namespace

std::int64_t permuted(std::int64_t index, std::int64_t n, std::uint64_t key) {
  UPMOE_CHECK(index >= 0 && index < n, "index {} of {}", index, n);
  // A Feistel network turns numbers of 2 half bits into each other, one to one:
  //
  //   left, right  ->  right, left ^ f(right)      whatever f is, a round can be taken back: nothing is lost
  //
  // It may lead out of [0, n). Then it is applied again, until it leads back in: on a cycle through [0, n) the next
  // member that lies inside, which is still one to one.
  const auto bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(n - 1)));
  const int half = std::max(2, (bits + 1) / 2);
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  constexpr std::uint64_t kRounds = 8;
  auto x = static_cast<std::uint64_t>(index);
  do {  // at most 4 times on average, 16 for the smallest n
    std::uint64_t left = x >> half, right = x & mask;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      const std::uint64_t next = left ^ (philox(key, right, round)[0] & mask);
      left = right;
      right = next;
    }
    x = (left << half) | right;
  } while (x >= static_cast<std::uint64_t>(n));
  return static_cast<std::int64_t>(x);
}

SampleOrder::SampleOrder(std::vector<std::int64_t> sequences, const std::vector<double>& weights,
                         bool shuffle, std::uint64_t seed)
    : sequences_(std::move(sequences)), shuffle_(shuffle), seed_(seed) {
  UPMOE_CHECK(!sequences_.empty() && sequences_.size() == weights.size(), "{} sources, {} weights",
              sequences_.size(), weights.size());
  for (std::int64_t n : sequences_) UPMOE_CHECK(n > 0, "a source without sequences");
  parts_ = parts_of(weights);
  if (parts_.size() == 1) return;
  std::vector<std::int32_t> earlier(parts_.size(), 0);
  for (int source : deal(parts_)) slots_.push_back({source, earlier[static_cast<std::size_t>(source)]++});
}

SampleOrder::Place SampleOrder::at(std::int64_t sample) const {
  UPMOE_CHECK(sample >= 0, "sample {}", sample);
  Place place;
  std::int64_t turn = sample;  // how many samples of this source came before
  if (!slots_.empty()) {
    const auto period = static_cast<std::int64_t>(slots_.size());
    const Slot& slot = slots_[static_cast<std::size_t>(sample % period)];
    place.source = slot.source;
    // Whole periods before, each with this source's parts, and its samples earlier in this period.
    turn = sample / period * parts_[static_cast<std::size_t>(slot.source)] + slot.earlier;
  }
  const std::int64_t n = sequences_[static_cast<std::size_t>(place.source)];
  place.epoch = turn / n;
  place.sequence = turn % n;
  if (shuffle_) {
    const std::uint64_t key = philox_key(seed_, fmt::format("samples/{}/{}", place.source, place.epoch));
    place.sequence = permuted(place.sequence, n, key);
  }
  return place;
}

}  // namespace upmoe
