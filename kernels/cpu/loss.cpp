#include "kernels/ops/loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/loss_rows.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/ops/backend.h"

namespace upmoe::cpu {

namespace {

// Of one block.
double sum_exp(const float* x, std::int64_t n, float offset) {
  const std::int64_t whole = n / kLanes * kLanes;
  double sum =
      sum_lanes(whole, [&](std::int64_t i, auto lanes) { return vector_exp(load(x + i, lanes) - offset); });
  // Lanes past the end hold zeros, and e^0 must not be counted: the rest in one vector, filled up with -inf.
  if (whole < n) {
    float rest[kLanes];
    std::fill_n(rest, kLanes, -std::numeric_limits<float>::infinity());
    std::copy_n(x + whole, n - whole, rest);
    sum += reduce_add(vector_exp(load(rest) - offset));
  }
  return sum;
}

struct RowSum {
  float largest = -std::numeric_limits<float>::infinity();
  double sum = 0;  // of exp(x - largest)
};

// A row comes from memory once: the largest of a block and the block's sum are taken while it lies in the cache, and
// what was summed before is scaled when the largest grows.
RowSum row_sum(const float* x, std::int64_t n) {
  RowSum row;
  for (std::int64_t begin = 0; begin < n; begin += kSumBlock) {
    const std::int64_t count = std::min(kSumBlock, n - begin);
    const float most = row_max(x + begin, count);
    if (most > row.largest) {
      row.sum *= std::exp(static_cast<double>(row.largest) - static_cast<double>(most));
      row.largest = most;
    }
    // Nothing but -inf so far adds nothing; exp(-inf - -inf) would be no number. A block of NaNs has no largest either,
    // and makes the sum one.
    const bool none = row.largest == -std::numeric_limits<float>::infinity();
    row.sum += sum_exp(x + begin, count, none ? 0.0f : row.largest);
  }
  return row;
}

// The gradient is taken from x - max and 1 / sum, not from x - lse: for logits of 1e4 the rounding of an fp32
// lse alone would be a relative error of 5e-4.
// `target` is a column of this shard, or outside [0, n) when another shard holds it.
template <class T>
void gradient_row(T* dx, const float* x, std::int64_t n, float max_x, double sum, std::int64_t target,
                  float scale) {
  // dx = scale (softmax(x) - [the target]); the target's element comes last, over what the loop wrote there.
  const float factor = static_cast<float>(scale / sum);
  const bool here = 0 <= target && target < n;
  const float p_target = here ? std::exp(x[target] - max_x) / static_cast<float>(sum) : 0.0f;
  for_lanes(n, [&](std::int64_t i, auto lanes) {
    store(dx + i, vector_exp(load(x + i, lanes) - max_x) * factor, lanes);
  });
  if (here) dx[target] = from_float<T>(scale * (p_target - 1.0f));
}

template <class T>
void loss_rows(float* loss, T* dlogits, const float* logits, const std::int32_t* targets, std::int64_t rows,
               std::int64_t vocab, float scale) {
  parallel_for(rows, 4 * vocab, [&](std::int64_t c) {
    const float* x = logits + c * vocab;
    const std::int32_t target = targets[c];
    if (target == -1) {
      loss[c] = 0;
      if (dlogits != nullptr) std::fill_n(dlogits + c * vocab, vocab, T{});
      return;
    }
    const RowSum row = row_sum(x, vocab);
    loss[c] = static_cast<float>(std::log(row.sum) +
                                 (static_cast<double>(row.largest) - static_cast<double>(x[target])));
    if (dlogits != nullptr) gradient_row(dlogits + c * vocab, x, vocab, row.largest, row.sum, target, scale);
  });
}

// What one shard knows of a row.
struct RowStats {
  double largest, sum, target;
};

RowStats merge(const double* stats, std::int64_t shards, std::int64_t stride) {
  RowStats all{-std::numeric_limits<double>::infinity(), 0, 0};
  for (std::int64_t p = 0; p < shards; ++p) all.largest = std::max(all.largest, stats[p * stride]);
  for (std::int64_t p = 0; p < shards; ++p) {
    // A shard's sum is relative to its own largest logit. The target's logit is in one shard, and 0 in the others.
    all.sum += stats[p * stride + 1] * std::exp(stats[p * stride] - all.largest);
    all.target += stats[p * stride + 2];
  }
  return all;
}

template <class T>
void sharded_rows(float* loss, T* dlogits, const float* logits, const std::int32_t* targets,
                  const double* stats, const Shape& stats_shape, std::int64_t columns, float scale,
                  std::int64_t begin) {
  const std::int64_t rows = stats_shape[1];
  parallel_for(rows, 4 * columns, [&](std::int64_t c) {
    if (targets[c] == -1) {
      loss[c] = 0;
      if (dlogits != nullptr) std::fill_n(dlogits + c * columns, columns, T{});
      return;
    }
    const RowStats all = merge(stats + 3 * c, stats_shape[0], 3 * rows);
    loss[c] = static_cast<float>(std::log(all.sum) + (all.largest - all.target));
    if (dlogits != nullptr)
      gradient_row(dlogits + c * columns, logits + c * columns, columns, static_cast<float>(all.largest),
                   all.sum, targets[c] - begin, scale);
  });
}

}  // namespace

void cross_entropy_stats(Exec&, TensorView stats_C3, ConstTensorView logits_CV, ConstTensorView targets_C,
                         VocabShard shard) {
  const std::int64_t rows = logits_CV.shape[0], columns = logits_CV.shape[1];
  const auto* targets = targets_C.as<std::int32_t>();
  check_targets(targets, rows, shard.total);
  parallel_for(rows, 4 * columns, [&](std::int64_t c) {
    const float* x = logits_CV.as<float>() + c * columns;
    const RowSum row = row_sum(x, columns);
    const std::int64_t target = targets[c] - shard.begin;
    double* stats = stats_C3.as<double>() + 3 * c;
    stats[0] = static_cast<double>(row.largest);
    stats[1] = row.sum;
    stats[2] = targets[c] >= 0 && 0 <= target && target < columns ? static_cast<double>(x[target]) : 0.0;
  });
}

void cross_entropy_sharded(Exec&, const TokenLosses& out, ConstTensorView logits_CV,
                           ConstTensorView targets_C, ConstTensorView stats_PC3, VocabShard shard) {
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    sharded_rows(out.loss_C.as<float>(), dlogits, logits_CV.as<float>(), targets_C.as<std::int32_t>(),
                 stats_PC3.as<double>(), stats_PC3.shape, logits_CV.shape[1], out.scale, shard.begin);
  });
}

void cross_entropy(Exec&, const TokenLosses& out, ConstTensorView logits_CV, ConstTensorView targets_C) {
  const std::int64_t rows = logits_CV.shape[0], vocab = logits_CV.shape[1];
  const auto* targets = targets_C.as<std::int32_t>();
  check_targets(targets, rows, vocab);
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    loss_rows(out.loss_C.as<float>(), dlogits, logits_CV.as<float>(), targets, rows, vocab, out.scale);
  });
}

}  // namespace upmoe::cpu
