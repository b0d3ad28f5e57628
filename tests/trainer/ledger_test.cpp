// The ledger of a step: the dry device books what a real step books, and the products agree with the
// published count 6 * (weights multiplied per token).

#include <gtest/gtest.h>

#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "tests/support/golden.h"
#include "tests/support/same_batch.h"
#include "trainer/session.h"

namespace upmoe {
namespace {

using test::Golden;

struct Books {
  double products = 0, attention = 0, sent = 0;
  std::int64_t calls = 0;
};

Books books_of(const Session& s) {
  Books b;
  for (const auto& [name, cost] : s.memory.ledger.entries()) {
    if (name.starts_with("gemm") || name.starts_with("grouped_gemm")) b.products += cost.flops;
    if (name.starts_with("attention")) b.attention += cost.flops;
  }
  b.sent = s.memory.ledger.total().bytes_sent;
  b.calls = s.memory.ledger.total().calls;
  return b;
}

// Micro-batches forward and backward of rank `world.rank()` on `device`; with `reduces`, gradients and
// weights travel as well.
Books step(const Golden& golden, Communicator& world, const RunConfig::Parallel& parallel, Device device,
           std::int64_t sequences, std::int64_t micro_batches = 1, bool reduces = false,
           Recompute recompute = Recompute::kNone) {
  RunConfig run;
  run.parallel = parallel;
  run.train.recompute = recompute;
  run.data.seq_len = golden.seq_len();
  Session s(run, golden.config(), world, device);
  if (device.type == DeviceType::kCpu) s.params.load(s.memory.exec, golden.reader());
  const std::int64_t S = golden.seq_len(), T = sequences * S;
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(T), 1), positions(static_cast<std::size_t>(T));
  for (std::size_t t = 0; t < positions.size(); ++t)
    positions[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) % S);
  test::SameBatch batches(test::batch_of(tokens, tokens, positions, S), micro_batches);
  s.memory.ledger.clear();
  Exec& ex = s.memory.exec;
  Pipeline::Step work{.batches = batches};
  if (reduces) work.block_done = [&](int block, bool last) { s.reducer.ready(ex, block, last); };
  s.pipeline.run(ex, work);
  if (reduces) {
    s.reducer.finish(ex);
    s.reducer.gather_values(ex);
    s.reducer.await_all_values(ex);
  }
  return books_of(s);
}

TEST(Ledger, DryDeviceBooksWhatARealStepBooks) {
  for (const std::string& name : test::golden_cases()) {
    const Golden golden(name);
    const auto self = make_self_communicator();
    const Books real = step(golden, *self, {}, Device{}, 2);
    const Books dry = step(golden, *self, {}, Device{DeviceType::kDry, 0}, 2);
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
    if (p.role == Role::kSharedGate) continue;
    double weights = static_cast<double>(p.shape.elements());
    if (p.role == Role::kEmbedding) weights = c.tie_word_embeddings ? weights : 0;
    if (!p.decay) weights = 0;
    if (p.expert) weights *= static_cast<double>(c.num_experts_per_tok) / c.num_experts;
    n += weights;
  }
  return n;
}

TEST(Ledger, ProductsAreSixPerActivatedWeightAndToken) {
  for (const std::string& name : test::golden_cases()) {
    const Golden golden(name);
    const auto self = make_self_communicator();
    const Books dry = step(golden, *self, {}, Device{DeviceType::kDry, 0}, 3);
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
    const Books b = step(golden, *world, {.ep = 8}, Device{DeviceType::kDry, 0}, 2);
    EXPECT_GT(b.products, 0);
    EXPECT_GT(b.sent, 0);
    sent += b.sent;
  }
  EXPECT_GT(sent, 0);
}

// The table of docs/layouts.md, for one micro-batch of two sequences in fp32.
struct Sizes {
  explicit Sizes(const Golden& golden) : c(golden.config()), T(2.0 * static_cast<double>(golden.seq_len())) {}
  ModelConfig c;
  double T, b = 4;
  double D() const { return static_cast<double>(c.hidden_size); }
  double blocks() const { return c.num_hidden_layers; }
  // One sum of all loads over the ranks that share the micro-batch.
  double pool(double ranks) const {
    return 2 * 8 * (3.0 * c.num_experts + 1) * c.num_moe_layers() * (ranks - 1) / ranks;
  }
};

double sent(const Golden& golden, const RunConfig::Parallel& parallel, int ranks, int rank) {
  const auto world = make_dry_communicator(rank, ranks);
  return step(golden, *world, parallel, Device{DeviceType::kDry, 0}, 2).sent;
}

// Of data parallelism alone: what a step of three micro-batches sends.
Books books_of_reducer(const Golden& golden, int zero, int ranks) {
  const auto world = make_dry_communicator(0, ranks);
  return step(golden, *world, {.zero = zero}, Device{DeviceType::kDry, 0}, 2, 3, true);
}
double sent_by_reducer(const Golden& golden, int zero, int ranks) {
  return books_of_reducer(golden, zero, ranks).sent;
}

TEST(Ledger, TensorParallelTraffic) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_mixed"}) {
    const Golden golden(model);
    const Sizes s(golden);
    const double n = 2, t = s.T / n;
    // Ten in every block; four more around embedding and head; the logits' stats, three fp64 a token.
    const double expected =
        (10 * s.blocks() + 4) * (n - 1) * t * s.D() * s.b + 24 * s.T * (n - 1) + s.pool(n);
    for (const int rank : {0, 1}) EXPECT_DOUBLE_EQ(sent(golden, {.tp = 2}, 2, rank), expected) << model;
  }
}

// What backward computes again is no work of the model's, but it travels again: gather and scatter-add around
// attention and feed-forward.
TEST(Ledger, WhatIsComputedAgainIsSentAgain) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b"}) {
    const Golden golden(model);
    const Sizes s(golden);
    const auto world = make_dry_communicator(1, 2);
    const Device dry{DeviceType::kDry, 0};
    const Books kept = step(golden, *world, {.tp = 2}, dry, 2),
                again = step(golden, *world, {.tp = 2}, dry, 2, 1, false, Recompute::kBlock);
    EXPECT_EQ(again.products, kept.products) << model;
    EXPECT_EQ(again.attention, kept.attention) << model;
    EXPECT_DOUBLE_EQ(again.sent - kept.sent, 4 * s.blocks() * s.T / 2 * s.D() * s.b) << model;
  }
}

// Slices are padded to the largest of a bucket: by less than one element for each parameter.
TEST(Ledger, DataParallelTraffic) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_mixed"}) {
    const Golden golden(model);
    double weights = 0, in_blocks = 0, tensors = 0;
    for (const ParamSpec& p : make_param_table(golden.config())) {
      weights += static_cast<double>(p.shape.elements());
      if (p.layer >= 0) in_blocks += static_cast<double>(p.shape.elements());
      tensors += 1;
    }
    for (const int n : {2, 3}) {
      const double once = 4.0 * (n - 1) / n * weights, blocks = 4.0 * (n - 1) / n * in_blocks,
                   padding = 4.0 * (n - 1) * tensors;
      const double zero_1 = sent_by_reducer(golden, 1, n), zero_2 = sent_by_reducer(golden, 2, n);
      EXPECT_GE(zero_1, 2 * once) << model;
      EXPECT_LE(zero_1, 2 * once + 2 * padding) << model;
      EXPECT_GE(zero_2, 2 * once + 2 * blocks) << model << ": two micro-batches more";
      EXPECT_LE(zero_2, 2 * once + 2 * blocks + 4 * padding) << model;
    }
  }
}

// Of as many owners as there may be, some of them of nothing of a small parameter.
TEST(Ledger, ReducersCallsDoNotGrowWithTheRanks) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b", "moe_mixed"}) {
    const Golden golden(model);
    for (const int zero : {1, 2}) {
      const std::int64_t two = books_of_reducer(golden, zero, 2).calls;
      for (const int n : {3, 8, 512})
        EXPECT_EQ(books_of_reducer(golden, zero, n).calls, two)
            << model << ", " << n << " ranks, zero " << zero;
    }
  }
}

TEST(Ledger, PipelineTraffic) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b"}) {
    const Golden golden(model);
    const Sizes s(golden);
    const double pool = s.c.num_experts > 0 ? 8.0 * 2.0 * s.c.num_experts : 0.0;
    for (const int rank : {0, 1})  // one boundary: the first stage sends forward, the last one backward
      EXPECT_DOUBLE_EQ(sent(golden, {.pp = 2}, 2, rank), s.T * s.D() * s.b + pool) << model;
  }
}

TEST(Ledger, ContextParallelTraffic) {
  for (const char* model : {"dense_tied_gqa", "moe_a27b"}) {
    const Golden golden(model);
    const Sizes s(golden);
    for (const int cp : {2, 4}) {
      const double n = cp,
                   keys_values = s.T / n * 2 * static_cast<double>(s.c.num_key_value_heads * s.c.head_dim);
      const double per_block = 2 * (n - 1) * keys_values * s.b + 4 * n * keys_values;
      EXPECT_DOUBLE_EQ(sent(golden, {.cp = cp}, cp, cp - 1), s.blocks() * per_block + s.pool(n)) << model;
    }
  }
}

}  // namespace
}  // namespace upmoe
