// Parts of a softmax: sequences of two chunks, whose second queries meet the keys of both, against the double
// reference of the whole.

#include <gtest/gtest.h>

#include <limits>
#include <tuple>

#include "kernels/ops/attention.h"
#include "kernels/ops/pointwise.h"
#include "tests/support/attention_rounding.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

enum class Packing { kNone, kOne, kCrossing, kInterleaved, kApart };  // kApart: each chunk its own document

struct Case {
  AttentionShape shape;  // of one chunk
  std::int64_t sequences;
  DType dtype;
  Packing packing = Packing::kNone;

  std::int64_t tokens() const { return sequences * shape.seq_len; }  // of a chunk of all sequences
  std::int64_t out_width() const { return shape.heads * shape.head_dim; }
  AttentionShape whole() const {
    AttentionShape s = shape;
    s.seq_len *= 2;
    return s;
  }
};

std::vector<std::int32_t> documents_of(const Case& c) {
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; c.packing != Packing::kNone && t < 2 * c.tokens(); ++t) {
    std::int64_t id = 7;
    if (c.packing == Packing::kCrossing) id = -((t + c.shape.seq_len / 2) / (c.shape.seq_len + 3));
    if (c.packing == Packing::kInterleaved) id = t % 3;
    if (c.packing == Packing::kApart) id = t / c.shape.seq_len;
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return ids;
}

// One chunk's values of one value, or row of values, per token of the whole sequences.
Values chunk_of(const Case& c, const Values& whole, int chunk) {
  Values values;
  if (whole.empty()) return values;
  const std::size_t runs = static_cast<std::size_t>(2 * c.sequences), run = whole.size() / runs;
  for (std::size_t i = static_cast<std::size_t>(chunk); i < runs; i += 2)
    values.insert(values.end(), whole.begin() + static_cast<std::ptrdiff_t>(i * run),
                  whole.begin() + static_cast<std::ptrdiff_t>((i + 1) * run));
  return values;
}

HostTensor keys_values(OpExec& ex, const Case& c, const HostTensor& qkv) {
  HostTensor kv({c.tokens(), c.shape.kv_width()}, c.dtype);
  ops::copy_columns(ex, kv, 0, qkv, c.out_width(), c.shape.kv_width());
  return kv;
}

HostTensor ids_of(const Case& c, int chunk) {
  const std::vector<std::int32_t> all = documents_of(c);
  if (all.empty()) return {{c.tokens()}, DType::kI32};
  return tensor_of({c.tokens()}, DType::kI32, chunk_of(c, Values(all.begin(), all.end()), chunk));
}

struct Chunk {
  HostTensor qkv, dout, kv, ids;
  ConstTensorView documents;  // absent without

  Chunk(OpExec& ex, const Case& c, int chunk, const HostTensor& whole, const HostTensor& dwhole)
      : qkv(tensor_of({c.tokens(), c.shape.qkv_width()}, c.dtype, chunk_of(c, whole.values(), chunk))),
        dout(tensor_of({c.tokens(), c.out_width()}, c.dtype, chunk_of(c, dwhole.values(), chunk))),
        kv(keys_values(ex, c, qkv)),
        ids(ids_of(c, chunk)),
        documents(c.packing == Packing::kNone ? ConstTensorView{} : ids) {}
  Chunk(const Chunk&) = delete;
};

struct Inputs {
  OpExec ex;
  HostTensor whole, dwhole;
  Chunk first, second;

  explicit Inputs(const Case& c, double spread = 1)
      : whole(random_tensor({2 * c.tokens(), c.shape.qkv_width()}, c.dtype, 1, spread)),
        dwhole(random_tensor({2 * c.tokens(), c.out_width()}, c.dtype, 2)),
        first(ex, c, 0, whole, dwhole),
        second(ex, c, 1, whole, dwhole) {}
};

struct Part {
  HostTensor out, lse;
  explicit Part(const Case& c)
      : out(filled({c.tokens(), c.out_width()}, DType::kF32, 77)),  // overwritten
        lse(filled({c.tokens(), c.shape.heads}, DType::kF32, 77)) {}
  friend bool operator==(const Part&, const Part&) = default;
};

ChunkPair pair_of(const Case& c, Visible visible, const Chunk& queries, const Chunk& keys) {
  return {c.shape, visible, queries.documents, keys.documents,
          visible == Visible::kAll ? c.shape.seq_len : 0};
}

Part forward(Inputs& in, const Case& c, const Chunk& queries, const Chunk& keys, Visible visible) {
  Part part(c);
  ops::attention_pair_forward(in.ex, part.out, part.lse, queries.qkv, keys.kv,
                              pair_of(c, visible, queries, keys));
  EXPECT_EQ(in.ex.scratch_used(), 0u);
  return part;
}

struct Gradients {
  HostTensor dq, dkv;
  explicit Gradients(const Case& c)
      : dq({c.tokens(), c.out_width()}, DType::kF32), dkv({c.tokens(), c.shape.kv_width()}, DType::kF32) {}
  friend bool operator==(const Gradients&, const Gradients&) = default;
};

// Adds to the gradients of the queries' and of the keys' chunk.
void backward(Inputs& in, const Case& c, Gradients& of_queries, Gradients& of_keys, const Chunk& queries,
              const Chunk& keys, const Part& whole, Visible visible) {
  HostTensor out({c.tokens(), c.out_width()}, c.dtype);
  ops::cast(in.ex, out, whole.out);
  ops::attention_pair_backward(in.ex, {of_queries.dq, of_keys.dkv}, queries.dout, queries.qkv, keys.kv,
                               {out, whole.lse}, pair_of(c, visible, queries, keys));
  EXPECT_EQ(in.ex.scratch_used(), 0u);
}

// dqkv of a chunk as one tensor, through copy_columns.
Values joined(Inputs& in, const Case& c, const Gradients& g) {
  HostTensor dqkv({c.tokens(), c.shape.qkv_width()}, DType::kF32);
  ops::copy_columns(in.ex, dqkv, 0, g.dq, 0, c.out_width());
  ops::copy_columns(in.ex, dqkv, c.out_width(), g.dkv, 0, c.shape.kv_width());
  return dqkv.values();
}

void expect_reference(const Case& c, double spread = 1, double looser = 1) {
  Inputs in(c, spread);
  const Part first = forward(in, c, in.first, in.first, Visible::kCausal);
  Part second = forward(in, c, in.second, in.second, Visible::kCausal);
  const Part earlier = forward(in, c, in.second, in.first, Visible::kAll);
  ops::attention_merge(in.ex, second.out, second.lse, earlier.out, earlier.lse);
  Gradients of_first(c), of_second(c);
  backward(in, c, of_first, of_first, in.first, in.first, first, Visible::kCausal);
  backward(in, c, of_second, of_second, in.second, in.second, second, Visible::kCausal);
  backward(in, c, of_second, of_first, in.second, in.first, second, Visible::kAll);

  const AttentionReference expected =
      reference_attention(in.whole.values(), c.whole(), 2 * c.tokens(), documents_of(c), in.dwhole.values());
  // Parts are fp32 whatever the inputs; in bf16 the backward starts from the rounded output.
  const Tolerance out{1e-5, 2e-6 * looser + rounding_of_probabilities(c.dtype)}, lse{2e-6, 2e-7 * looser};
  const Tolerance gradient =
      c.dtype == DType::kBF16 ? Tolerance{1.0 / 128, 4e-3} : Tolerance{1e-5, 4e-6 * looser};
  expect_close(first.out.values(), chunk_of(c, expected.out, 0), out, "out of the first chunk");
  expect_close(first.lse.values(), chunk_of(c, expected.lse, 0), lse, "lse of the first chunk");
  expect_close(second.out.values(), chunk_of(c, expected.out, 1), out, "out of the second chunk");
  expect_close(second.lse.values(), chunk_of(c, expected.lse, 1), lse, "lse of the second chunk");
  expect_close(joined(in, c, of_first), chunk_of(c, expected.dqkv, 0), gradient, "dqkv of the first chunk");
  expect_close(joined(in, c, of_second), chunk_of(c, expected.dqkv, 1), gradient, "dqkv of the second chunk");
}

class AttentionPair : public testing::TestWithParam<Case> {};

TEST_P(AttentionPair, MergedPartsAgreeWithDouble) {
  expect_reference(GetParam());
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const std::int64_t chunk : {1, 9, 64, 65, 130})
      for (const Packing p : {Packing::kNone, Packing::kOne, Packing::kCrossing, Packing::kInterleaved})
        all.push_back({{4, 2, 16, chunk}, 2, dtype, p});
    for (const std::int64_t chunk : {1, 70}) all.push_back({{2, 2, 16, chunk}, 3, dtype, Packing::kApart});
    // A window that ends within the queries' chunk, at its beginning, within the earlier one, before both.
    for (const std::int64_t window : {1, 20, 64, 65, 66, 100, 129, 130, 500}) {
      all.push_back({{4, 2, 16, 65, window}, 2, dtype});
      all.push_back({{2, 1, 28, 130, window}, 1, dtype, Packing::kCrossing});
    }
    all.push_back({{2, 2, 16, 9, 4}, 2, dtype, Packing::kInterleaved});
    all.push_back({{6, 1, 28, 65}, 1, dtype});
    all.push_back({{2, 2, 128, 33}, 1, dtype});
  }
  return all;
}
std::string label(const testing::TestParamInfo<Case>& i) {
  const AttentionShape& s = i.param.shape;
  return fmt::format("{}_heads{}of{}_dim{}_{}x{}_packing{}{}", dtype_label(i.param.dtype), s.kv_heads,
                     s.heads, s.head_dim, i.param.sequences, s.seq_len, static_cast<int>(i.param.packing),
                     s.window > 0 ? fmt::format("_window{}", s.window) : "");
}
INSTANTIATE_TEST_SUITE_P(Chunks, AttentionPair, testing::ValuesIn(cases()), label);

TEST(AttentionPairExtremes, PeakedScores) {  // nearly one-hot, often in one of the parts alone
  expect_reference({{2, 2, 16, 70}, 1, DType::kF32}, 10, 100);
}

TEST(AttentionPairSame, CausalIsThePlainOp) {
  const Case c{{4, 2, 28, 130}, 2, DType::kF32, Packing::kInterleaved};
  Inputs in(c);
  const Part part = forward(in, c, in.first, in.first, Visible::kCausal);
  Part plain(c);
  ops::attention_forward(in.ex, plain.out, plain.lse, in.first.qkv, c.shape, in.first.documents);
  EXPECT_TRUE(part == plain);
  Gradients gradients(c);
  backward(in, c, gradients, gradients, in.first, in.first, plain, Visible::kCausal);
  HostTensor dqkv({c.tokens(), c.shape.qkv_width()}, DType::kF32);
  ops::attention_backward(in.ex, dqkv, in.first.dout, in.first.qkv, {plain.out, plain.lse}, c.shape,
                          in.first.documents);
  EXPECT_EQ(joined(in, c, gradients), dqkv.values());
}

TEST(AttentionPairSame, BackwardAdds) {
  const Case c{{4, 2, 28, 65}, 2, DType::kF32};
  Inputs in(c);
  const Part part = forward(in, c, in.second, in.first, Visible::kAll);
  Gradients once(c), twice(c);
  backward(in, c, once, once, in.second, in.first, part, Visible::kAll);
  for (int i = 0; i < 2; ++i) backward(in, c, twice, twice, in.second, in.first, part, Visible::kAll);
  for (std::size_t i = 0; i < once.dq.size(); ++i) ASSERT_EQ(twice.dq.get(i), 2 * once.dq.get(i));
  for (std::size_t i = 0; i < once.dkv.size(); ++i) ASSERT_EQ(twice.dkv.get(i), 2 * once.dkv.get(i));
}

// Documents that share no id; the second time with ranges of ids that overlap, which blocks are judged by.
TEST(AttentionPairDisjoint, NoKeyGivesZeroAndMinusInfinity) {
  for (const bool overlap : {false, true}) {
    const Case c{{4, 2, 28, 70}, 2, DType::kF32, Packing::kApart};
    Inputs in(c);
    for (std::size_t t = 0; t < in.first.ids.size() && overlap; ++t) {
      in.first.ids.set(t, static_cast<double>(2 * (t % 5)));
      in.second.ids.set(t, static_cast<double>(2 * (t % 5) + 1));
    }
    const Part own = forward(in, c, in.second, in.second, Visible::kCausal);
    const Part none = forward(in, c, in.second, in.first, Visible::kAll);
    for (const double x : none.out.values()) ASSERT_EQ(x, 0);
    for (const double x : none.lse.values()) ASSERT_EQ(x, -std::numeric_limits<double>::infinity());
    Part merged = own;
    ops::attention_merge(in.ex, merged.out, merged.lse, none.out, none.lse);
    EXPECT_TRUE(merged == own);
    merged = none;
    ops::attention_merge(in.ex, merged.out, merged.lse, own.out, own.lse);
    EXPECT_EQ(merged.out.values(), own.out.values());
    EXPECT_TRUE(merged.lse == own.lse);
    Gradients gradients(c);
    backward(in, c, gradients, gradients, in.second, in.first, own, Visible::kAll);
    EXPECT_EQ(gradients.dq.values(), Values(gradients.dq.size(), 0.0));
    EXPECT_EQ(gradients.dkv.values(), Values(gradients.dkv.size(), 0.0));
  }
}

TEST(AttentionMerge, WeighsPartsAndIsSafe) {
  OpExec ex;
  const double inf = std::numeric_limits<double>::infinity();
  HostTensor out = tensor_of({1, 8}, DType::kF32, {0, 0, 1, 2, 3, 4, 5, 6});
  HostTensor lse = tensor_of({1, 4}, DType::kF32, {-inf, 1e4, 2, -3e4});
  const HostTensor part = tensor_of({1, 8}, DType::kF32, {0, 0, 9, 9, 7, 8, 1, 2});
  const HostTensor part_lse = tensor_of({1, 4}, DType::kF32, {-inf, -1e4, 2 + std::log(3.0), -inf});
  ops::attention_merge(ex, out, lse, part, part_lse);
  expect_close(out.values(), {0, 0, 1, 2, 6, 7, 5, 6}, {1e-6, 0}, "out");
  EXPECT_EQ(lse.get(0), -inf);
  expect_close({lse.get(1), lse.get(2), lse.get(3)}, {1e4, 2 + std::log(4.0), -3e4}, {1e-6, 0}, "lse");
}

TEST(AttentionPairThreads, SameBits) {
  const Case c{{4, 2, 28, 130}, 3, DType::kF32, Packing::kCrossing};
  expect_same_for_any_threads([&] {
    Inputs in(c);
    Part own = forward(in, c, in.second, in.second, Visible::kCausal);
    const Part earlier = forward(in, c, in.second, in.first, Visible::kAll);
    ops::attention_merge(in.ex, own.out, own.lse, earlier.out, earlier.lse);
    Gradients gradients(c);
    backward(in, c, gradients, gradients, in.second, in.first, own, Visible::kAll);
    return std::tuple(own, gradients);
  });
}

TEST(AttentionPairEmpty, NoTokens) {
  const Case c{{4, 2, 28, 65}, 0, DType::kBF16};
  Inputs in(c);
  Part part = forward(in, c, in.second, in.first, Visible::kAll);
  ops::attention_merge(in.ex, part.out, part.lse, part.out, part.lse);
  Gradients gradients(c);
  backward(in, c, gradients, gradients, in.second, in.first, part, Visible::kAll);
}

TEST(AttentionPairChecks, RefusesWrongTensors) {
  const Case c{{2, 1, 8, 4}, 2, DType::kBF16, Packing::kOne};
  Inputs in(c);
  Part part(c);
  const auto run = [&](HostTensor& out, HostTensor& lse, const HostTensor& kv, const AttentionShape& s,
                       ConstTensorView ids) {
    ops::attention_pair_forward(in.ex, out, lse, in.first.qkv, kv,
                                {s, Visible::kAll, in.first.documents, ids});
  };
  run(part.out, part.lse, in.first.kv, c.shape, in.first.documents);
  HostTensor rounded({8, 16}, DType::kBF16), wide({8, 32}, DType::kBF16);
  EXPECT_THROW(run(rounded, part.lse, in.first.kv, c.shape, in.first.documents), Error) << "fp32 parts";
  EXPECT_THROW(run(part.out, part.out, in.first.kv, c.shape, in.first.documents), Error);
  EXPECT_THROW(run(part.out, part.lse, wide, c.shape, in.first.documents), Error) << "keys and values alone";
  EXPECT_THROW(run(part.out, part.lse, in.first.kv, {2, 1, 8, 3}, in.first.documents), Error);
  EXPECT_THROW(run(part.out, part.lse, in.first.kv, c.shape, {}), Error) << "documents of one chunk";
  EXPECT_THROW(ops::attention_merge(in.ex, part.out, part.lse, part.lse, part.lse), Error);
  HostTensor dq({8, 16}, DType::kBF16), dkv({8, 16}, DType::kF32);
  EXPECT_THROW(ops::attention_pair_backward(in.ex, {dq, dkv}, rounded, in.first.qkv, in.first.kv,
                                            {rounded, part.lse}, {c.shape, Visible::kAll, {}, {}}),
               Error)
      << "fp32 gradients";
}

TEST(AttentionPairDry, BooksVisiblePairs) {
  const AttentionShape s{4, 2, 8, 16};
  const TensorView qkv = dry_tensor({32, 64}, DType::kBF16), kv = dry_tensor({32, 32}, DType::kBF16);
  const TensorView out = dry_tensor({32, 32}, DType::kBF16), lse = dry_tensor({32, 4}, DType::kF32);
  const TensorView part = dry_tensor({32, 32}, DType::kF32);  // and both gradients
  for (const Visible visible : {Visible::kCausal, Visible::kAll}) {
    OpExec ex(DeviceType::kDry);
    ops::attention_pair_forward(ex, part, lse, qkv, kv, {s, visible, {}, {}});
    ops::attention_merge(ex, part, lse, part, lse);
    ops::attention_pair_backward(ex, {part, part}, out, qkv, kv, {out, lse}, {s, visible, {}, {}});
    const double pairs = 2 * (visible == Visible::kAll ? 16 * 16 : 16 * 17 / 2), product = 2 * pairs * 4 * 8;
    expect_booked(ex.ledger(), "attention_pair_forward", 2 * product, 2048 + 2048, 4096 + 512);
    expect_booked(ex.ledger(), "attention_merge", 0, 2 * (4096 + 512), 4096 + 512);
    expect_booked(ex.ledger(), "attention_pair_backward", 4 * product, 3 * 2048 + 2048 + 512 + 2 * 4096,
                  2 * 4096);
  }
}

// Chunks of 16, the second one 16 or 32 ahead, and a window of 20: query i sees 19 - i keys, 16 at most, or 3 - i.
TEST(AttentionPairDry, BooksThePairsOfAWindow) {
  const AttentionShape s{4, 2, 8, 16, 20};
  const TensorView qkv = dry_tensor({32, 64}, DType::kBF16), kv = dry_tensor({32, 32}, DType::kBF16);
  const TensorView lse = dry_tensor({32, 4}, DType::kF32), part = dry_tensor({32, 32}, DType::kF32);
  for (const auto& [ahead, of_sequence] : {std::pair{16, 4 * 16 + 114}, {32, 3 + 2 + 1}}) {
    OpExec ex(DeviceType::kDry);
    ops::attention_pair_forward(ex, part, lse, qkv, kv, {s, Visible::kAll, {}, {}, ahead});
    EXPECT_DOUBLE_EQ(ex.ledger().entries().at("attention_pair_forward").flops,
                     2.0 * 2 * 2 * of_sequence * 4 * 8)
        << ahead;
  }
  OpExec ex(DeviceType::kDry);
  EXPECT_THROW(ops::attention_pair_forward(ex, part, lse, qkv, kv, {s, Visible::kAll, {}, {}, 0}), Error)
      << "an earlier chunk that is not earlier";
}

TEST(CopyColumns, ConvertsAndLeavesTheRest) {
  for (const DType to : {DType::kF32, DType::kBF16})
    for (const DType from : {DType::kF32, DType::kBF16})
      for (const std::int64_t width : {0, 1, 15, 16, 37}) {
        OpExec ex;
        const std::int64_t T = 5, out_width = 45, in_width = 40;
        const HostTensor in = random_tensor({T, in_width}, from, 1);
        HostTensor out = filled({T, out_width}, to, 3), one({1, 1}, to);
        ops::copy_columns(ex, out, 6, in, 2, width);
        for (std::int64_t i = 0; i < T * out_width; ++i) {
          const std::int64_t column = i % out_width - 6;
          one.set(0, 3);
          if (0 <= column && column < width)
            one.set(0, in.get(static_cast<std::size_t>(i / out_width * in_width + 2 + column)));
          ASSERT_EQ(out.get(static_cast<std::size_t>(i)), one.get(0))
              << "element " << i << " width " << width;
        }
        expect_booked(ex.ledger(), "copy_columns", 0,
                      static_cast<double>(T * width) * static_cast<double>(size_of(from)),
                      static_cast<double>(T * width) * static_cast<double>(size_of(to)));
      }
}

TEST(CopyColumns, RefusesColumnsThatAreNotThere) {
  OpExec ex;
  HostTensor out({3, 8}, DType::kF32), in({3, 6}, DType::kF32), longer({4, 8}, DType::kF32);
  EXPECT_THROW(ops::copy_columns(ex, out, 5, in, 0, 4), Error);
  EXPECT_THROW(ops::copy_columns(ex, out, 0, in, 3, 4), Error);
  EXPECT_THROW(ops::copy_columns(ex, out, -1, in, 0, 2), Error);
  EXPECT_THROW(ops::copy_columns(ex, longer, 0, in, 0, 2), Error);
}

}  // namespace
}  // namespace upmoe::test
