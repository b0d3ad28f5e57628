// Nothing looks ahead along time: what a token becomes does not depend on later tokens, of its own sequence or of the
// others, though routers of some kinds look at other sequences.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "parallel/thread_comm.h"
#include "tests/support/layout_run.h"
#include "tests/support/same_batch.h"

namespace upmoe {
namespace {

using test::Golden;
using test::Layout;

constexpr std::int64_t kSequences = 4;

// This rank's logits and where the token of each of their rows stands.
struct Seen {
  std::vector<float> logits;
  std::vector<std::pair<std::int64_t, std::int64_t>> places;  // sequence, position
  std::size_t width() const { return logits.size() / places.size(); }
};

Seen logits_of(Session& s, const ContextShards& context, const std::vector<std::int32_t>& tokens) {
  std::vector<std::int32_t> positions, places;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    positions.push_back(static_cast<std::int32_t>(static_cast<std::int64_t>(i) % context.seq_len));
    places.push_back(static_cast<std::int32_t>(i));
  }
  Seen seen;
  s.pipeline.evaluate(s.memory.exec, test::batch_of(tokens, tokens, positions, context.seq_len),
                      [&](std::int64_t, ConstTensorView logits_CV) {
                        seen.logits.insert(seen.logits.end(), logits_CV.as<float>(),
                                           logits_CV.as<float>() + logits_CV.elements());
                      });
  for (const std::int32_t place : context.take(places.data(), kSequences))
    seen.places.emplace_back(place / context.seq_len, place % context.seq_len);
  return seen;
}

struct Moved {
  float before = 0, own = 0, others = 0;  // of tokens in front of the change, and of those from it on
};
Moved moved(const Seen& a, const Seen& b, std::int64_t sequence, std::int64_t position) {
  Moved most;
  for (std::size_t row = 0; row < a.places.size(); ++row) {
    const auto [s, p] = a.places[row];
    float& of = p < position ? most.before : s == sequence ? most.own : most.others;
    for (std::size_t i = row * a.width(); i < (row + 1) * a.width(); ++i)
      of = std::max(of, std::abs(a.logits[i] - b.logits[i]));
  }
  return most;
}

void expect_no_look_ahead(const Layout& layout) {
  const Golden golden(layout.model);
  std::mutex mutex;
  Moved of_all;
  run_in_threads(layout.mesh.world(), [&](Communicator& world) {
    Session s(run_of(layout, golden, "unused"), test::config_of(layout, golden), world);
    s.params.load(s.memory.exec, test::golden_weights(golden));
    const ContextShards context{s.mesh.coord(Axis::kCp), layout.mesh.cp, golden.seq_len()};
    const std::int64_t S = golden.seq_len();
    std::vector<std::int32_t> tokens;
    for (std::int64_t i = 0; i < kSequences * S; ++i)
      tokens.push_back(static_cast<std::int32_t>(philox(5, static_cast<std::uint64_t>(i))[0] %
                                                 static_cast<std::uint64_t>(s.config.vocab_size)));
    const Seen first = logits_of(s, context, tokens);
    for (const std::int64_t position : {S - 1, S / 2, std::int64_t{1}})
      for (std::int64_t sequence = 0; sequence < kSequences; ++sequence) {
        std::vector<std::int32_t> changed = tokens;
        for (std::int64_t p = position; p < S; ++p) {
          std::int32_t& token = changed[static_cast<std::size_t>(sequence * S + p)];
          token = static_cast<std::int32_t>((token + 1 + p % 3) % s.config.vocab_size);
        }
        const Moved m = moved(first, logits_of(s, context, changed), sequence, position);
        EXPECT_LT(m.before, 1e-5f) << "sequence " << sequence << " from position " << position;
        const std::lock_guard lock(mutex);
        of_all = {0, std::max(of_all.own, m.own), std::max(of_all.others, m.others)};
      }
  });
  EXPECT_GT(of_all.own, 1e-3f) << "what is changed is seen";
  if (layout.own_form().routes_groups()) {
    EXPECT_GT(of_all.others, 1e-4f) << "by the others of its group, from its position on";
  } else {
    EXPECT_LT(of_all.others, 1e-5f);
  }
}

class LookAhead : public testing::TestWithParam<Layout> {};

TEST_P(LookAhead, EarlierTokensStayAsTheyAre) {
  expect_no_look_ahead(GetParam());
}

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (const RouterKind kind : {RouterKind::kTopK, RouterKind::kExpertChoice, RouterKind::kMixtureOfTokens})
    for (const MeshSpec& mesh :
         {MeshSpec{}, MeshSpec{1, 1, 1, 2, 1, 1}, MeshSpec{1, 1, 2, 1, 2, 1}, MeshSpec{1, 2, 1, 1, 2, 1}}) {
      Layout l{"moe_mixed", mesh, 2};
      l.aux_loss = 0;
      l.with_form().kind = kind;
      if (l.own_form().routes_groups()) l.with_form().group_size = 2;
      all.push_back(l);
    }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Meshes, LookAhead, testing::ValuesIn(layouts()), [](const auto& l) {
  return l.param.str() + "_" + name_of(l.param.own_form().kind);
});

}  // namespace
}  // namespace upmoe
