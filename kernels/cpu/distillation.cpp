#include "kernels/ops/distillation.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/loss_rows.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/distillation_formulas.h"

namespace upmoe::cpu {

namespace {

// Where a vector goes beyond a row there is nothing of either softmax, at a distance that is still a number: the
// difference of two -inf would be none.
constexpr float kFar = -1e30f;

struct Largest {
  float student, teacher;
};

struct RowSums {
  double plain = 0, student = 0, teacher = 0, difference = 0;

  // Of n columns from z and t on, at most kSumBlock.
  void add_block(const float* z, const float* t, std::int64_t n, const Largest& largest, float inverse) {
    f32x16 plain_l{}, student_l{}, teacher_l{}, difference_l{};
    const auto add = [&](f32x16 student_logits, f32x16 teacher_logits) {
      const f32x16 dz = student_logits - largest.student, dt = teacher_logits - largest.teacher;
      const f32x16 q = vector_exp(dt * inverse);
      plain_l += vector_exp(dz);
      student_l += vector_exp(dz * inverse);
      teacher_l += q;
      difference_l += q * (dt - dz);
    };
    const std::int64_t whole = n / kLanes * kLanes;
    for (std::int64_t i = 0; i < whole; i += kLanes) add(load(z + i), load(t + i));
    if (whole < n) {
      float z_rest[kLanes], t_rest[kLanes];
      std::fill_n(z_rest, kLanes, kFar);
      std::fill_n(t_rest, kLanes, kFar);
      std::copy_n(z + whole, n - whole, z_rest);
      std::copy_n(t + whole, n - whole, t_rest);
      add(load(z_rest), load(t_rest));
    }
    plain += static_cast<double>(reduce_add(plain_l));
    student += static_cast<double>(reduce_add(student_l));
    teacher += static_cast<double>(reduce_add(teacher_l));
    difference += static_cast<double>(reduce_add(difference_l)) * static_cast<double>(inverse);
  }
};

// dz may be z. `target` is a column of this shard, or outside [0, n) when another shard holds it.
template <class T>
void gradient_row(T* dz, const float* z, const float* t, std::int64_t n, std::int64_t target,
                  const Largest& largest, const DistillationFactors& f, float inverse, float plain) {
  const bool here = 0 <= target && target < n;
  float at_target = 0;
  if (here) {
    const float student = z[target] - largest.student, teacher = t[target] - largest.teacher;
    at_target = std::exp(student) * f.plain - plain +
                (std::exp(student * inverse) * f.student - std::exp(teacher * inverse) * f.teacher);
  }
  for_lanes(n, [&](std::int64_t i, auto lanes) {
    const f32x16 student = load(z + i, lanes) - largest.student,
                 teacher = load(t + i, lanes) - largest.teacher;
    const f32x16 warm = vector_exp(student * inverse) * f.student - vector_exp(teacher * inverse) * f.teacher;
    store(dz + i, vector_exp(student) * f.plain + warm, lanes);
  });
  if (here) dz[target] = from_float<T>(at_target);
}

}  // namespace

void distillation_stats(Exec&, TensorView stats_C7, const DistilledRows& rows, double temperature) {
  const std::int64_t C = rows.logits_CV.shape[0], columns = rows.logits_CV.shape[1];
  const auto* targets = rows.targets_C.as<std::int32_t>();
  check_targets(targets, C, rows.shard.total);
  const float inverse = static_cast<float>(1 / temperature);
  parallel_for(C, 8 * columns, [&](std::int64_t c) {
    const float *z = rows.logits_CV.as<float>() + c * columns, *t = rows.teacher_CV.as<float>() + c * columns;
    const Largest largest{row_max(z, columns), row_max(t, columns)};
    RowSums sums;
    for (std::int64_t begin = 0; begin < columns; begin += kSumBlock)
      sums.add_block(z + begin, t + begin, std::min(kSumBlock, columns - begin), largest, inverse);
    const std::int64_t target = targets[c] - rows.shard.begin;
    const bool here = targets[c] >= 0 && 0 <= target && target < columns;
    double* stats = stats_C7.as<double>() + kDistillationStats * c;
    stats[0] = static_cast<double>(largest.student);
    stats[1] = sums.plain;
    stats[2] = here ? static_cast<double>(z[target]) : 0.0;
    stats[3] = sums.student;
    stats[4] = static_cast<double>(largest.teacher);
    stats[5] = sums.teacher;
    stats[6] = sums.difference;
  });
}

void distillation_losses(Exec&, const DistilledLosses& out, const DistilledRows& rows,
                         ConstTensorView stats_PC7, const Distillation& rule) {
  const std::int64_t C = rows.logits_CV.shape[0], columns = rows.logits_CV.shape[1];
  const auto* targets = rows.targets_C.as<std::int32_t>();
  const float inverse = static_cast<float>(1 / rule.temperature);
  const float plain = static_cast<float>(static_cast<double>(out.scale) * (1 - rule.weight));
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    parallel_for(C, 8 * columns, [&](std::int64_t c) {
      float &loss = out.loss_C.as<float>()[c], &divergence = out.divergence_C.as<float>()[c];
      T* dz = dlogits == nullptr ? nullptr : dlogits + c * columns;
      if (targets[c] < 0) {
        loss = divergence = 0;
        if (dz != nullptr) std::fill_n(dz, columns, T{});
        return;
      }
      const DistillationRow row = join_shards(stats_PC7.as<double>() + kDistillationStats * c,
                                              stats_PC7.shape[0], kDistillationStats * C, rule.temperature);
      loss = cross_entropy_of(row);
      divergence = divergence_of(row, rule.temperature);
      if (dz == nullptr) return;
      gradient_row(dz, rows.logits_CV.as<float>() + c * columns, rows.teacher_CV.as<float>() + c * columns,
                   columns, targets[c] - rows.shard.begin,
                   {static_cast<float>(row.student_max), static_cast<float>(row.teacher_max)},
                   factors_of(row, rule, out.scale), inverse, plain);
    });
  });
}

}  // namespace upmoe::cpu
