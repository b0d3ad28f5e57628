// Parameters of two dtypes and one that does not train, under meshes of every kind: routers in fp32 beside bf16, and a
// buffer. Nothing on the way of an fp32 value or gradient rounds it, and every rank computes with its owner's bits.

#include <gtest/gtest.h>

#include <bit>

#include "tests/support/layout_outcomes.h"
#include "tests/support/layout_run.h"
#include "tests/support/tolerance.h"

namespace upmoe {
namespace {

using test::Golden;
using test::Layout;
using test::one_rank;
using test::Outcome;
using test::relative_distance;

bool is_router(const std::string& name) {
  return name.ends_with("moe.router_ED");
}
bool is_bias(const std::string& name) {
  return name.ends_with("moe.router_E");
}

// The share of values that bf16 does not have.
double beyond_bf16(const std::vector<float>& values) {
  const auto n = std::count_if(values.begin(), values.end(),
                               [](float v) { return (std::bit_cast<std::uint32_t>(v) & 0xffffu) != 0; });
  return static_cast<double>(n) / static_cast<double>(values.size());
}

Layout mixed(Layout l, Precision reduce) {
  l.precision = Precision::kBf16;
  l.reduce = reduce;
  l.router = RouterDType::kFp32;
  l.router_bias = true;
  l.aux_loss = 0;  // its pool is the micro-batch
  l.steps = 3;
  return l;
}

// A shard as a rank computes with it at the end.
struct Held {
  std::string name;
  std::vector<std::int64_t> places;  // in the whole parameter
  std::vector<float> values;
};

void hold(Session& s, std::vector<Held>& all) {
  for (const StoredParam& p : s.params.all()) {
    const bool wide =
        is_bias(p.spec.name) || (is_router(p.spec.name) && s.run.router.dtype == RouterDType::kFp32);
    EXPECT_EQ(p.value.dtype, wide ? DType::kF32 : DType::kBF16) << p.spec.name;
    EXPECT_EQ(p.grad.given(), p.spec.trained) << p.spec.name;
    EXPECT_EQ(p.spec.trained, !is_bias(p.spec.name)) << p.spec.name;
    if (p.shard.elements() == 0) continue;
    Held held{.name = p.spec.name, .places = {}, .values = {}};
    held.values.resize(static_cast<std::size_t>(p.shard.elements()));
    ops::cast(s.memory.exec, host_view(held.values.data(), p.value.shape), p.value);
    Golden::for_each_index(p.shard, p.spec.shape, [&](std::int64_t at) { held.places.push_back(at); });
    all.push_back(std::move(held));
  }
  for (const OwnedSlice& slice : s.optimizer.slices()) {
    EXPECT_EQ(slice.has_master(), slice.weight.dtype == DType::kBF16) << slice.param->spec.name;
    EXPECT_FALSE(is_bias(slice.param->spec.name)) << slice.param->spec.name;
  }
}

// What every rank holds is what the owners have, or what was in the buffer from the beginning.
void expect_replicas(const std::vector<Held>& held, const Outcome& owned) {
  std::int64_t buffers = 0;
  for (const Held& h : held) {
    std::vector<float> expected;
    for (const std::int64_t at : h.places)
      expected.push_back(is_bias(h.name) ? test::in_buffer(at)
                                         : owned.weights.at(h.name)[static_cast<std::size_t>(at)]);
    EXPECT_EQ(h.values, expected) << h.name;
    buffers += is_bias(h.name) ? 1 : 0;
  }
  EXPECT_GT(buffers, 0);
}

Outcome run(const Layout& l) {
  const Golden golden(l.model);
  Outcome outcome;
  std::vector<Held> held;
  std::mutex mutex;
  run_in_threads(l.mesh.world(), [&](Communicator& world) {
    test::run_rank(world, golden, l, outcome, mutex, {}, [&](Session& s) { hold(s, held); });
  });
  expect_replicas(held, outcome);
  return outcome;
}

// How far the routers' first gradients are from those of one rank, at most: a token whose choice flips in bf16 shows.
double router_distance(const Layout& l, const Outcome& many) {
  double largest = 0;
  for (const auto& [name, gradient] : one_rank(l).gradients)
    if (is_router(name)) largest = std::max(largest, relative_distance(gradient, many.gradients.at(name)));
  return largest;
}

// What kMeanLossRoundingOfBF16 is made of.
TEST(Dtypes, RoundingToBF16MovesLosses) {
  double squares = 0, losses = 0;
  for (const std::string model : {"moe_a27b", "moe_mixed"}) {
    Layout l{model, {}, 1};
    const std::vector<double> plain = one_rank(l).losses;
    l.precision = Precision::kBf16;
    const std::vector<double> rounded = one_rank(l).losses;
    ASSERT_EQ(plain.size(), rounded.size());
    for (std::size_t i = 0; i < plain.size(); ++i, ++losses)
      squares += std::pow(rounded[i] / plain[i] - 1, 2);
  }
  const double moved = std::sqrt(squares / losses);
  EXPECT_LT(moved, 1.5 * test::kLossMovedByBF16);
  EXPECT_GT(moved, test::kLossMovedByBF16 / 3) << "the bound is wider than it need be";
}

TEST(Dtypes, RoutersInFp32UnderEveryMesh) {
  for (const Precision reduce : {Precision::kFp32, Precision::kBf16})
    for (const Layout& each : test::layouts_of_every_kind()) {
      const Layout l = mixed(each, reduce);
      SCOPED_TRACE(fmt::format("{} zero{} reduce {}", l.str(), l.zero, name_of(reduce)));
      const Outcome &one = one_rank(l), many = run(l);
      ASSERT_EQ(one.losses.size(), many.losses.size());
      for (std::size_t i = 0; i < one.losses.size(); ++i)
        EXPECT_NEAR(many.losses[i], one.losses[i], test::kMeanLossRoundingOfBF16 * one.losses[i])
            << "step " << i + 1;
      for (const auto& [name, weight] : one.weights) {
        if (name.ends_with("attn.k_NH")) continue;  // AdamW makes whole steps of a gradient of rounding alone
        EXPECT_LT(relative_distance(weight, many.weights.at(name)), 5e-2) << name;
        if (!is_router(name)) continue;
        EXPECT_GT(beyond_bf16(many.gradients.at(name)), 0.9) << name;
        EXPECT_GT(beyond_bf16(many.weights.at(name)), 0.9) << name;
      }
      Layout plain = l;
      plain.router = RouterDType::kAuto;
      EXPECT_LT(router_distance(l, many), 1.5 * router_distance(plain, run(plain)) + 1e-2);
    }
}

// Beside fp32 there is nothing to keep apart.
TEST(Dtypes, RoutersInFp32BesideFp32AreTheSameToTheBit) {
  for (const MeshSpec& mesh : {MeshSpec{}, MeshSpec{1, 2, 1, 2, 2, 2}}) {
    Layout l{"moe_mixed", mesh};
    const Outcome plain = run_in_layout(l);
    l.router = RouterDType::kFp32;
    const Outcome asked = run_in_layout(l);
    EXPECT_EQ(plain.losses, asked.losses);
    EXPECT_EQ(plain.weights, asked.weights);
  }
}

}  // namespace
}  // namespace upmoe
