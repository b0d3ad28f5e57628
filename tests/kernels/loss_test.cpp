#include "kernels/ops/loss.h"

#include <gtest/gtest.h>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_loss.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

// By each way that a GPU may have; elsewhere there is one.
class PathExec : public OpExec {
 public:
  explicit PathExec(CrossEntropyPath path) { static_cast<Exec&>(*this).cross_entropy = path; }
};

const auto kPaths = testing::Values(CrossEntropyPath::kPortable, CrossEntropyPath::kClusters);

std::string name_of_path(CrossEntropyPath path) {
  return path == CrossEntropyPath::kPortable ? "portable" : "clusters";
}

using Size = std::pair<std::int64_t, std::int64_t>;

class CrossEntropy : public testing::TestWithParam<std::tuple<Size, CrossEntropyPath>> {
 protected:
  const std::int64_t C = std::get<Size>(GetParam()).first, V = std::get<Size>(GetParam()).second;
  HostTensor logits{random_tensor({C, V}, DType::kF32, 1, 4.0)}, targets{targets_for(C, V)},
      loss{{C}, DType::kF32};
  PathExec ex{std::get<CrossEntropyPath>(GetParam())};
};

TEST_P(CrossEntropy, LossAndGradient) {
  const float scale = 0.125f;
  const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 0.125);
  ops::cross_entropy(ex, {loss, {}, scale}, logits, targets);
  expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    HostTensor d({C, V}, dtype);
    const TensorView d_CV = d;
    ops::cross_entropy(ex, {loss, d_CV, scale}, logits, targets);
    expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
    const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 250, 1e-7} : Tolerance{3e-6, 1e-7};
    expect_close(d.values(), expected.dlogits, tolerance, "dlogits");
  }
  const TensorView in_place = logits;
  ops::cross_entropy(ex, {loss, in_place, scale}, logits, targets);
  expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
  expect_close(logits.values(), expected.dlogits, {3e-6, 1e-7}, "dlogits in place of the logits");
}

// The vocabulary divided between ranks gives every rank the loss of the whole and its columns of the gradient.
TEST_P(CrossEntropy, DividedVocabulary) {
  for (const std::int64_t ranks : {1, 2, 3, 7}) {
    if (ranks > V) continue;
    const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 0.125);
    HostTensor stats({ranks, C, 3}, DType::kF64);
    std::vector<HostTensor> parts;
    std::vector<VocabShard> shards;
    for (std::int64_t r = 0; r < ranks; ++r) {
      const std::int64_t begin = V * r / ranks, end = V * (r + 1) / ranks;
      shards.push_back({begin, V});
      HostTensor part({C, end - begin}, DType::kF32);
      for (std::int64_t c = 0; c < C; ++c)
        for (std::int64_t v = begin; v < end; ++v)
          part.set(static_cast<std::size_t>(c * (end - begin) + v - begin),
                   logits.get(static_cast<std::size_t>(c * V + v)));
      const TensorView all = stats;
      ops::cross_entropy_stats(ex, all.rows(r, r + 1).reshape({C, 3}), part, targets, shards.back());
      parts.push_back(std::move(part));
    }
    for (std::size_t r = 0; r < parts.size(); ++r) {
      const std::int64_t width = ConstTensorView(parts[r]).shape[1];
      HostTensor d({C, width}, DType::kF32);
      const TensorView d_CV = d;
      ops::cross_entropy_sharded(ex, {loss, d_CV, 0.125f}, parts[r], targets, stats, shards[r]);
      expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
      std::vector<double> columns;
      for (std::int64_t c = 0; c < C; ++c)
        for (std::int64_t v = 0; v < width; ++v)
          columns.push_back(expected.dlogits[static_cast<std::size_t>(c * V + shards[r].begin + v)]);
      expect_close(d.values(), columns, {3e-6, 1e-7}, "dlogits of a shard");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropy,
                         testing::Combine(testing::Values(Size{1, 1}, Size{5, 13}, Size{9, 1000},
                                                          Size{3, 4096}, Size{2, 4103}, Size{2, 40004},
                                                          Size{2, 100000}, Size{3, 151936}, Size{0, 16}),
                                          kPaths),
                         [](const auto& i) {
                           const Size size = std::get<Size>(i.param);
                           return std::to_string(size.first) + "x" + std::to_string(size.second) + "_" +
                                  name_of_path(std::get<CrossEntropyPath>(i.param));
                         });

class CrossEntropyExtremes : public testing::TestWithParam<CrossEntropyPath> {
 protected:
  PathExec ex{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Paths, CrossEntropyExtremes, kPaths,
                         [](const auto& i) { return name_of_path(i.param); });

TEST_P(CrossEntropyExtremes, LargeLogits) {
  const HostTensor logits =
      tensor_of({3, 4}, DType::kF32, {1e4, 1e4, -1e4, 0, -1e4, -1e4, -1e4, -1e4, 1e4, 9999, 0, 0});
  const HostTensor targets = tensor_of({3}, DType::kI32, {0, 3, 1});
  HostTensor loss({3}, DType::kF32), d({3, 4}, DType::kF32);
  const TensorView d_CV = d;
  ops::cross_entropy(ex, {loss, d_CV, 1.0f}, logits, targets);
  const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 1.0);
  expect_close(loss.values(), {std::log(2.0), std::log(4.0), 1 + std::log(1 + std::exp(-1.0))}, {1e-6, 0},
               "loss");
  expect_close(d.values(), expected.dlogits, {3e-6, 1e-7}, "dlogits");
}

// What is summed before a larger logit comes is scaled: by a little, by much, to nothing; or never, behind the largest.
TEST_P(CrossEntropyExtremes, TheLargestComesLate) {
  constexpr std::int64_t kWidth = 5000;
  HostTensor logits({6, kWidth}, DType::kF32), loss({6}, DType::kF32), d({6, kWidth}, DType::kF32);
  const double slopes[] = {1e-3, 0.02, 1, -1e-3, -0.02, -1};
  for (std::size_t c = 0; c < 6; ++c)
    for (std::size_t v = 0; v < kWidth; ++v)
      logits.set(c * kWidth + v, slopes[c] * static_cast<double>(v) + 0.3 * static_cast<double>(v % 3));
  const HostTensor targets = tensor_of({6}, DType::kI32, {0, kWidth - 1, kWidth - 9, kWidth - 1, 0, 4});
  const TensorView d_CV = d;
  ops::cross_entropy(ex, {loss, d_CV, 1.0f}, logits, targets);
  const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 1.0);
  expect_close(loss.values(), expected.loss, {2e-7, 1e-6}, "loss");
  expect_close(d.values(), expected.dlogits, {3e-6, 1e-7}, "dlogits");
}

// A row of which a GPU's blocks have a share each: the target in any of them, at their ends and in the last one, and
// shares whose largest logits are alike, a little apart or so far that one is all of the sum.
TEST_P(CrossEntropyExtremes, TargetsAndLargestLogitsAnywhere) {
  constexpr std::int64_t kWidth = 60004;
  const double targets[] = {0, 15003, 15004, 29999, 45012, kWidth - 1, -1, 30008};
  const double slopes[] = {0, 1e-5, -1e-4, 1e-3, -1e-3, 0.01, 1, -1};
  constexpr std::int64_t kRows = 8;
  HostTensor logits = random_tensor({kRows, kWidth}, DType::kF32, 2), target({kRows}, DType::kI32);
  for (std::size_t c = 0; c < kRows; ++c) {
    target.set(c, targets[c]);
    for (std::size_t v = 0; v < kWidth; ++v) {
      const std::size_t i = c * kWidth + v;
      logits.set(i, logits.get(i) + slopes[c] * static_cast<double>(v));
    }
  }
  const Reference expected = reference_cross_entropy(logits.values(), target.values(), 1.0);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    // 7: an ignored row's is written.
    HostTensor loss = filled({kRows}, DType::kF32, 7), d({kRows, kWidth}, dtype);
    const TensorView d_CV = d;
    ops::cross_entropy(ex, {loss, d_CV, 1.0f}, logits, target);
    expect_close(loss.values(), expected.loss, {2e-7, 1e-6}, "loss");
    const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 250, 1e-7} : Tolerance{3e-6, 1e-7};
    expect_close(d.values(), expected.dlogits, tolerance, "dlogits");
  }
}

// Logits that are no numbers are not passed over, whole parts of a row from its beginning on as little as others: not
// in its loss, nor where one rank's share is theirs.
TEST_P(CrossEntropyExtremes, NoNumbersMakeALossThatIsNone) {
  for (const std::int64_t width : {5000, 60004}) {
    HostTensor logits = random_tensor({1, width}, DType::kF32, 3), loss({1}, DType::kF32);
    const std::int64_t bad = width / 2 / 4 * 4;
    for (std::int64_t v = 0; v < bad; ++v) logits.set(static_cast<std::size_t>(v), NAN);
    const HostTensor targets = filled({1}, DType::kI32, static_cast<double>(width - 1));
    ops::cross_entropy(ex, {loss, {}, 1.0f}, logits, targets);
    EXPECT_TRUE(std::isnan(loss.get(0))) << width << ": " << loss.get(0);
    HostTensor d({1, width}, DType::kF32);
    const TensorView d_CV = d;
    ops::cross_entropy(ex, {loss, d_CV, 1.0f}, logits, targets);
    EXPECT_TRUE(std::isnan(loss.get(0))) << width << " with a gradient: " << loss.get(0);
    HostTensor stats({2, 1, 3}, DType::kF64);
    const TensorView all = stats;
    const auto share = [&](std::int64_t rank, std::int64_t begin, std::int64_t end) {
      HostTensor part({1, end - begin}, DType::kF32);
      for (std::int64_t v = begin; v < end; ++v)
        part.set(static_cast<std::size_t>(v - begin), logits.get(static_cast<std::size_t>(v)));
      ops::cross_entropy_stats(ex, all.rows(rank, rank + 1).reshape({1, 3}), part, targets, {begin, width});
      return part;
    };
    const HostTensor first = share(0, 0, bad), last = share(1, bad, width);
    ops::cross_entropy_sharded(ex, {loss, {}, 1.0f}, last, targets, stats, {bad, width});
    EXPECT_TRUE(std::isnan(loss.get(0))) << width << " of two ranks: " << loss.get(0);
  }
}

// Logits of -inf are chosen by nobody, wherever they lie: in the first pack of a thread, in one that every thread reads
// first, in all that a block of a row's cluster has of it, in a rank's whole share, everywhere but at the target.
class LogitsOfNobody : public testing::TestWithParam<std::tuple<std::int64_t, CrossEntropyPath>> {
 protected:
  static constexpr std::size_t kRows = 7;
  const std::int64_t width = std::get<std::int64_t>(GetParam());
  const std::size_t V = static_cast<std::size_t>(width);
  HostTensor logits{random_tensor({kRows, width}, DType::kF32, 4, 4.0)}, loss{{kRows}, DType::kF32},
      targets{filled({kRows}, DType::kI32, static_cast<double>(width - 1))};
  PathExec ex{std::get<CrossEntropyPath>(GetParam())};

  LogitsOfNobody() {
    remove(0, 0, 4);
    remove(1, 0, std::min<std::size_t>(V, 4096) - 1);
    remove(2, 0, V / 2);
    remove(3, V / 2, V - 1);
    remove(4, 0, V - 1);
    for (std::size_t v = 0; v + 1 < V; v += 3) remove(5, v, v + 1);
    remove(6, 0, V - 1);  // an ignored row
    targets.set(6, -1);
  }
  void remove(std::size_t row, std::size_t begin, std::size_t end) {
    for (std::size_t v = begin; v < end; ++v) logits.set(row * V + v, -INFINITY);
  }
};

TEST_P(LogitsOfNobody, LossAndGradient) {
  const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 0.125);
  ops::cross_entropy(ex, {loss, {}, 0.125f}, logits, targets);
  expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    HostTensor d({kRows, width}, dtype);
    const TensorView d_CV = d;
    ops::cross_entropy(ex, {loss, d_CV, 0.125f}, logits, targets);
    expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
    const Tolerance tolerance = dtype == DType::kBF16 ? Tolerance{1.0 / 250, 1e-7} : Tolerance{3e-6, 1e-7};
    expect_close(d.values(), expected.dlogits, tolerance, "dlogits");
    for (std::size_t row = 0; row < kRows; ++row)
      for (std::size_t v = 0; v < V; ++v)
        ASSERT_TRUE(!std::isinf(logits.get(row * V + v)) || d.get(row * V + v) == 0) << row << ", " << v;
  }
}

TEST_P(LogitsOfNobody, DividedVocabulary) {
  const Reference expected = reference_cross_entropy(logits.values(), targets.values(), 0.125);
  const std::int64_t ends[] = {0, width / 2, width};
  HostTensor stats({2, kRows, 3}, DType::kF64);
  const TensorView all = stats;
  std::vector<HostTensor> parts;
  for (std::int64_t r = 0; r < 2; ++r) {
    parts.emplace_back(Shape{kRows, ends[r + 1] - ends[r]}, DType::kF32);
    std::size_t at = 0;
    for (std::size_t row = 0; row < kRows; ++row)
      for (std::int64_t v = ends[r]; v < ends[r + 1]; ++v)
        parts.back().set(at++, logits.get(row * V + static_cast<std::size_t>(v)));
    ops::cross_entropy_stats(ex, all.rows(r, r + 1).reshape({kRows, 3}), parts.back(), targets,
                             {ends[r], width});
  }
  for (std::size_t r = 0; r < 2; ++r) {
    HostTensor d(ConstTensorView(parts[r]).shape, DType::kF32);
    const TensorView d_CV = d;
    ops::cross_entropy_sharded(ex, {loss, d_CV, 0.125f}, parts[r], targets, stats, {ends[r], width});
    expect_close(loss.values(), expected.loss, {2e-7, 2e-7}, "loss");
    Values columns;
    for (std::size_t row = 0; row < kRows; ++row)
      for (std::int64_t v = ends[r]; v < ends[r + 1]; ++v)
        columns.push_back(expected.dlogits[row * V + static_cast<std::size_t>(v)]);
    expect_close(d.values(), columns, {3e-6, 1e-7}, "dlogits of a shard");
  }
}

// Packs of one and of four; a block, two, and eight with less than a turn of all threads for the last.
INSTANTIATE_TEST_SUITE_P(Widths, LogitsOfNobody,
                         testing::Combine(testing::Values(9, 5000, 5001, 60004, 250000), kPaths),
                         [](const auto& i) {
                           return std::to_string(std::get<0>(i.param)) + "_" +
                                  name_of_path(std::get<1>(i.param));
                         });

TEST_P(CrossEntropyExtremes, ManyEqualTerms) {  // a running fp32 sum of 151936 terms would be off by 1e-4
  const HostTensor logits = filled({1, 151936}, DType::kF32, 2.5), targets = filled({1}, DType::kI32, 151935);
  HostTensor loss({1}, DType::kF32);
  ops::cross_entropy(ex, {loss, {}, 1.0f}, logits, targets);
  EXPECT_NEAR(loss.get(0), std::log(151936.0), 1e-6);
}

TEST(CrossEntropyChecks, TargetOutsideTheVocabulary) {
  OpExec ex;
  const HostTensor logits = filled({3, 8}, DType::kF32, 0);
  HostTensor loss({3}, DType::kF32);
  for (double bad : {8.0, -2.0}) {
    try {
      ops::cross_entropy(ex, {loss, {}, 1.0f}, logits, tensor_of({3}, DType::kI32, {1, bad, 0}));
      finish_ops();
      ADD_FAILURE() << bad << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("position 1"), std::string::npos) << e.what();
    }
  }
}

TEST(CrossEntropyChecks, RefusesWrongTensors) {
  OpExec ex;
  HostTensor logits = filled({3, 8}, DType::kF32, 0), targets = filled({3}, DType::kI32, 0),
             loss({3}, DType::kF32);
  EXPECT_THROW(ops::cross_entropy(ex, {loss, {}, 1.0f}, filled({3, 8}, DType::kBF16, 0), targets), Error);
  EXPECT_THROW(ops::cross_entropy(ex, {loss, {}, 1.0f}, logits, filled({2}, DType::kI32, 0)), Error);
  TensorView halved = logits;  // bf16 in the place of fp32 logits would overwrite rows not yet read
  halved.dtype = DType::kBF16;
  EXPECT_THROW(ops::cross_entropy(ex, {loss, halved, 1.0f}, logits, targets), Error);
}

TEST(CrossEntropyThreads, SameBits) {
  expect_same_for_any_threads([&] {
    OpExec ex;
    const HostTensor logits = random_tensor({37, 1500}, DType::kF32, 5), targets = targets_for(37, 1500);
    HostTensor loss({37}, DType::kF32), d({37, 1500}, DType::kBF16);
    const TensorView d_CV = d;
    ops::cross_entropy(ex, {loss, d_CV, 0.3f}, logits, targets);
    return std::tuple(loss, d);
  });
}

TEST(CrossEntropyDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const TensorView d = dry_tensor({4, 10}, DType::kBF16);
  ops::cross_entropy(ex, {dry_tensor({4}, DType::kF32), d, 1.0f}, dry_tensor({4, 10}, DType::kF32),
                     dry_tensor({4}, DType::kI32));
  expect_booked(ex.ledger(), "cross_entropy", 6 * 40, 160 + 16, 16 + 80);
}

}  // namespace
}  // namespace upmoe::test
