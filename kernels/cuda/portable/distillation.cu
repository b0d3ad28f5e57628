#include "kernels/ops/distillation.h"

#include "kernels/cuda/portable/loss_rows.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/distillation_formulas.h"

namespace upmoe::cuda {

namespace {

// Of one shard; targets are of the whole vocabulary, of which the shard begins at `begin`.
struct TaughtRows {
  const float *student, *teacher;
  const std::int32_t* targets;
  std::int64_t columns, begin, vocab;
};

struct Largest {
  float student, teacher;
};

template <int N>
__device__ inline Largest largest_of(const float* z, const float* t, std::int64_t n, float* memory) {
  float student = -INFINITY, teacher = -INFINITY;
  for (std::int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    float zs[N], ts[N];
    load_floats(zs, z + i);
    load_floats(ts, t + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      student = fmaxf(student, zs[j]);
      teacher = fmaxf(teacher, ts[j]);
    }
  }
  Largest all{};
  all.student = block_max(student, memory);
  all.teacher = block_max(teacher, memory);
  return all;
}

// A row is read twice: for its largest logits, and for the sums relative to them. A thread's sums, of a few hundred
// terms each, are added in fp64.
template <int N>
__global__ void distillation_stats_row(double* stats, TaughtRows rows, float inverse, FindingWords findings) {
  __shared__ float most[kRowThreads / kWarp];
  __shared__ double sums[kRowThreads / kWarp];
  const std::int64_t row = blockIdx.x, n = rows.columns;
  const float *z = rows.student + row * n, *t = rows.teacher + row * n;
  const std::int32_t target = checked_target(rows.targets, rows.vocab, findings);
  const Largest largest = largest_of<N>(z, t, n, most);
  float plain = 0, student = 0, teacher = 0, difference = 0;
  for (std::int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    float zs[N], ts[N];
    load_floats(zs, z + i);
    load_floats(ts, t + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float dz = zs[j] - largest.student, dt = ts[j] - largest.teacher, q = expf(dt * inverse);
      plain += expf(dz);
      student += expf(dz * inverse);
      teacher += q;
      difference += q * (dt - dz);
    }
  }
  const double plain_sum = block_sum(static_cast<double>(plain), sums),
               student_sum = block_sum(static_cast<double>(student), sums),
               teacher_sum = block_sum(static_cast<double>(teacher), sums),
               difference_sum = block_sum(static_cast<double>(difference), sums);
  if (threadIdx.x != 0) return;
  const std::int64_t column = target - rows.begin;
  double* out = stats + kDistillationStats * row;
  out[0] = static_cast<double>(largest.student);
  out[1] = plain_sum;
  out[2] = target >= 0 && 0 <= column && column < n ? static_cast<double>(z[column]) : 0.0;
  out[3] = student_sum;
  out[4] = static_cast<double>(largest.teacher);
  out[5] = teacher_sum;
  out[6] = difference_sum * static_cast<double>(inverse);
}

struct TaughtLosses {
  float *loss, *divergence;
  float scale;
};

// Every thread joins the shards' stats for itself, without a barrier, and every rank in the order of shards: all have
// the same losses, to the bit. The gradient may be written over the student's logits.
template <int N, class T>
__global__ void distillation_row(TaughtLosses out, T* dlogits, TaughtRows rows, const double* stats,
                                 std::int64_t shards, Distillation rule, FindingWords findings) {
  constexpr bool kFast = sizeof(T) == 2;
  const std::int64_t row = blockIdx.x, n = rows.columns;
  T* dz = dlogits != nullptr ? dlogits + row * n : nullptr;
  const std::int32_t target = checked_target(rows.targets, rows.vocab, findings);
  if (target < 0) {
    if (threadIdx.x == 0) out.loss[row] = out.divergence[row] = 0;
    return clear_row(dz, n);
  }
  const DistillationRow whole =
      join_shards(stats + kDistillationStats * row, shards,
                  kDistillationStats * static_cast<std::int64_t>(gridDim.x), rule.temperature);
  if (threadIdx.x == 0) {
    out.loss[row] = cross_entropy_of(whole);
    out.divergence[row] = divergence_of(whole, rule.temperature);
  }
  if (dz == nullptr) return;
  const float *z = rows.student + row * n, *t = rows.teacher + row * n;
  const float z_max = static_cast<float>(whole.student_max), t_max = static_cast<float>(whole.teacher_max),
              inverse = static_cast<float>(1 / rule.temperature);
  const DistillationFactors f = factors_of(whole, rule, out.scale);
  // The target's element is put right behind the loop, by the thread that writes it there.
  const std::int64_t column = target - rows.begin;
  const bool has_target = column >= 0 && column < n && column / N % kRowThreads == threadIdx.x;
  float at_target = 0;
  if (has_target) {
    const float student = z[column] - z_max, teacher = t[column] - t_max,
                plain = static_cast<float>(static_cast<double>(out.scale) * (1 - rule.weight));
    at_target = expf(student) * f.plain - plain +
                (expf(student * inverse) * f.student - expf(teacher * inverse) * f.teacher);
  }
  for (std::int64_t i = threadIdx.x * N; i < n; i += kRowThreads * N) {
    float zs[N], ts[N];
    load_floats(zs, z + i);
    load_floats(ts, t + i);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float student = zs[j] - z_max, teacher = ts[j] - t_max;
      zs[j] = exponential<kFast>(student) * f.plain + (exponential<kFast>(student * inverse) * f.student -
                                                       exponential<kFast>(teacher * inverse) * f.teacher);
    }
    store_floats(dz + i, zs);
  }
  if (has_target) dz[column] = from_float<T>(at_target);
}

TaughtRows on_device(const DistilledRows& rows) {
  return {rows.logits_CV.as<float>(),
          rows.teacher_CV.as<float>(),
          rows.targets_C.as<std::int32_t>(),
          rows.logits_CV.shape[1],
          rows.shard.begin,
          rows.shard.total};
}

}  // namespace

void distillation_stats(Exec& ex, TensorView stats_C7, const DistilledRows& rows, double temperature) {
  CudaStream& stream = stream_of(ex);
  stream.limit(Finding::kTarget, rows.shard.total);
  const TaughtRows taught = on_device(rows);
  const bool wide = packs<kWide>(taught.columns, taught.student, taught.teacher);
  launch(ex, static_cast<unsigned>(rows.logits_CV.shape[0]), kRowThreads,
         wide ? distillation_stats_row<kWide> : distillation_stats_row<1>, stats_C7.as<double>(), taught,
         static_cast<float>(1 / temperature), stream.findings());
}

void distillation_losses(Exec& ex, const DistilledLosses& out, const DistilledRows& rows,
                         ConstTensorView stats_PC7, const Distillation& rule) {
  CudaStream& stream = stream_of(ex);
  const TaughtRows taught = on_device(rows);
  const TaughtLosses losses{out.loss_C.as<float>(), out.divergence_C.as<float>(), out.scale};
  with_float_type(out.dlogits_CV.dtype, [&](auto type) {
    using T = decltype(type);
    T* dlogits = out.dlogits_CV.if_given<T>();
    const bool wide = packs<kWide>(taught.columns, taught.student, taught.teacher, dlogits);
    launch(ex, static_cast<unsigned>(rows.logits_CV.shape[0]), kRowThreads,
           wide ? distillation_row<kWide, T> : distillation_row<1, T>, losses, dlogits, taught,
           stats_PC7.as<double>(), stats_PC7.shape[0], rule, stream.findings());
  });
}

}  // namespace upmoe::cuda
