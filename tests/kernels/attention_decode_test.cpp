#include "kernels/ops/attention_decode.h"

#include <gtest/gtest.h>

#include "tests/support/attention_rounding.h"
#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

// New tokens of a step: whose row they continue, and where.
struct Step {
  std::vector<std::int32_t> rows, positions;
  std::int64_t run = 0;
  std::int64_t tokens() const { return static_cast<std::int64_t>(rows.size()); }
};

struct Case {
  AttentionShape shape;
  std::vector<std::int64_t> lengths;  // of the rows, once all is decoded
  std::int64_t slots, chunk;          // at most so many new tokens of a row at once
  DType dtype;
};

// A cache, and the tokens of all its rows, one row behind the other. What is kept from the beginning is garbage.
struct Rows {
  explicit Rows(const Case& of)
      : c(of),
        B(static_cast<std::int64_t>(of.lengths.size())),
        k(filled({B, of.slots, of.shape.kv_heads * of.shape.head_dim}, of.dtype, NAN)),
        v(k),
        qkv(random_tensor({total(of.lengths), of.shape.qkv_width()}, of.dtype, 1)),
        out({total(of.lengths), of.shape.heads * of.shape.head_dim}, of.dtype) {}
  static std::int64_t total(const std::vector<std::int64_t>& lengths) {
    std::int64_t sum = 0;
    for (const std::int64_t n : lengths) sum += n;
    return sum;
  }
  std::int64_t first(std::int32_t row) const { return total({c.lengths.begin(), c.lengths.begin() + row}); }
  // Their queries, keys and values, stored, and what they attend to; -1: a token of no row, full of NaNs.
  HostTensor decode(OpExec& ex, const Step& step) {
    const std::int64_t H = c.shape.qkv_width(), Q = c.shape.heads * c.shape.head_dim, T = step.tokens();
    HostTensor new_qkv({T, H}, c.dtype), new_out = filled({T, Q}, c.dtype, NAN), row({T}, DType::kI32),
                                         position({T}, DType::kI32);
    for (std::int64_t t = 0; t < T; ++t) {
      const std::int32_t r = step.rows[at(t)], p = step.positions[at(t)];
      row.set(at(t), r);
      position.set(at(t), p);
      for (std::int64_t i = 0; i < H; ++i)
        new_qkv.set(at(t * H + i), r < 0 ? NAN : qkv.get(at((first(r) + p) * H + i)));
    }
    const KeyCache cache{k, v};
    const CachedTokens tokens{row, position, 0, step.run};
    ops::store_keys(ex, cache, new_qkv, tokens, c.shape);
    ops::attention_decode(ex, new_out, new_qkv, cache, tokens, c.shape);
    EXPECT_EQ(ex.scratch_used(), 0u);
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t i = 0; i < Q; ++i) {
        const double value = new_out.get(at(t * Q + i));
        if (step.rows[at(t)] < 0) {
          EXPECT_EQ(value, 0) << "a token of no row";
        } else {
          out.set(at((first(step.rows[at(t)]) + step.positions[at(t)]) * Q + i), value);
        }
      }
    return new_out;
  }

  Case c;
  std::int64_t B;
  HostTensor k, v, qkv, out;
};

// Chunks of different sizes of all rows that have tokens left, with a token of no row between them.
std::vector<Step> steps_of(const Case& c) {
  std::vector<Step> steps;
  std::vector<std::int64_t> done(c.lengths.size());
  for (bool more = true; more;) {
    Step step;
    for (std::size_t r = 0; r < c.lengths.size(); ++r) {
      const std::int64_t room = 1 + static_cast<std::int64_t>(steps.size() + r) % c.chunk,
                         n = std::min(room, c.lengths[r] - done[r]);
      for (std::int64_t i = 0; i < n; ++i) {
        step.rows.push_back(static_cast<std::int32_t>(r));
        step.positions.push_back(static_cast<std::int32_t>(done[r]++));
      }
      if (r == 0) {
        step.rows.push_back(-1);
        step.positions.push_back(0);
      }
    }
    more = step.tokens() > 1;
    if (more) steps.push_back(step);
  }
  return steps;
}

void expect_double(const Rows& rows, double rounding = 0) {
  const Case& c = rows.c;
  const std::int64_t H = c.shape.qkv_width(), Q = c.shape.heads * c.shape.head_dim;
  const Values qkv = rows.qkv.values(), out = rows.out.values();
  const Tolerance tolerance =
      c.dtype == DType::kBF16 ? Tolerance{1.0 / 250, 1e-6 + rounding} : Tolerance{1e-5, 2e-6};
  for (std::int32_t r = 0; r < static_cast<std::int32_t>(c.lengths.size()); ++r) {
    const std::int64_t first = rows.first(r), n = c.lengths[at(r)];
    AttentionShape whole = c.shape;
    whole.seq_len = n;
    const Values expected =
        reference_attention(Values(qkv.begin() + first * H, qkv.begin() + (first + n) * H), whole, n, {}).out;
    expect_close(Values(out.begin() + first * Q, out.begin() + (first + n) * Q), expected, tolerance, "out");
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    all.push_back({{2, 2, 16, 0}, {1}, 1, 1, dtype});
    all.push_back({{4, 2, 28, 0}, {70, 1, 130}, 130, 5, dtype});
    all.push_back({{6, 1, 64, 0}, {66, 64}, 80, 3, dtype});
    all.push_back({{3, 3, 128, 0}, {40}, 40, 40, dtype});
    all.push_back({{2, 1, 256, 0}, {20, 9}, 33, 1, dtype});
    all.push_back({{2, 1, 14, 0}, {20, 9}, 20, 4, dtype});
    // A window: cache that turns round many times, or just once, or not at all; with the fewest slots.
    for (const std::int64_t window : {1, 7, 64, 65, 120})
      for (const std::int64_t chunk : {1, 6})
        all.push_back({{4, 2, 16, 0, window}, {100, 20, 75}, window + chunk - 1, chunk, dtype});
    all.push_back({{2, 2, 16, 0, 10}, {50, 51}, 64, 3, dtype});
  }
  return all;
}
class AttentionDecode : public testing::TestWithParam<Case> {};

TEST_P(AttentionDecode, AgreesWithDouble) {
  OpExec ex;
  Rows rows(GetParam());
  for (const Step& step : steps_of(GetParam())) rows.decode(ex, step);
  expect_double(rows);
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionDecode, testing::ValuesIn(cases()),
                         [](const testing::TestParamInfo<Case>& i) {
                           const AttentionShape& s = i.param.shape;
                           return fmt::format("{}_{}_heads{}of{}_dim{}_window{}_slots{}_chunk{}", i.index,
                                              dtype_label(i.param.dtype), s.kv_heads, s.heads, s.head_dim,
                                              s.window, i.param.slots, i.param.chunk);
                         });

// The same bits alone and beside others, in any order, whatever room the cache has; of one chunk or token by token.
TEST(AttentionDecodeRows, DoNotDependOnTheOthers) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const std::int64_t window : {0, 9}) {
      const Case together{{4, 2, 28, 0, window}, {70, 30, 90}, 100, 4, dtype};
      Case roomier = together;
      roomier.slots = 117;
      OpExec ex;
      Rows a(together), b(roomier);
      for (const Step& step : steps_of(together)) a.decode(ex, step);
      for (std::int32_t r : {2, 0, 1})
        for (std::int32_t p = 0; p < together.lengths[at(r)]; ++p) b.decode(ex, {{r}, {p}});
      EXPECT_TRUE(a.out == b.out) << window;
    }
}

// Chunks of the rows in turn, each a run with a token of none behind it; the first one is short.
std::vector<Step> runs_of(const Case& c) {
  std::vector<Step> steps;
  std::vector<std::int64_t> done(c.lengths.size());
  for (bool more = true; more;) {
    more = false;
    for (std::size_t r = 0; r < c.lengths.size(); ++r) {
      const std::int64_t most =
          done[r] == 0 ? std::min<std::int64_t>(c.chunk, 9 + static_cast<std::int64_t>(r)) : c.chunk;
      Step step;
      step.run = std::min(most, c.lengths[r] - done[r]);
      for (std::int64_t i = 0; i < step.run; ++i) {
        step.rows.push_back(static_cast<std::int32_t>(r));
        step.positions.push_back(static_cast<std::int32_t>(done[r]++));
      }
      if (step.run == 0) continue;
      step.rows.push_back(-1);
      step.positions.push_back(0);
      steps.push_back(step);
      more = true;
    }
  }
  return steps;
}

class AttentionRuns : public testing::TestWithParam<Case> {};

TEST_P(AttentionRuns, AgreeWithDouble) {
  OpExec ex;
  Rows rows(GetParam());
  for (const Step& step : runs_of(GetParam())) rows.decode(ex, step);
  expect_double(rows, rounding_of_probabilities(GetParam().dtype));
}

// A pretended GPU has no time for more: every size of tile, chunks of one, of several and of a part of one, and rings
// that turn within a tile of keys.
std::vector<Case> few_run_cases(DType dtype) {
  return {{{4, 2, 28, 0}, {100, 1, 40}, 100, 70, dtype},   {{2, 1, 128, 0}, {60}, 60, 33, dtype},
          {{2, 1, 200, 0}, {45, 20}, 50, 20, dtype},       {{2, 1, 16, 0, 1}, {50}, 20, 20, dtype},
          {{4, 2, 14, 0, 7}, {90, 45}, 26, 20, dtype},     {{2, 2, 16, 0, 65}, {200}, 104, 40, dtype},
          {{2, 1, 16, 0, 90}, {170, 150}, 189, 100, dtype}};
}

std::vector<Case> run_cases() {
  std::vector<Case> all;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    if (on_gpu()) {
      for (const Case& c : few_run_cases(dtype)) all.push_back(c);
      continue;
    }
    all.push_back({{4, 2, 28, 0}, {200, 1, 130}, 200, 50, dtype});
    all.push_back({{2, 2, 16, 0}, {64, 128}, 130, 64, dtype});
    all.push_back({{6, 1, 64, 0}, {150}, 150, 16, dtype});
    all.push_back({{2, 1, 128, 0}, {90, 73}, 90, 33, dtype});
    all.push_back({{2, 1, 14, 0}, {300}, 310, 129, dtype});
    // A window, with the fewest slots: they turn within blocks, and in the middle of them.
    for (const std::int64_t window : {1, 7, 64, 65, 120})
      for (const std::int64_t chunk : {16, 40, 100})
        all.push_back({{4, 2, 16, 0, window}, {300, 20, 275}, window + chunk - 1, chunk, dtype});
    all.push_back({{2, 2, 28, 0, 90}, {400, 333}, 192, 64, dtype});
  }
  return all;
}
INSTANTIATE_TEST_SUITE_P(Shapes, AttentionRuns, testing::ValuesIn(run_cases()),
                         [](const testing::TestParamInfo<Case>& i) {
                           const AttentionShape& s = i.param.shape;
                           return fmt::format("{}_{}_dim{}_window{}_slots{}_chunk{}", i.index,
                                              dtype_label(i.param.dtype), s.head_dim, s.window, i.param.slots,
                                              i.param.chunk);
                         });

// Whatever the cache holds of other rows and has of room.
TEST(AttentionRuns, DoNotDependOnTheOthers) {
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const std::int64_t window : {0, 70}) {
      const std::int64_t part = on_gpu() ? 2 : 1;
      const Case together{{4, 2, 28, 0, window}, {170 / part, 130 / part, 190 / part}, 190, 40, dtype};
      OpExec ex;
      Rows a(together);
      for (const Step& step : runs_of(together)) a.decode(ex, step);
      Case roomier = together;
      roomier.slots = 233;
      Rows b(roomier);
      for (const std::int32_t row : {2, 0, 1})
        for (const Step& step : runs_of(together))
          if (step.rows[0] == row) b.decode(ex, step);
      EXPECT_TRUE(a.out == b.out) << window;
    }
}

// A row continued by a run is the row continued by its tokens one by one, but for rounding; tokens of a run that is too
// short for tiles are, to the bit, those of none.
TEST(AttentionRuns, AreTheirTokensOneByOne) {
  const Case c{{4, 2, 28, 0, 30}, {90}, 64, 35, DType::kF32};
  OpExec ex;
  Rows by_runs(c), one_by_one(c), few(c);
  for (const Step& step : runs_of(c)) by_runs.decode(ex, step);
  for (std::int32_t p = 0; p < 90; ++p) {
    one_by_one.decode(ex, {{0}, {p}});
    few.decode(ex, {{0}, {p}, 1});
  }
  EXPECT_TRUE(few.out == one_by_one.out);
  EXPECT_FALSE(by_runs.out == one_by_one.out) << "nothing was computed by tiles";
  expect_close(by_runs.out.values(), one_by_one.out.values(), {1e-5, 2e-6}, "out");
}

TEST(AttentionRuns, SameBitsForAnyThreads) {
  const Case c{{4, 2, 28, 0, 100}, {on_gpu() ? 120 : 270, 190}, 140, 41, DType::kF32};
  expect_same_for_any_threads([&] {
    OpExec ex;
    Rows rows(c);
    for (const Step& step : runs_of(c)) rows.decode(ex, step);
    return rows.out;
  });
}

TEST(AttentionDecodeExtremes, PeakedScores) {
  const Case c{{2, 1, 16, 0}, {100}, 100, 1, DType::kF32};
  OpExec ex;
  Rows rows(c);
  for (std::size_t i = 0; i < rows.qkv.size(); ++i) rows.qkv.set(i, 12 * rows.qkv.get(i));
  for (const Step& step : steps_of(c)) rows.decode(ex, step);
  AttentionShape whole = c.shape;
  whole.seq_len = 100;
  expect_close(rows.out.values(), reference_attention(rows.qkv.values(), whole, 100, {}).out, {1e-5, 2e-3},
               "out");
}

TEST(AttentionDecodeThreads, SameBits) {
  const Case c{{4, 2, 28, 0, 30}, {70, 30, 90}, 40, 6, DType::kF32};
  expect_same_for_any_threads([&] {
    OpExec ex;
    Rows rows(c);
    for (const Step& step : steps_of(c)) rows.decode(ex, step);
    return rows.out;
  });
}

TEST(AttentionDecodeEmpty, NoTokens) {
  OpExec ex;
  Rows rows({{4, 2, 28, 0}, {3}, 3, 1, DType::kF32});
  rows.decode(ex, {});
  Rows none({{4, 2, 28, 0}, {}, 3, 1, DType::kF32});
  none.decode(ex, {{-1}, {0}});
}

TEST(AttentionDecodeChecks, RefusesWrongShapes) {
  OpExec ex;
  HostTensor qkv = filled({2, 32}, DType::kF32, 1), out({2, 16}, DType::kF32), k({1, 4, 8}, DType::kF32),
             v = k, narrow({1, 4, 7}, DType::kF32), ids({2}, DType::kI32), short_ids({1}, DType::kI32);
  ids.set(1, 0);
  const AttentionShape s{2, 1, 8, 0};
  const KeyCache cache{k, v};
  HostTensor places({2}, DType::kI32);
  places.set(1, 1);
  const CachedTokens tokens{ids, places, 3};
  EXPECT_NO_THROW(ops::store_keys(ex, cache, qkv, tokens, s));
  EXPECT_NO_THROW(ops::attention_decode(ex, out, qkv, cache, tokens, s));
  EXPECT_THROW(ops::attention_decode(ex, qkv, qkv, cache, tokens, s), Error);
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, {k, narrow}, tokens, s), Error);
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, short_ids, 0}, s), Error);
  EXPECT_THROW(ops::store_keys(ex, cache, out, tokens, s), Error);
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, places, 0, 3}, s), Error)
      << "a run of more tokens";
  if (on_gpu()) return;  // values of tensors are looked at on the host alone
  EXPECT_NO_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, places, 0, 2}, s));
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, places, 0, 1}, s), Error)
      << "a token of a row behind it";
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, ids, 0, 2}, s), Error)
      << "one position twice";
  places.set(1, 4);
  EXPECT_THROW(ops::store_keys(ex, cache, qkv, {ids, places, 0}, s), Error) << "no such slot";
  EXPECT_THROW(ops::store_keys(ex, cache, qkv, {ids, places, 0}, {2, 1, 8, 0, 5}), Error)
      << "nor with a window of more than the slots";
  EXPECT_NO_THROW(ops::store_keys(ex, cache, qkv, {ids, places, 0}, {2, 1, 8, 0, 4}));
  ids.set(0, 1);
  places.set(1, 1);
  EXPECT_THROW(ops::attention_decode(ex, out, qkv, cache, {ids, places, 0}, s), Error) << "no such row";
}

TEST(AttentionDecodeDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const AttentionShape s{4, 2, 8, 0};
  const TensorView qkv = dry_tensor({3, 64}, DType::kBF16), out = dry_tensor({3, 32}, DType::kBF16),
                   kept = dry_tensor({2, 10, 16}, DType::kBF16), ids = dry_tensor({3}, DType::kI32);
  const CachedTokens tokens{ids, ids, 17};
  ops::store_keys(ex, {kept, kept}, qkv, tokens, s);
  ops::attention_decode(ex, out, qkv, {kept, kept}, tokens, s);
  expect_booked(ex.ledger(), "store_keys", 0, 3 * 32 * 2 + 24, 3 * 32 * 2);
  expect_booked(ex.ledger(), "attention_decode", 4 * 17 * 32, 3 * 32 * 2 + 17 * 32 * 2 + 24, 3 * 32 * 2);
}

}  // namespace
}  // namespace upmoe::test
