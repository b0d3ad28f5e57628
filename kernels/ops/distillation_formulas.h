#pragma once
// What a token's losses are made of, the same text for every device.

#include <cmath>

#include "kernels/core/everywhere.h"
#include "kernels/ops/distillation.h"

namespace upmoe {

// Of a whole row: kDistillationStats, with the largest logits of all shards.
struct DistillationRow {
  double student_max = 0, student_sum = 0, target = 0, student_warm = 0;
  double teacher_max = 0, teacher_warm = 0, difference = 0;
};

// `stats`: of the first shard; the next one's lie `stride` numbers on. A shard's sums are relative to its own largest
// logits, and so are its differences: those of the whole row differ by the shifts of both.
UPMOE_EVERYWHERE inline DistillationRow join_shards(const double* stats, std::int64_t shards,
                                                    std::int64_t stride, double temperature) {
  DistillationRow row;
  row.student_max = stats[0];
  row.teacher_max = stats[4];
  for (std::int64_t p = 1; p < shards; ++p) {
    row.student_max = std::fmax(row.student_max, stats[p * stride]);
    row.teacher_max = std::fmax(row.teacher_max, stats[p * stride + 4]);
  }
  for (std::int64_t p = 0; p < shards; ++p) {
    const double* s = stats + p * stride;
    const double student = s[0] - row.student_max, teacher = s[4] - row.teacher_max;
    const double scale = std::exp(teacher / temperature);
    row.student_sum += s[1] * std::exp(student);
    row.target += s[2];
    row.student_warm += s[3] * std::exp(student / temperature);
    row.teacher_warm += s[5] * scale;
    row.difference += scale * (s[6] + s[5] * (teacher - student) / temperature);
  }
  return row;
}

UPMOE_EVERYWHERE inline float cross_entropy_of(const DistillationRow& row) {
  return static_cast<float>(std::log(row.student_sum) + (row.student_max - row.target));
}

// tau^2 KL: the mean under q of log q - log p, each logit taken from its row's largest one.
UPMOE_EVERYWHERE inline float divergence_of(const DistillationRow& row, double temperature) {
  const double divergence =
      row.difference / row.teacher_warm - std::log(row.teacher_warm) + std::log(row.student_warm);
  return static_cast<float>(temperature * temperature * divergence);
}

// What the three softmaxes' exponentials are multiplied by in the gradient.
struct DistillationFactors {
  float plain, student, teacher;
};
UPMOE_EVERYWHERE inline DistillationFactors factors_of(const DistillationRow& row, const Distillation& rule,
                                                       float scale) {
  const double plain = scale * (1 - rule.weight), warm = scale * rule.weight * rule.temperature;
  return {static_cast<float>(plain / row.student_sum), static_cast<float>(warm / row.student_warm),
          static_cast<float>(warm / row.teacher_warm)};
}

}  // namespace upmoe
