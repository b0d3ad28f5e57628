#include "kernels/ops/attention.h"

#include <gtest/gtest.h>

#include "kernels/ops/gemm.h"
#include "tests/support/attention_rounding.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

enum class Packing { kNone, kOne, kShort, kCrossing, kInterleaved, kRuns };

struct Case {
  AttentionShape shape;
  std::int64_t sequences;
  DType dtype;
  Packing packing = Packing::kNone;
};

std::vector<std::int32_t> documents_of(Packing packing, std::int64_t tokens) {
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; packing != Packing::kNone && t < tokens; ++t) {
    std::int64_t id = 7;
    if (packing == Packing::kShort) id = t % 5 == 0 ? t : t / 3;  // many of length 1
    if (packing == Packing::kCrossing) id = -(t / 45);  // borders beside those of blocks; falling ids
    if (packing == Packing::kInterleaved) id = t % 3;   // not contiguous
    if (packing == Packing::kRuns) id = t / 5 + t / 3 + t / 80 * 60;  // one to three tokens, side by side
    ids.push_back(static_cast<std::int32_t>(id));
  }
  return ids;
}

// Where documents begin, if each has its tokens of a sequence side by side.
std::vector<std::int32_t> runs_of(const Case& c, const std::vector<std::int32_t>& ids) {
  std::vector<std::int32_t> runs;
  if (c.packing != Packing::kOne && c.packing != Packing::kCrossing && c.packing != Packing::kRuns)
    return runs;
  for (std::size_t t = 0; t < ids.size(); ++t)
    if (t % static_cast<std::size_t>(c.shape.seq_len) == 0 || ids[t] != ids[t - 1])
      runs.push_back(static_cast<std::int32_t>(t));
  runs.push_back(static_cast<std::int32_t>(ids.size()));
  return runs;
}

// The op's results for one case.
struct Attended {
  HostTensor out, lse, dqkv;
  friend bool operator==(const Attended&, const Attended&) = default;
};

struct Inputs {
  HostTensor qkv, dout;
  std::vector<std::int32_t> document;

  explicit Inputs(const Case& c, double spread = 1)
      : qkv(random_tensor({c.sequences * c.shape.seq_len, c.shape.qkv_width()}, c.dtype, 1, spread)),
        dout(random_tensor({c.sequences * c.shape.seq_len, c.shape.heads * c.shape.head_dim}, c.dtype, 2)),
        document(documents_of(c.packing, c.sequences * c.shape.seq_len)) {}
};

Attended attend(const Case& c, const Inputs& in) {
  OpExec ex;
  ex.spoil_scratch();
  const std::int64_t T = c.sequences * c.shape.seq_len;
  Attended r{HostTensor({T, c.shape.heads * c.shape.head_dim}, c.dtype),
             HostTensor({T, c.shape.heads}, DType::kF32), HostTensor({T, c.shape.qkv_width()}, c.dtype)};
  const HostTensor document = tensor_of({static_cast<std::int64_t>(in.document.size())}, DType::kI32,
                                        Values(in.document.begin(), in.document.end()));
  const ConstTensorView document_T = in.document.empty() ? ConstTensorView{} : document;
  const std::vector<std::int32_t> runs = runs_of(c, in.document);
  AttentionShape shape = c.shape;
  shape.runs = runs;
  ops::attention_forward(ex, r.out, r.lse, in.qkv, shape, document_T);
  ops::attention_backward(ex, r.dqkv, in.dout, in.qkv, {r.out, r.lse}, shape, document_T);
  EXPECT_EQ(ex.scratch_used(), 0u);
  return r;
}

void expect_reference(const Case& c, const Inputs& in, double looser = 1) {
  const Attended r = attend(c, in);
  const AttentionReference expected = reference_attention(
      in.qkv.values(), c.shape, c.sequences * c.shape.seq_len, in.document, in.dout.values());
  const bool rounds = c.dtype == DType::kBF16;
  // cuDNN rounds the probabilities to bf16 before they meet the values, which is 2^-9 sum p |v| at the most.
  // That is beside the relative part, since an output may be much smaller than its terms.
  const bool known = c.packing == Packing::kNone || !runs_of(c, in.document).empty();
  const bool cudnn = on_gpu() && known && c.shape.head_dim % 8 == 0;
  const Tolerance out = rounds
                            ? Tolerance{1.0 / 250, cudnn ? 1e-3 : 1e-6 + rounding_of_probabilities(c.dtype)}
                            : Tolerance{1e-5, 2e-6 * looser};
  // In bf16 the backward starts from the rounded output, so delta carries its rounding.
  const Tolerance gradient = rounds ? Tolerance{1.0 / 128, 4e-3} : Tolerance{1e-5, 4e-6 * looser};
  expect_close(r.out.values(), expected.out, out, "out");
  expect_close(r.lse.values(), expected.lse, {2e-6, 2e-7}, "lse");
  expect_close(r.dqkv.values(), expected.dqkv, gradient, "dqkv");
}

class Attention : public testing::TestWithParam<Case> {};

TEST_P(Attention, AgreesWithDouble) {
  expect_reference(GetParam(), Inputs(GetParam()));
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (std::int64_t seq_len : {1, 7, 63, 64, 65, 130, 200}) all.push_back({{2, 2, 16, seq_len}, 2, dtype});
    for (std::int64_t dim : {2, 14, 28, 64, 80, 128}) all.push_back({{2, 1, dim, 70}, 1, dtype});
    all.push_back({{6, 2, 28, 100}, 2, dtype});
    all.push_back({{4, 1, 64, 129}, 1, dtype});
    all.push_back({{16, 16, 8, 33}, 3, dtype});
    for (Packing p : {Packing::kOne, Packing::kShort, Packing::kCrossing, Packing::kInterleaved})
      all.push_back({{4, 2, 28, 200}, 2, dtype, p});
    for (Packing p : {Packing::kOne, Packing::kCrossing, Packing::kRuns}) {
      all.push_back({{4, 2, 16, 200}, 2, dtype, p});
      all.push_back({{3, 3, 64, 200, 20}, 1, dtype, p});
      all.push_back({{4, 1, 28, 70}, 3, dtype, p});
    }
    // A window: within a block, its borders beside those of blocks, several blocks wide, wider than the sequence.
    for (std::int64_t window : {1, 2, 17, 63, 64, 65, 100, 129, 199, 200, 1000})
      all.push_back({{4, 2, 16, 200, window}, 2, dtype});
    for (Packing p : {Packing::kShort, Packing::kCrossing, Packing::kInterleaved})
      all.push_back({{2, 1, 28, 200, 70}, 2, dtype, p});
    // Heads of whole matrix registers of depth.
    for (std::int64_t seq_len : {1, 17, 33, 63, 65, 130}) all.push_back({{2, 1, 32, seq_len}, 2, dtype});
    for (std::int64_t window : {1, 17, 64, 100}) all.push_back({{2, 2, 32, 200, window}, 1, dtype});
    for (Packing p : {Packing::kShort, Packing::kInterleaved, Packing::kRuns})
      all.push_back({{2, 1, 32, 200}, 2, dtype, p});
    all.push_back({{2, 1, 136, 100, 40}, 1, dtype});
    all.push_back({{1, 1, 256, 70, 33}, 1, dtype});
  }
  return all;
}
std::string label(const testing::TestParamInfo<Case>& i) {
  const AttentionShape& s = i.param.shape;
  return fmt::format("{}_heads{}of{}_dim{}_{}x{}_packing{}{}", dtype_label(i.param.dtype), s.kv_heads,
                     s.heads, s.head_dim, i.param.sequences, s.seq_len, static_cast<int>(i.param.packing),
                     s.window > 0 ? fmt::format("_window{}", s.window) : "");
}
INSTANTIATE_TEST_SUITE_P(Shapes, Attention, testing::ValuesIn(cases()), label);

TEST(AttentionReferenceTest, ClosedFormIsTheDerivative) {
  const Case c{{2, 1, 4, 5, 3}, 2, DType::kF32, Packing::kShort};
  const Inputs in(c);
  const Values dout = in.dout.values();
  const Values expected = numeric_gradient(
      [&](const Values& v) { return dot(reference_attention(v, c.shape, 10, in.document).out, dout); },
      in.qkv.values());
  expect_close(reference_attention(in.qkv.values(), c.shape, 10, in.document, dout).dqkv, expected,
               {1e-6, 1e-8}, "dqkv");
}

TEST(AttentionExtremes, PeakedScores) {  // scores of several hundred: the softmax is nearly one-hot
  const Case c{{2, 2, 16, 150}, 1, DType::kF32};
  expect_reference(c, Inputs(c, 10.0), 100);
}

TEST(AttentionExtremes, ScoresOfTenThousand) {
  const Case c{{1, 1, 4, 130}, 1, DType::kF32};
  Inputs in(c);
  for (std::size_t t = 0; t < 130; ++t)
    for (std::size_t d = 0; d < 4; ++d) {
      in.qkv.set(t * 12 + d, 100);
      in.qkv.set(t * 12 + 4 + d, t % 2 == 0 ? 50 : -50);  // scores are +-10000, equal among the even keys
    }
  const Attended r = attend(c, in);
  const AttentionReference expected = reference_attention(in.qkv.values(), c.shape, 130, {});
  expect_close(r.out.values(), expected.out, {1e-5, 2e-6}, "out");
  expect_close(r.lse.values(), expected.lse, {2e-7, 0}, "lse");
  for (double g : r.dqkv.values()) ASSERT_TRUE(std::isfinite(g));
}

TEST(AttentionCausality, LaterTokensDoNotMatter) {
  const Case c{{2, 1, 16, 150}, 2, DType::kF32};
  const Inputs in(c);
  const Attended before = attend(c, in);
  Inputs changed = in;
  const auto width = static_cast<std::size_t>(c.shape.qkv_width());
  for (std::size_t i = 100 * width; i < 150 * width; ++i) changed.qkv.set(i, -3.0 * in.qkv.get(i));
  const Attended after = attend(c, changed);
  for (std::size_t t = 0; t < 300; ++t)
    for (std::size_t i = t * 32; i < (t + 1) * 32 && (t < 100 || t >= 150); ++i)
      ASSERT_EQ(before.out.get(i), after.out.get(i)) << "token " << t;
}

// What a token sees of others ends at its window, to the token.
TEST(AttentionWindow, TokensBeforeItDoNotMatter) {
  const std::int64_t S = 150, W = 40, moved = 60;
  const Case c{{2, 1, 16, S, W}, 1, DType::kF32};
  const Inputs in(c);
  Inputs changed = in;
  const auto width = static_cast<std::size_t>(c.shape.qkv_width());
  for (std::size_t i = moved * width; i < (moved + 1) * width; ++i) changed.qkv.set(i, -3.0 * in.qkv.get(i));
  const Attended before = attend(c, in), after = attend(c, changed);
  for (std::int64_t t = 0; t < S; ++t) {
    bool same = true;
    for (std::size_t i = static_cast<std::size_t>(t) * 32; i < static_cast<std::size_t>(t + 1) * 32; ++i)
      same = same && before.out.get(i) == after.out.get(i);
    EXPECT_EQ(same, t < moved || t >= moved + W) << "token " << t;
  }
}

TEST(AttentionWindow, OneOfTheSequencesLengthIsNone) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const Case none{{4, 2, 16, 130}, 2, dtype}, all{{4, 2, 16, 130, 130}, 2, dtype};
    const Inputs in(none);
    EXPECT_TRUE(attend(none, in) == attend(all, in));
  }
}

TEST(AttentionThreads, SameBits) {
  for (Packing packing : {Packing::kNone, Packing::kCrossing})
    for (std::int64_t window : {0, 70}) {
      const Case c{{4, 2, 28, 150, window}, 3, DType::kF32, packing};
      const Inputs in(c);
      expect_same_for_any_threads([&] { return attend(c, in); });
    }
}

TEST(AttentionEmpty, NoTokens) {
  const Case c{{4, 2, 28, 150}, 0, DType::kF32};
  attend(c, Inputs(c));
}

class Rope : public testing::TestWithParam<DType> {};

TEST_P(Rope, AgreesWithDouble) {
  for (std::int64_t dim : {2, 28, 64, 128})
    for (std::int64_t stride : {1, 3}) {  // positions below and beyond the number of tokens
      OpExec ex;
      const AttentionShape s{3, 1, dim, 20};
      std::vector<std::int32_t> positions;
      for (std::int32_t t = 0; t < 40; ++t) positions.push_back(t % 20 * static_cast<std::int32_t>(stride));
      const HostTensor qkv = random_tensor({40, s.qkv_width()}, GetParam(), 1);
      HostTensor x = qkv;
      const HostTensor positions_T = tensor_of({40}, DType::kI32, Values(positions.begin(), positions.end()));
      ops::rope(ex, x, positions_T, s, 1e4, false);
      // cos and sin are rounded to the dtype as well.
      const Tolerance tolerance =
          GetParam() == DType::kBF16 ? Tolerance{1.0 / 128, 3e-3} : Tolerance{1e-5, 5e-6};
      expect_close(x.values(), reference_rope(qkv.values(), positions, s, 1e4, false), tolerance, "rotated");
      HostTensor back = qkv;
      ops::rope(ex, back, positions_T, s, 1e4, true);
      expect_close(back.values(), reference_rope(qkv.values(), positions, s, 1e4, true), tolerance,
                   "inverse");
      EXPECT_EQ(x.get(static_cast<std::size_t>(s.qkv_width()) * 7 - 1),
                qkv.get(static_cast<std::size_t>(s.qkv_width()) * 7 - 1))
          << "values are not rotated";
    }
}

// The rows against double, the sum against that of the rows as stored, both against the two passes to the bit.
TEST_P(Rope, BackwardSumsTheBiasGradient) {
  const DType dtype = GetParam();
  for (const auto& [dim, tokens] : {std::pair{2, 40}, {28, 1}, {28, 33}, {28, 1030}, {64, 70}, {128, 20}})
    for (const DType of_bias : {DType::kF32, dtype}) {
      OpExec ex;
      const AttentionShape s{2, 1, dim, tokens};
      std::vector<std::int32_t> positions;
      for (std::int32_t t = 0; t < tokens; ++t) positions.push_back(t % 50);
      const HostTensor positions_T =
          tensor_of({tokens}, DType::kI32, Values(positions.begin(), positions.end()));
      const HostTensor dqkv = random_tensor({tokens, s.qkv_width()}, dtype, 1);
      HostTensor fused = dqkv, apart = dqkv, db = filled({s.qkv_width()}, of_bias, 0.25), db2 = db;
      ops::rope_backward(ex, fused, db, positions_T, s, 1e4);
      ops::rope(ex, apart, positions_T, s, 1e4, true);
      ops::bias_backward(ex, db2, apart);
      EXPECT_TRUE(fused == apart && db == db2) << dim << ' ' << tokens;
      const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 128, 3e-3} : Tolerance{1e-5, 5e-6};
      const Values rows = fused.values();
      expect_close(rows, reference_rope(dqkv.values(), positions, s, 1e4, true), tolerance, "turned back");
      Values sum(static_cast<std::size_t>(s.qkv_width()), 0.25);
      for (std::size_t i = 0; i < rows.size(); ++i) sum[i % sum.size()] += rows[i];
      expect_close(db.values(), sum,
                   of_bias == DType::kBF16 ? Tolerance{1.0 / 128, 1e-3} : Tolerance{1e-5, 1e-3}, "bias");
      EXPECT_EQ(ex.scratch_used(), 0u);
    }
}

INSTANTIATE_TEST_SUITE_P(DTypes, Rope, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& i) { return dtype_label(i.param); });

TEST(RopeAngles,
     FarPositionsKeepTheirFraction) {  // the angle itself is an fp32 number; cos and sin of it are exact
  OpExec ex;
  const AttentionShape s{1, 1, 2, 1};
  for (std::int32_t position : {1, 2, 3, 4, 1000, 32767, 131071, 1000003, -5}) {
    HostTensor x = tensor_of({1, 6}, DType::kF32, {1, 0, 0, 1, 5, 6});
    ops::rope(ex, x, tensor_of({1}, DType::kI32, {static_cast<double>(position)}), s, 1e6, false);
    EXPECT_NEAR(x.get(0), std::cos(static_cast<double>(position)), 6e-8) << position;
    EXPECT_NEAR(x.get(1), std::sin(static_cast<double>(position)), 6e-8) << position;
    EXPECT_NEAR(x.get(2), -std::sin(static_cast<double>(position)), 6e-8) << position;
  }
}

TEST(RopeEmpty, NoTokens) {
  OpExec ex;
  HostTensor x({0, 12}, DType::kF32);
  ops::rope(ex, x, HostTensor({0}, DType::kI32), {1, 1, 4, 8}, 1e4, false);
  HostTensor db = filled({12}, DType::kF32, 0.5);
  ops::rope_backward(ex, x, db, HostTensor({0}, DType::kI32), {1, 1, 4, 8}, 1e4);
  EXPECT_EQ(db.values(), Values(12, 0.5));
  expect_overwrites({12}, DType::kF32, [&](const GradientView& over) {
    ops::rope_backward(ex, x, over, HostTensor({0}, DType::kI32), {1, 1, 4, 8}, 1e4);
  });
}

TEST(RopeThreads, SameBits) {
  const AttentionShape s{4, 2, 28, 50};
  expect_same_for_any_threads([&] {
    OpExec ex;
    HostTensor x = random_tensor({200, s.qkv_width()}, DType::kF32, 1), positions({200}, DType::kI32);
    for (std::size_t t = 0; t < 200; ++t) positions.set(t, static_cast<double>(t % 50));
    HostTensor db({s.qkv_width()}, DType::kF32);
    ops::rope(ex, x, positions, s, 1e6, false);
    ops::rope_backward(ex, x, db, positions, s, 1e6);
    return std::tuple(x, db);
  });
}

TEST(AttentionChecks, RefusesWrongShapes) {
  OpExec ex;
  HostTensor qkv = filled({8, 32}, DType::kF32, 1), out({8, 16}, DType::kF32), lse({8, 2}, DType::kF32);
  ops::attention_forward(ex, out, lse, qkv, {2, 1, 8, 4});
  EXPECT_THROW(ops::attention_forward(ex, out, lse, qkv, {2, 1, 8, 3}), Error) << "8 tokens, seq_len 3";
  EXPECT_THROW(ops::attention_forward(ex, out, lse, qkv, {3, 2, 8, 4}), Error) << "3 heads, 2 kv heads";
  EXPECT_THROW(ops::attention_forward(ex, lse, lse, qkv, {2, 1, 8, 4}), Error);
  const ConstTensorView short_ids = lse;
  EXPECT_THROW(ops::attention_forward(ex, out, lse, qkv, {2, 1, 8, 4}, short_ids), Error);
  const HostTensor ids = filled({8}, DType::kI32, 1);
  const auto with_runs = [&](std::vector<std::int32_t> runs, ConstTensorView document_T) {
    AttentionShape shape{2, 1, 8, 4};
    shape.runs = runs;
    ops::attention_forward(ex, out, lse, qkv, shape, document_T);
  };
  EXPECT_NO_THROW(with_runs({0, 1, 4, 8}, ids));
  EXPECT_THROW(with_runs({0, 1, 4, 8}, {}), Error) << "runs of no documents";
  EXPECT_THROW(with_runs({0, 3, 8}, ids), Error) << "a run in two sequences";
  EXPECT_THROW(with_runs({0, 4, 4, 8}, ids), Error);
  EXPECT_THROW(with_runs({0, 4, 7}, ids), Error);
  EXPECT_THROW(with_runs({1, 4, 8}, ids), Error);
  EXPECT_THROW(ops::rope(ex, qkv, filled({8}, DType::kF32, 0), {2, 1, 8, 4}, 1e4, false), Error)
      << "int32 positions";
  HostTensor db({32}, DType::kF32), short_db({31}, DType::kF32), positions({8}, DType::kI32);
  EXPECT_NO_THROW(ops::rope_backward(ex, qkv, db, positions, {2, 1, 8, 4}, 1e4));
  EXPECT_THROW(ops::rope_backward(ex, qkv, short_db, positions, {2, 1, 8, 4}, 1e4), Error);
  EXPECT_THROW(ops::rope_backward(ex, qkv, db, positions, {2, 1, 8, 4}, 0), Error) << "theta";
  static_cast<Exec&>(ex).scratch = nullptr;
  EXPECT_THROW(ops::attention_forward(ex, out, lse, qkv, {2, 1, 8, 4}), Error) << "no scratch";
}

TEST(AttentionDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const AttentionShape s{4, 2, 8, 16};
  const TensorView qkv = dry_tensor({32, 64}, DType::kBF16), out = dry_tensor({32, 32}, DType::kBF16);
  const TensorView lse = dry_tensor({32, 4}, DType::kF32);
  ops::rope(ex, qkv, dry_tensor({32}, DType::kI32), s, 1e4, false);
  ops::rope_backward(ex, qkv, dry_tensor({64}, DType::kF32), dry_tensor({32}, DType::kI32), s, 1e4);
  ops::attention_forward(ex, out, lse, qkv, s);
  ops::attention_backward(ex, qkv, out, qkv, {out, lse}, s);
  const double pairs = 2 * 16 * 17 / 2, product = 2 * pairs * 4 * 8;
  expect_booked(ex.ledger(), "rope", 3 * 32 * 48, 32 * 48 * 2 + 128, 32 * 48 * 2);
  expect_booked(ex.ledger(), "rope_backward", 3 * 32 * 48 + 32 * 64, 32 * 64 * 2 + 128 + 256,
                32 * 48 * 2 + 256);
  expect_booked(ex.ledger(), "attention_forward", 2 * product, 4096, 2048 + 512);
  expect_booked(ex.ledger(), "attention_backward", 4 * product, 4096 + 2 * 2048 + 512, 4096);
}

// Of 16 tokens the first 5 see 1 to 5, the others 5 each.
TEST(AttentionDry, BooksThePairsOfAWindow) {
  const TensorView qkv = dry_tensor({32, 64}, DType::kBF16), out = dry_tensor({32, 32}, DType::kBF16);
  const TensorView lse = dry_tensor({32, 4}, DType::kF32);
  for (const auto& [window, of_sequence] :
       {std::pair{5, 15 + 11 * 5}, {16, 16 * 17 / 2}, {99, 16 * 17 / 2}}) {
    OpExec ex(DeviceType::kDry);
    const AttentionShape s{4, 2, 8, 16, window};
    ops::attention_forward(ex, out, lse, qkv, s);
    ops::attention_backward(ex, qkv, out, qkv, {out, lse}, s);
    const double product = 2.0 * 2 * of_sequence * 4 * 8;
    EXPECT_DOUBLE_EQ(ex.ledger().entries().at("attention_forward").flops, 2 * product) << window;
    EXPECT_DOUBLE_EQ(ex.ledger().entries().at("attention_backward").flops, 4 * product) << window;
  }
}

}  // namespace
}  // namespace upmoe::test
