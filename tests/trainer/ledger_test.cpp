// The ledger of a step: the dry device books what a real step books, and the products agree with the
// published count 6 * (weights multiplied per token).

#include <gtest/gtest.h>

#include "tests/support/golden.h"
#include "trainer/session.h"

namespace upmoe {
namespace {

using test::Golden;

struct Books {
  double products = 0, attention = 0, sent = 0;
};

Books books_of(const Session& s, const Ledger& communication) {
  Books b;
  for (const auto& [name, cost] : s.memory.ledger.entries()) {
    if (name.starts_with("gemm") || name.starts_with("grouped_gemm")) b.products += cost.flops;
    if (name.starts_with("attention")) b.attention += cost.flops;
  }
  b.sent = communication.total().bytes_sent;
  return b;
}

// One micro-batch forward and backward of rank `world.rank()` on `device`.
Books step(const Golden& golden, Communicator& world, int ep, Device device, std::int64_t sequences) {
  Ledger communication;
  world.set_ledger(&communication);
  RunConfig run;
  run.parallel.ep = ep;
  Session s(run, golden.config(), world, device);
  if (device.type == DeviceType::kCpu) s.params.load(golden.reader());
  const std::int64_t S = golden.seq_len(), T = sequences * S;
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(T), 1), positions(static_cast<std::size_t>(T));
  for (std::size_t t = 0; t < positions.size(); ++t)
    positions[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) % S);
  const auto view = [&](std::vector<std::int32_t>& v) {
    TensorView host = host_view(v.data(), {T});
    if (device.type == DeviceType::kDry) host = {nullptr, {T}, DType::kI32, device};
    return host;
  };
  const MicroBatch batch{view(tokens), view(tokens), {view(positions), {}, S}};
  Transformer::Saved saved;
  communication.clear();
  s.model.forward(s.memory.exec, batch, 1.0, {}, s.memory.keep, saved);
  s.model.backward(s.memory.exec, s.memory.keep, saved, {});
  return books_of(s, communication);
}

TEST(Ledger, DryDeviceBooksWhatARealStepBooks) {
  for (const std::string& name : test::golden_cases()) {
    const Golden golden(name);
    const auto self = make_self_communicator();
    const Books real = step(golden, *self, 1, Device{}, 2);
    const Books dry = step(golden, *self, 1, Device{DeviceType::kDry, 0}, 2);
    EXPECT_GT(real.products, 0) << name;
    EXPECT_EQ(real.products, dry.products) << name;
    EXPECT_EQ(real.attention, dry.attention) << name;
  }
}

// Weights that a token multiplies: activated parameters without embedding lookup, norms, biases and the
// shared expert's scalar gate (which is a dot product of its own).
double products_per_token(const ModelConfig& c) {
  double n = 0;
  for (const ParamSpec& p : make_param_table(c)) {
    if (p.name.ends_with("shared.gate_1D")) continue;
    double weights = static_cast<double>(p.shape.elements());
    if (p.name == "embed_VD") weights = c.tie_word_embeddings ? weights : 0;
    if (p.shape.rank < 2 || p.name.ends_with("_NH")) weights = 0;
    if (p.expert) weights *= static_cast<double>(c.num_experts_per_tok) / c.num_experts;
    n += weights;
  }
  return n;
}

TEST(Ledger, ProductsAreSixPerActivatedWeightAndToken) {
  for (const std::string& name : test::golden_cases()) {
    const Golden golden(name);
    const auto self = make_self_communicator();
    const Books dry = step(golden, *self, 1, Device{DeviceType::kDry, 0}, 3);
    const double tokens = static_cast<double>(3 * golden.seq_len());
    EXPECT_NEAR(dry.products, 6 * tokens * products_per_token(golden.config()), 1e-6 * dry.products) << name;
  }
}

// Any rank of a world that does not exist: 60 experts over 8 ranks.
TEST(Ledger, RehearsesAnyRank) {
  const Golden golden("moe_a27b");
  double sent = 0;
  for (int rank = 0; rank < 8; ++rank) {
    const auto world = make_dry_communicator(rank, 8);
    const Books b = step(golden, *world, 8, Device{DeviceType::kDry, 0}, 2);
    EXPECT_GT(b.products, 0);
    EXPECT_GT(b.sent, 0);
    sent += b.sent;
  }
  EXPECT_GT(sent, 0);
}

}  // namespace
}  // namespace upmoe
