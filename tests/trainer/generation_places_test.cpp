// Models in which a token would say what comes behind it whatever stands where, made to depend on places: greedily with
// the cache they say what they say without one, and other tokens with any places but the right ones.

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <set>

#include "tests/support/golden_speaker.h"

namespace upmoe {
namespace {

using test::whole_logits;
using Tokens = std::vector<std::int32_t>;

constexpr std::size_t kNew = 36, kKinds = 8;

// Which token each of the last `kNew` logits names, and the least distance of a first logit to its second.
struct Named {
  Tokens tokens;
  float margin = std::numeric_limits<float>::max();
  Named(const std::vector<float>& logits, std::size_t vocab) {
    for (auto row = logits.end() - static_cast<std::ptrdiff_t>((kNew + 1) * vocab); tokens.size() < kNew;
         row += static_cast<std::ptrdiff_t>(vocab)) {
      std::vector<float> sorted(row, row + static_cast<std::ptrdiff_t>(vocab));
      std::partial_sort(sorted.begin(), sorted.begin() + 2, sorted.end(), std::greater<>());
      tokens.push_back(static_cast<std::int32_t>(
          std::find(row, row + static_cast<std::ptrdiff_t>(vocab), sorted[0]) - row));
      margin = std::min(margin, sorted[0] - sorted[1]);
    }
  }
};

struct Said {
  std::string model;
  std::uint64_t draw;  // of the prompts; so that no first logit is near its second
};
std::ostream& operator<<(std::ostream& out, const Said& said) {
  return out << said.model;
}

class Places : public testing::TestWithParam<Said> {};

TEST_P(Places, AreThoseOfAPassWithoutACache) {
  test::GoldenSpeaker m(GetParam().model, DType::kF32, 4);
  const auto V = static_cast<std::size_t>(m.vocab());
  // A pretended GPU is slow.
  for (const std::int64_t length : test::on_gpu() ? Tokens{8} : Tokens{1, 8, 23}) {
    SCOPED_TRACE(length);
    const Prompt prompt{test::drawn_tokens(GetParam().draw, length, m.vocab()), 0};
    for (const std::int64_t chunk : {2048, 5}) {
      const Tokens made =
          generate(m.on_rank, std::vector{prompt}, {.max_new_tokens = kNew, .chunk = chunk}).tokens[0];
      EXPECT_GE(std::set<std::int32_t>(made.begin(), made.end()).size(), kKinds);
      Tokens all = prompt.tokens;
      all.insert(all.end(), made.begin(), made.end());
      const Named right(whole_logits(m.on_rank, all), V);
      EXPECT_EQ(right.tokens, made) << "chunks of " << chunk;
      EXPECT_GT(right.margin, 1e-3f) << "too near to tell";
      // New tokens one place too far, all on one place, and places counted from the last chunk on.
      const auto others = [&](auto place) {
        Tokens positions;
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(all.size()); ++i)
          positions.push_back(static_cast<std::int32_t>(place(i)));
        return Named(whole_logits(m.on_rank, all, positions), V).tokens;
      };
      EXPECT_NE(others([&](std::int64_t i) { return i < length ? i : i + 1; }), made);
      EXPECT_NE(others([&](std::int64_t i) { return std::min(i, length); }), made);
      if (length > chunk) {
        EXPECT_NE(others([&](std::int64_t i) { return i % chunk; }), made);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Places, testing::Values(Said{"gemma", 15}, Said{"qwen3", 3}),
                         [](const auto& i) { return i.param.model; });

}  // namespace
}  // namespace upmoe
