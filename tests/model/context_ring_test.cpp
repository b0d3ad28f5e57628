// Attention divided over ranks equals attention of one rank.

#include "trainer/model/context_ring.h"

#include <gtest/gtest.h>

#include <numeric>

#include "parallel/checked_comm.h"
#include "parallel/dry_comm.h"
#include "parallel/self_comm.h"
#include "parallel/thread_comm.h"
#include "tests/support/attention_rounding.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/tolerance.h"
#include "trainer/model/context_shards.h"

namespace upmoe::test {
namespace {

enum class Packing { kNone, kCrossing, kInterleaved, kSingles };

struct Case {
  int ranks;
  std::int64_t chunk, sequences;
  DType dtype = DType::kF32;
  Packing packing = Packing::kNone;
  bool checked = false;  // the transport compares the ranks' verbs
  std::int64_t window = 0;

  std::int64_t seq_len() const { return 2 * ranks * chunk; }
  std::int64_t tokens() const { return sequences * seq_len(); }
  AttentionShape shape() const { return {4, 2, 20, seq_len(), window}; }
};

// Inputs and results, of the whole sequences or of one rank's tokens.
struct Tensors {
  HostTensor qkv, dout, ids, out, lse, dqkv;

  Tensors(const AttentionShape& s, std::int64_t T, DType dtype)
      : qkv({T, s.qkv_width()}, dtype),
        dout({T, s.heads * s.head_dim}, dtype),
        ids({T}, DType::kI32),
        out(filled({T, s.heads * s.head_dim}, dtype, 77)),  // overwritten, as the other two
        lse(filled({T, s.heads}, DType::kF32, 77)),
        dqkv(filled({T, s.qkv_width()}, dtype, 77)) {}
};

Tensors whole_inputs(const Case& c) {
  Tensors whole(c.shape(), c.tokens(), c.dtype);
  whole.qkv = random_tensor({c.tokens(), c.shape().qkv_width()}, c.dtype, 1);
  whole.dout = random_tensor({c.tokens(), c.shape().heads * c.shape().head_dim}, c.dtype, 2);
  for (std::int64_t t = 0; t < c.tokens(); ++t) {
    std::int64_t id = t;
    if (c.packing == Packing::kCrossing) id = -((t + c.chunk / 2) / (c.chunk + 3));
    if (c.packing == Packing::kInterleaved) id = t % 3;
    whole.ids.set(static_cast<std::size_t>(t), static_cast<double>(id));
  }
  return whole;
}

// to's row i is from's row rows[i].
void take_rows(HostTensor& to, const HostTensor& from, const std::vector<std::int32_t>& rows) {
  const std::size_t width = rows.empty() ? 0 : to.size() / rows.size();
  for (std::size_t i = 0; i < rows.size(); ++i)
    for (std::size_t d = 0; d < width; ++d)
      to.set(i * width + d, from.get(static_cast<std::size_t>(rows[i]) * width + d));
}

HostTensor rows_of(const HostTensor& like, const HostTensor& from, const std::vector<std::int32_t>& rows) {
  HostTensor taken = like;
  take_rows(taken, from, rows);
  return taken;
}

void attend_whole(const Case& c, Tensors& t, OpExec& ex) {
  const ConstTensorView documents = c.packing == Packing::kNone ? ConstTensorView{} : t.ids;
  ops::attention_forward(ex, t.out, t.lse, t.qkv, c.shape(), documents);
  ops::attention_backward(ex, t.dqkv, t.dout, t.qkv, {t.out, t.lse}, c.shape(), documents);
}

struct Rank {
  std::vector<std::int32_t> rows;  // of the whole
  Tensors tensors;
  double forward_flops = 0, backward_flops = 0;
};

double booked_flops(const OpExec& ex, const char* op) {
  const auto it = ex.ledger().entries().find(op);
  return it == ex.ledger().entries().end() ? 0 : it->second.flops;
}

void attend_ring(const Case& c, Communicator& cp, Rank& mine) {
  OpExec ex;
  Tensors& t = mine.tensors;
  const ConstTensorView documents = c.packing == Packing::kNone ? ConstTensorView{} : t.ids;
  ring_attention_forward(ex, cp, t.out, t.lse, t.qkv, c.shape(), documents);
  ring_attention_backward(ex, cp, t.dqkv, t.dout, t.qkv, {t.out, t.lse}, c.shape(), documents);
  EXPECT_EQ(ex.scratch_used(), 0u);
  mine.forward_flops = booked_flops(ex, "attention_pair_forward");
  mine.backward_flops = booked_flops(ex, "attention_pair_backward");
}

std::vector<Rank> run_ring(const Case& c, const Tensors& whole) {
  std::vector<std::int32_t> places(static_cast<std::size_t>(c.tokens()));
  std::iota(places.begin(), places.end(), 0);
  std::vector<Rank> ranks;
  for (int r = 0; r < c.ranks; ++r) {
    const ContextShards context{r, c.ranks, c.seq_len()};
    ranks.push_back({context.take(places.data(), c.sequences), {c.shape(), c.tokens() / c.ranks, c.dtype}});
    take_rows(ranks.back().tensors.qkv, whole.qkv, ranks.back().rows);
    take_rows(ranks.back().tensors.dout, whole.dout, ranks.back().rows);
    take_rows(ranks.back().tensors.ids, whole.ids, ranks.back().rows);
  }
  run_in_threads(c.ranks, [&](Communicator& cp) {
    Rank& mine = ranks[static_cast<std::size_t>(cp.rank())];
    if (c.checked) {
      const auto checked = make_checked_communicator(cp.split(0, cp.rank()));
      attend_ring(c, *checked, mine);
    } else {
      attend_ring(c, cp, mine);
    }
  });
  return ranks;
}

class ContextRing : public testing::TestWithParam<Case> {};

TEST_P(ContextRing, EqualsOneRank) {
  const Case& c = GetParam();
  Tensors whole = whole_inputs(c);
  OpExec ex;
  attend_whole(c, whole, ex);
  const bool rounds = c.dtype == DType::kBF16;
  // Both round probabilities, relative to maxima of their own.
  const double both = 2 * rounding_of_probabilities(c.dtype);
  const Tolerance out = rounds ? Tolerance{1.0 / 128, 1e-6 + both} : Tolerance{1e-6, 1e-6};
  // One rank rounds keys' gradients as often as the ring; a different rounding of out reaches delta.
  const Tolerance gradient = rounds ? Tolerance{1.0 / 64, 4e-3} : Tolerance{1e-6, 1e-6};
  double forward_flops = 0, backward_flops = 0;
  for (const Rank& r : run_ring(c, whole)) {
    const Tensors& t = r.tensors;
    expect_close(t.out.values(), rows_of(t.out, whole.out, r.rows).values(), out, "out");
    expect_close(t.lse.values(), rows_of(t.lse, whole.lse, r.rows).values(), {1e-6, 1e-6}, "lse");
    expect_close(t.dqkv.values(), rows_of(t.dqkv, whole.dqkv, r.rows).values(), gradient, "dqkv");
    forward_flops += r.forward_flops;
    backward_flops += r.backward_flops;
    if (c.window > 0) continue;
    // Zig-zag: all ranks work alike.
    EXPECT_NEAR(r.forward_flops * c.ranks, booked_flops(ex, "attention_forward"),
                1e-9 * r.forward_flops * c.ranks);
    EXPECT_NEAR(r.backward_flops * c.ranks, booked_flops(ex, "attention_backward"),
                1e-9 * r.backward_flops * c.ranks);
  }
  // Together no more than one.
  EXPECT_NEAR(forward_flops, booked_flops(ex, "attention_forward"), 1e-9 * forward_flops);
  EXPECT_NEAR(backward_flops, booked_flops(ex, "attention_backward"), 1e-9 * backward_flops);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int ranks : {1, 2, 3, 4}) {
    for (const std::int64_t chunk : {1, 9, 65})
      for (const Packing p : {Packing::kNone, Packing::kCrossing, Packing::kInterleaved, Packing::kSingles})
        all.push_back({ranks, chunk, 2, DType::kF32, p});
    for (const Packing p : {Packing::kNone, Packing::kCrossing})
      all.push_back({ranks, 33, 3, DType::kBF16, p});
    all.push_back({ranks, 9, 0, DType::kF32, Packing::kCrossing});  // no micro-batch for this group
    all.push_back({ranks, 9, 0, DType::kBF16, Packing::kNone});
    all.push_back({ranks, 16, 1, DType::kF32, Packing::kCrossing, true});
    // Windows of a part of a chunk, a chunk, a few, all; beside borders between chunks.
    for (const std::int64_t window : {1, 5, 16, 17, 18, 33, 60, 1000})
      for (const Packing p : {Packing::kNone, Packing::kCrossing})
        all.push_back({ranks, 17, 2, DType::kF32, p, false, window});
    all.push_back({ranks, 33, 1, DType::kBF16, Packing::kNone, false, 40});
    all.push_back({ranks, 9, 0, DType::kF32, Packing::kNone, false, 4});
  }
  return all;
}
std::string label(const testing::TestParamInfo<Case>& i) {
  const Case& c = i.param;
  return fmt::format("{}_ranks{}_{}x{}_packing{}{}{}", dtype_label(c.dtype), c.ranks, c.sequences,
                     c.seq_len(), static_cast<int>(c.packing), c.checked ? "_checked" : "",
                     c.window > 0 ? fmt::format("_window{}", c.window) : "");
}
INSTANTIATE_TEST_SUITE_P(Ranks, ContextRing, testing::ValuesIn(cases()), label);

TEST(ContextRingSingle, OneSequenceOfOddLength) {  // one rank cuts nothing
  const AttentionShape s{2, 1, 8, 7};
  const auto self = make_self_communicator();
  OpExec ex;
  Tensors plain(s, 7, DType::kF32);
  plain.qkv = random_tensor({7, s.qkv_width()}, DType::kF32, 1);
  Tensors ring = plain;
  ops::attention_forward(ex, plain.out, plain.lse, plain.qkv, s);
  ring_attention_forward(ex, *self, ring.out, ring.lse, ring.qkv, s, {});
  EXPECT_TRUE(ring.out == plain.out && ring.lse == plain.lse);
}

// How many pairs of chunks rank 0 of 4 (chunks 0 and 7) works on; of 8 chunks of 10 tokens.
TEST(ContextRingWindow, PairsOutsideItAreNotComputed) {
  const auto pairs = [](std::int64_t window) {
    const auto dry = make_dry_communicator(0, 4);
    OpExec ex(DeviceType::kDry);
    const AttentionShape s{2, 1, 8, 80, window};
    ring_attention_forward(ex, *dry, dry_tensor({20, 16}, DType::kF32), dry_tensor({20, 2}, DType::kF32),
                           dry_tensor({20, s.qkv_width()}, DType::kF32), s, {});
    return ex.ledger().entries().at("attention_pair_forward").calls;
  };
  EXPECT_EQ(pairs(0), 1 + 8);
  EXPECT_EQ(pairs(1), 1 + 1) << "each token itself";
  EXPECT_EQ(pairs(2), 1 + 2) << "a first token sees the last one of the chunk before";
  EXPECT_EQ(pairs(11), 1 + 2);
  EXPECT_EQ(pairs(12), 1 + 3);
  EXPECT_EQ(pairs(61), 1 + 7);
  EXPECT_EQ(pairs(62), 1 + 8);
}

TEST(ContextRingChecks, RefusesSequencesThatDoNotDivide) {
  const auto dry = make_dry_communicator(1, 3);
  OpExec ex(DeviceType::kDry);
  const auto run = [&](std::int64_t tokens, std::int64_t seq_len) {
    const AttentionShape s{2, 1, 8, seq_len};
    ring_attention_forward(ex, *dry, dry_tensor({tokens, 16}, DType::kF32),
                           dry_tensor({tokens, 2}, DType::kF32),
                           dry_tensor({tokens, s.qkv_width()}, DType::kF32), s, {});
  };
  run(8, 12);
  EXPECT_THROW(run(8, 9), Error) << "chunks of one and a half tokens";
  EXPECT_THROW(run(6, 12), Error) << "one and a half sequences";
}

}  // namespace
}  // namespace upmoe::test
