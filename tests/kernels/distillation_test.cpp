// Losses beside a teacher: the values and gradients of kernels/ops/distillation.h, from the formulas in double, whole
// and with the vocabulary divided between ranks.

#include "kernels/ops/distillation.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/op_exec.h"
#include "tests/support/random_tensor.h"
#include "tests/support/reference_loss.h"
#include "tests/support/reference_model.h"
#include "tests/support/tolerance.h"

namespace upmoe::test {
namespace {

// may_err: how far a gradient in fp32 may be from dlogits.
struct TaughtReference {
  Values loss, divergence, dlogits, may_err;
};

// Of a softmax's element p, in a row whose largest is `most`. u is fp32's unit of rounding. The argument of its
// exponential, a = log(p / most), was rounded three times (a difference, 1 / tau, their product), which is 3 |a| u, and
// a GPU's fast exponential errs by 2.4 |a| u more. What it is divided by errs by 149 u at most where a GPU's thread
// adds so many of 151,936 terms in fp32 (a lane of a CPU: 64), and by 3 u times the mean of |a|, which is below 8 here.
// All else, exponentials at a = 0, factors, products and what is added up of them, is less than 27 roundings.
double error_of(double p, double most) {
  return p > 0 ? p * (200 + 6 * std::log(most / p)) * kUnit : 0;
}

// The loss of a row without its scale: what the gradient is the gradient of.
double reference_of_row(const Values& student, const Values& teacher, std::size_t target,
                        const Distillation& rule) {
  const std::size_t vocab = student.size();
  Values warm_student = student, warm_teacher = teacher;
  for (double& x : warm_student) x /= rule.temperature;
  for (double& x : warm_teacher) x /= rule.temperature;
  const double p = reference_lse(warm_student.data(), vocab), q = reference_lse(warm_teacher.data(), vocab);
  double divergence = 0;
  for (std::size_t v = 0; v < vocab; ++v)
    divergence += std::exp(warm_teacher[v] - q) * ((warm_teacher[v] - q) - (warm_student[v] - p));
  const double loss = reference_lse(student.data(), vocab) - student[target];
  return (1 - rule.weight) * loss + rule.weight * rule.temperature * rule.temperature * divergence;
}

TaughtReference reference(const Values& logits, const Values& teacher, const Values& targets,
                          const Distillation& rule, double scale) {
  const std::size_t rows = targets.size(), vocab = rows == 0 ? 1 : logits.size() / rows;
  const auto warm = [&](Values x) {
    for (double& v : x) v /= rule.temperature;
    return reference_softmax(x, vocab);
  };
  const Values plain = reference_softmax(logits, vocab), student = warm(logits), soft = warm(teacher);
  TaughtReference r{Values(rows), Values(rows), Values(logits.size()), Values(logits.size())};
  for (std::size_t c = 0; c < rows; ++c) {
    if (targets[c] < 0) continue;
    const auto target = static_cast<std::size_t>(targets[c]);
    const auto row = [&](const Values& x) {
      const auto first = x.begin() + static_cast<std::ptrdiff_t>(c * vocab);
      return Values(first, first + static_cast<std::ptrdiff_t>(vocab));
    };
    Distillation all = rule, none = rule;
    all.weight = 1;
    none.weight = 0;
    r.loss[c] = reference_of_row(row(logits), row(teacher), target, none);
    r.divergence[c] = reference_of_row(row(logits), row(teacher), target, all);
    const auto most = [&](const Values& p) {
      const Values of_row = row(p);
      return *std::max_element(of_row.begin(), of_row.end());
    };
    const double most_plain = most(plain), most_student = most(student), most_soft = most(soft);
    for (std::size_t v = 0; v < vocab; ++v) {
      const std::size_t i = c * vocab + v;
      r.dlogits[i] = scale * ((1 - rule.weight) * (plain[i] - (v == target ? 1 : 0)) +
                              rule.weight * rule.temperature * (student[i] - soft[i]));
      r.may_err[i] =
          scale * ((1 - rule.weight) * (error_of(plain[i], most_plain) + (v == target ? 4 * kUnit : 0)) +
                   rule.weight * rule.temperature *
                       (error_of(student[i], most_student) + error_of(soft[i], most_soft)));
    }
  }
  return r;
}

// A gradient, and its rounding to `dtype`.
void expect_within(const Values& actual, const Values& expected, const Values& may_err, DType dtype,
                   const std::string& name) {
  ASSERT_EQ(actual.size(), expected.size()) << name;
  const double rounding = dtype == DType::kBF16 ? kBF16Unit : 0;
  for (std::size_t i = 0; i < actual.size(); ++i)
    ASSERT_LE(std::abs(actual[i] - expected[i]),
              may_err[i] + rounding * (std::abs(expected[i]) + may_err[i]) + 1e-30)
        << name << "[" << i << "] is " << actual[i] << ", expected " << expected[i];
}

// Every rank's logits of both models, and the stats of all of them.
struct Shards {
  std::vector<HostTensor> logits, teacher;
  std::vector<VocabShard> places;
  HostTensor stats;

  Shards(Exec& ex, const HostTensor& whole, const HostTensor& taught, const HostTensor& targets,
         std::int64_t ranks, double temperature)
      : stats({ranks, ConstTensorView(targets).rows(), kDistillationStats}, DType::kF64) {
    const std::int64_t C = ConstTensorView(targets).rows(), V = ConstTensorView(whole).shape[1];
    for (std::int64_t r = 0; r < ranks; ++r) {
      const std::int64_t begin = V * r / ranks, end = V * (r + 1) / ranks;
      places.push_back({begin, V});
      logits.push_back(columns(whole, begin, end));
      teacher.push_back(columns(taught, begin, end));
      const TensorView all = stats;
      ops::distillation_stats(ex, all.rows(r, r + 1).reshape({C, kDistillationStats}),
                              {logits.back(), teacher.back(), targets, places.back()}, temperature);
    }
  }
  static HostTensor columns(const HostTensor& whole, std::int64_t begin, std::int64_t end) {
    const std::int64_t C = ConstTensorView(whole).shape[0], V = ConstTensorView(whole).shape[1];
    HostTensor part({C, end - begin}, DType::kF32);
    for (std::int64_t c = 0; c < C; ++c)
      for (std::int64_t v = begin; v < end; ++v)
        part.set(static_cast<std::size_t>(c * (end - begin) + v - begin),
                 whole.get(static_cast<std::size_t>(c * V + v)));
    return part;
  }
  DistilledRows rows(std::size_t rank, const HostTensor& targets) const {
    return {logits[rank], teacher[rank], targets, places[rank]};
  }
};

constexpr Distillation kRules[] = {{0.3, 1}, {0.5, 2}, {1, 0.5}, {0.7, 8}};
// Sums in fp32, whose roundings are of either sign, err by a few units; a divergence by tau^2 (64) of that where it is
// about 12: by 1.4e-6 of it at the most in 20 draws of each shape, beside double.
constexpr Tolerance kLoss{1e-6, 1e-6};

class DistillationOp : public testing::TestWithParam<std::pair<std::int64_t, std::int64_t>> {
 protected:
  const std::int64_t C = GetParam().first, V = GetParam().second;
  HostTensor logits{random_tensor({C, V}, DType::kF32, 1, 4.0)},
      teacher{random_tensor({C, V}, DType::kF32, 2, 3.0)}, targets{targets_for(C, V)}, loss{{C}, DType::kF32},
      divergence{{C}, DType::kF32};
  OpExec ex;
};

TEST_P(DistillationOp, LossesAndGradient) {
  for (const Distillation& rule : kRules) {
    const TaughtReference expected =
        reference(logits.values(), teacher.values(), targets.values(), rule, 0.125);
    Shards whole(ex, logits, teacher, targets, 1, rule.temperature);
    const auto check = [&](const HostTensor& d, DType dtype, const std::string& what) {
      expect_close(loss.values(), expected.loss, kLoss, "loss");
      expect_close(divergence.values(), expected.divergence, kLoss, "divergence");
      expect_within(d.values(), expected.dlogits, expected.may_err, dtype, what);
    };
    ops::distillation_losses(ex, {loss, divergence, {}, 0.125f}, whole.rows(0, targets), whole.stats, rule);
    expect_close(loss.values(), expected.loss, kLoss, "loss alone");
    expect_close(divergence.values(), expected.divergence, kLoss, "divergence alone");
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      HostTensor d = filled({C, V}, dtype, 7);
      const TensorView d_CV = d;
      ops::distillation_losses(ex, {loss, divergence, d_CV, 0.125f}, whole.rows(0, targets), whole.stats,
                               rule);
      check(d, dtype, "dlogits");
    }
    const TensorView in_place = whole.logits[0];
    ops::distillation_losses(ex, {loss, divergence, in_place, 0.125f}, whole.rows(0, targets), whole.stats,
                             rule);
    check(whole.logits[0], DType::kF32, "dlogits in place of the logits");
  }
}

// The vocabulary divided between ranks gives every rank the losses of the whole, and its columns of the gradient.
TEST_P(DistillationOp, DividedVocabulary) {
  for (const std::int64_t ranks : {2, 3, 7}) {
    if (ranks > V) continue;
    const Distillation rule{0.6, 1.5};
    const TaughtReference expected =
        reference(logits.values(), teacher.values(), targets.values(), rule, 0.125);
    const Shards shards(ex, logits, teacher, targets, ranks, rule.temperature);
    std::vector<double> first;
    for (std::size_t r = 0; r < shards.logits.size(); ++r) {
      const std::int64_t width = ConstTensorView(shards.logits[r]).shape[1];
      HostTensor d({C, width}, DType::kF32);
      const TensorView d_CV = d;
      ops::distillation_losses(ex, {loss, divergence, d_CV, 0.125f}, shards.rows(r, targets), shards.stats,
                               rule);
      expect_close(loss.values(), expected.loss, kLoss, "loss");
      expect_close(divergence.values(), expected.divergence, kLoss, "divergence");
      if (r == 0) first = divergence.values();
      EXPECT_EQ(divergence.values(), first) << "ranks differ";
      Values columns, may_err;
      for (std::int64_t c = 0; c < C; ++c)
        for (std::int64_t v = 0; v < width; ++v) {
          const auto i = static_cast<std::size_t>(c * V + shards.places[r].begin + v);
          columns.push_back(expected.dlogits[i]);
          may_err.push_back(expected.may_err[i]);
        }
      expect_within(d.values(), columns, may_err, DType::kF32, "dlogits of a shard");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, DistillationOp,
                         testing::Values(std::pair{1, 1}, std::pair{5, 13}, std::pair{9, 1000},
                                         std::pair{2, 4103}, std::pair{2, 151936}, std::pair{0, 16}),
                         [](const auto& i) {
                           return std::to_string(i.param.first) + "x" + std::to_string(i.param.second);
                         });

// The closed form of the gradient, which the others are held against, is the slope of the loss.
TEST(DistillationReference, GradientIsTheSlope) {
  const Values student = random_tensor({1, 11}, DType::kF32, 3, 2.0).values(),
               teacher = random_tensor({1, 11}, DType::kF32, 4, 2.0).values();
  for (const Distillation& rule : kRules) {
    const Values slope =
        numeric_gradient([&](const Values& x) { return reference_of_row(x, teacher, 6, rule); }, student);
    expect_close(reference(student, teacher, {6}, rule, 1).dlogits, slope, {1e-6, 1e-6}, "slope");
  }
}

// Nothing to learn from a teacher that says what the student says.
TEST(DistillationExtremes, AStudentThatIsItsTeacher) {
  OpExec ex;
  const HostTensor logits = random_tensor({3, 1500}, DType::kF32, 5, 4.0), targets = targets_for(3, 1500);
  HostTensor loss({3}, DType::kF32), divergence({3}, DType::kF32);
  for (const double temperature : {1.0, 3.0})
    for (const std::int64_t ranks : {1, 3}) {
      const Shards shards(ex, logits, logits, targets, ranks, temperature);
      for (std::size_t r = 0; r < shards.logits.size(); ++r) {
        HostTensor part({3, ConstTensorView(shards.logits[r]).shape[1]}, DType::kF32);
        const TensorView part_CV = part;
        ops::distillation_losses(ex, {loss, divergence, part_CV, 1.0f}, shards.rows(r, targets), shards.stats,
                                 {1, temperature});
        EXPECT_EQ(divergence.values(), Values(3, 0.0));
        for (const double g : part.values()) EXPECT_NEAR(g, 0.0, 1e-7 * temperature);
      }
    }
}

TEST(DistillationExtremes, LargeLogits) {
  OpExec ex;
  const HostTensor logits = tensor_of({2, 4}, DType::kF32, {1e4, 1e4, -1e4, 0, 9999, 1e4, 0, 0}),
                   teacher = tensor_of({2, 4}, DType::kF32, {-1e4, 0, -1e4, -3, 5e3, 4999, 5e3, -5e3}),
                   targets = tensor_of({2}, DType::kI32, {1, 0});
  const Distillation rule{0.5, 2};
  HostTensor loss({2}, DType::kF32), divergence({2}, DType::kF32), d({2, 4}, DType::kF32);
  const TensorView d_CV = d;
  const Shards whole(ex, logits, teacher, targets, 1, rule.temperature);
  ops::distillation_losses(ex, {loss, divergence, d_CV, 1.0f}, whole.rows(0, targets), whole.stats, rule);
  const TaughtReference expected = reference(logits.values(), teacher.values(), targets.values(), rule, 1);
  expect_close(loss.values(), expected.loss, {1e-6, 0}, "loss");
  expect_close(divergence.values(), expected.divergence, {1e-6, 1e-6}, "divergence");
  expect_within(d.values(), expected.dlogits, expected.may_err, DType::kF32, "dlogits");
}

TEST(DistillationChecks, TargetOutsideTheVocabulary) {
  OpExec ex;
  const HostTensor logits = filled({3, 8}, DType::kF32, 0);
  HostTensor stats({3, kDistillationStats}, DType::kF64);
  for (const double bad : {8.0, -2.0}) {
    const HostTensor targets = tensor_of({3}, DType::kI32, {1, bad, 0});
    try {
      ops::distillation_stats(ex, stats, {logits, logits, targets, {0, 8}}, 1);
      finish_ops();
      ADD_FAILURE() << bad << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find("position 1"), std::string::npos) << e.what();
    }
  }
}

TEST(DistillationChecks, RefusesWrongTensors) {
  OpExec ex;
  const HostTensor logits = filled({3, 8}, DType::kF32, 0), targets = filled({3}, DType::kI32, 0);
  HostTensor stats({3, kDistillationStats}, DType::kF64);
  EXPECT_THROW(
      ops::distillation_stats(ex, stats, {logits, filled({3, 9}, DType::kF32, 0), targets, {0, 8}}, 1), Error)
      << "another vocabulary";
  EXPECT_THROW(ops::distillation_stats(ex, stats, {logits, logits, targets, {1, 8}}, 1), Error);
  EXPECT_THROW(ops::distillation_stats(ex, stats, {logits, logits, targets, {0, 8}}, 0), Error);
  const TensorView stats_1C7 = stats.view().reshape({1, 3, kDistillationStats});
  HostTensor loss({3}, DType::kF32), divergence({3}, DType::kF32), again = logits;
  TensorView halved = again;  // bf16 in the place of fp32 logits would overwrite rows not yet read
  halved.dtype = DType::kBF16;
  EXPECT_THROW(ops::distillation_losses(ex, {loss, divergence, halved, 1.0f},
                                        {again, logits, targets, {0, 8}}, stats_1C7, {0.5, 1}),
               Error);
}

TEST(DistillationThreads, SameBits) {
  expect_same_for_any_threads([&] {
    OpExec ex;
    const HostTensor logits = random_tensor({37, 1500}, DType::kF32, 5),
                     teacher = random_tensor({37, 1500}, DType::kF32, 6), targets = targets_for(37, 1500);
    HostTensor loss({37}, DType::kF32), divergence({37}, DType::kF32), d({37, 1500}, DType::kBF16);
    const TensorView d_CV = d;
    const Shards whole(ex, logits, teacher, targets, 1, 2);
    ops::distillation_losses(ex, {loss, divergence, d_CV, 0.3f}, whole.rows(0, targets), whole.stats,
                             {0.5, 2});
    return std::tuple(loss, divergence, d, whole.stats);
  });
}

TEST(DistillationDry, BooksOnly) {
  OpExec ex(DeviceType::kDry);
  const DistilledRows rows{dry_tensor({4, 10}, DType::kF32),
                           dry_tensor({4, 10}, DType::kF32),
                           dry_tensor({4}, DType::kI32),
                           {0, 10}};
  ops::distillation_stats(ex, dry_tensor({4, kDistillationStats}, DType::kF64), rows, 2);
  expect_booked(ex.ledger(), "distillation_stats", 12 * 40, 320 + 16, 4 * 7 * 8);
  ops::distillation_losses(
      ex, {dry_tensor({4}, DType::kF32), dry_tensor({4}, DType::kF32), dry_tensor({4, 10}, DType::kBF16), 1},
      rows, dry_tensor({1, 4, kDistillationStats}, DType::kF64), {0.5, 2});
  expect_booked(ex.ledger(), "distillation_losses", 12 * 40, 320 + 16 + 4 * 7 * 8, 32 + 80);
}

}  // namespace
}  // namespace upmoe::test
