// Routers that look at the tokens of a group: which of them an expert takes, and mixtures of them.

#include "kernels/ops/token_groups.h"

#include "kernels/cuda/runtime/launch.cuh"
#include "kernels/ops/backend.h"
#include "kernels/ops/weight_order.h"

namespace upmoe::cuda {

namespace {

// On the device; rows are looked at as far as they are rows.
struct Groups {
  const std::int32_t* row;
  std::int64_t tokens, same, size, of_position, count;

  __device__ std::int64_t begin(std::int64_t g) const {
    return g / of_position * same + g % of_position * size;
  }
  __device__ std::int64_t members(std::int64_t g) const {
    const std::int64_t left = same - g % of_position * size;
    return left < size ? left : size;
  }
  // The group of the i-th place.
  __device__ std::int64_t at(std::int64_t i) const { return i / same * of_position + i % same / size; }
  __device__ bool is_row(std::int64_t i) const { return row[i] >= 0 && row[i] < tokens; }
};
Groups on_device(const TokenGroups& groups) {
  Groups g{};
  g.row = groups.row_N.as<std::int32_t>();
  g.tokens = groups.row_N.elements();
  g.same = groups.same;
  g.size = groups.size;
  g.of_position = groups.of_position();
  g.count = groups.count();
  return g;
}

// A thread has one place and one expert: it counts who goes before. Row numbers that are none are told by expert 0.
__global__ void choose(std::int32_t* index, const float* probs, Groups groups, std::int64_t full,
                       std::int64_t last, int experts, FindingWords findings) {
  const std::int64_t i = global_thread() / experts, e = global_thread() % experts;
  if (i >= groups.tokens) return;
  if (!groups.is_row(i)) {
    if (e == 0) find(findings, Finding::kIndex, i, static_cast<std::uint32_t>(groups.row[i]));
    return;
  }
  const std::int64_t g = groups.at(i), begin = groups.begin(g);
  const float mine = compared_weight(probs[groups.row[i] * static_cast<std::int64_t>(experts) + e]);
  std::int64_t before = 0;
  for (std::int64_t j = begin; j < begin + groups.members(g); ++j) {
    if (!groups.is_row(j)) continue;
    const float other = compared_weight(probs[groups.row[j] * static_cast<std::int64_t>(experts) + e]);
    before += other > mine || (other == mine && j < i);
  }
  const bool is_last = (g + 1) % groups.of_position == 0;
  index[groups.row[i] * static_cast<std::int64_t>(experts) + e] =
      before < (is_last ? last : full) ? static_cast<std::int32_t>(e) : -1;
}

// A thread has one group and one expert.
struct GroupExpert {
  std::int64_t g;
  int e;
};
__device__ GroupExpert group_expert(int experts) {
  return {global_thread() / experts, static_cast<int>(global_thread() % experts)};
}

__global__ void parts(float* part, const float* logits, Groups groups, float temperature, int experts,
                      FindingWords findings) {
  const auto [g, e] = group_expert(experts);
  if (g >= groups.count) return;
  const std::int64_t begin = groups.begin(g), end = begin + groups.members(g);
  float largest = -INFINITY, sum = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    if (!groups.is_row(i)) {
      find(findings, Finding::kIndex, i, static_cast<std::uint32_t>(groups.row[i]));
      return;
    }
    const float logit = logits[groups.row[i] * static_cast<std::int64_t>(experts) + e];
    if (!isfinite(logit)) find(findings, Finding::kLogit, groups.row[i], static_cast<std::uint32_t>(e));
    largest = fmaxf(largest, logit);
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t at = groups.row[i] * static_cast<std::int64_t>(experts) + e;
    part[at] = expf((logits[at] - largest) / temperature);
    sum += part[at];
  }
  for (std::int64_t i = begin; i < end; ++i)
    part[groups.row[i] * static_cast<std::int64_t>(experts) + e] /= sum;
}

// With p the softmax of h / temperature: dh_t = p_t (dp_t - sum_u p_u dp_u) / temperature.
__global__ void parts_backward(float* dlogits, const float* dpart, const float* part, Groups groups,
                               float temperature, int experts) {
  const auto [g, e] = group_expert(experts);
  if (g >= groups.count) return;
  const std::int64_t begin = groups.begin(g), end = begin + groups.members(g);
  float dot = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    if (!groups.is_row(i)) return;
    const std::int64_t at = groups.row[i] * static_cast<std::int64_t>(experts) + e;
    dot += part[at] * dpart[at];
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t at = groups.row[i] * static_cast<std::int64_t>(experts) + e;
    dlogits[at] = part[at] * (dpart[at] - dot) / temperature;
  }
}

struct Mixing {
  Groups groups;
  std::int64_t first, tokens;  // the rows that are here
  std::int64_t width;
  int experts;

  // Where the token of a place lies here, or -1.
  __device__ std::int64_t here(std::int64_t i) const {
    const std::int64_t t = groups.row[i] - first;
    return t >= 0 && t < tokens ? t : -1;
  }
};
Mixing mixing(const GroupsHere& here, ConstTensorView x_TD, ConstTensorView part_TE) {
  return {on_device(here.groups), here.first, x_TD.shape[0], x_TD.shape[1],
          static_cast<int>(part_TE.shape[1])};
}

// A block has one row of mixtures.
template <class X>
__global__ void mix(X* out, const X* x, const float* part, Mixing m) {
  const std::int64_t row = blockIdx.x, g = row / m.experts, e = row % m.experts;
  const bool real = g < m.groups.count;
  const std::int64_t begin = real ? m.groups.begin(g) : 0, end = begin + (real ? m.groups.members(g) : 0);
  for (std::int64_t column = threadIdx.x; column < m.width; column += kThreads) {
    float sum = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t t = m.here(i);
      if (t >= 0) sum += to_float(x[t * m.width + column]) * part[t * m.experts + e];
    }
    out[row * m.width + column] = from_float<X>(sum);
  }
}

// A block has one place.
template <class X>
__global__ void share(X* y, const X* mixtures, const float* part, Mixing m) {
  const std::int64_t t = m.here(blockIdx.x), g = m.groups.at(blockIdx.x);
  if (t < 0) return;
  for (std::int64_t column = threadIdx.x; column < m.width; column += kThreads) {
    float sum = 0;
    for (int e = 0; e < m.experts; ++e)
      sum += to_float(mixtures[(g * m.experts + e) * m.width + column]) * part[t * m.experts + e];
    y[t * m.width + column] = from_float<X>(to_float(y[t * m.width + column]) + sum);
  }
}

// A block has one place, its warps take turns at the experts.
template <class X>
__global__ void part_gradient(float* dpart, const X* x, const X* mixtures, Mixing m, bool add) {
  const std::int64_t t = m.here(blockIdx.x), g = m.groups.at(blockIdx.x);
  if (t < 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int e = static_cast<int>(threadIdx.x) / kWarp; e < m.experts; e += kThreads / kWarp) {
    float sum = 0;
    for (std::int64_t column = lane; column < m.width; column += kWarp)
      sum += to_float(x[t * m.width + column]) * to_float(mixtures[(g * m.experts + e) * m.width + column]);
    sum = warp_sum(sum);
    if (lane == 0) dpart[t * m.experts + e] = add ? dpart[t * m.experts + e] + sum : sum;
  }
}

}  // namespace

void choose_tokens(Exec& ex, TensorView index_NE, ConstTensorView probs_NE, const TokenGroups& groups,
                   const GroupCapacity& capacity) {
  const std::int64_t experts = probs_NE.shape[1];
  stream_of(ex).limit(Finding::kIndex, groups.row_N.elements());
  launch(ex, blocks_for(index_NE.elements(), kThreads), kThreads, choose, index_NE.as<std::int32_t>(),
         probs_NE.as<float>(), on_device(groups), capacity.full, capacity.last, static_cast<int>(experts),
         stream_of(ex).findings());
}

void mixture_parts(Exec& ex, TensorView part_NE, ConstTensorView logits_NE, const TokenGroups& groups,
                   float temperature) {
  const std::int64_t experts = part_NE.shape[1];
  stream_of(ex).limit(Finding::kIndex, groups.row_N.elements());
  launch(ex, blocks_for(groups.count() * experts, kThreads), kThreads, parts, part_NE.as<float>(),
         logits_NE.as<float>(), on_device(groups), temperature, static_cast<int>(experts),
         stream_of(ex).findings());
}

void mixture_parts_backward(Exec& ex, TensorView dlogits_NE, ConstTensorView dpart_NE,
                            ConstTensorView part_NE, const TokenGroups& groups, float temperature) {
  const std::int64_t experts = part_NE.shape[1];
  launch(ex, blocks_for(groups.count() * experts, kThreads), kThreads, parts_backward, dlogits_NE.as<float>(),
         dpart_NE.as<float>(), part_NE.as<float>(), on_device(groups), temperature,
         static_cast<int>(experts));
}

void mix_tokens(Exec& ex, TensorView mix_MD, ConstTensorView x_TD, ConstTensorView part_TE,
                const GroupsHere& here) {
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    launch(ex, static_cast<unsigned>(mix_MD.shape[0]), kThreads, mix<X>, mix_MD.as<X>(), x_TD.as<X>(),
           part_TE.as<float>(), mixing(here, x_TD, part_TE));
  });
}

void share_mixtures(Exec& ex, TensorView y_TD, ConstTensorView mix_MD, ConstTensorView part_TE,
                    const GroupsHere& here) {
  with_float_type(y_TD.dtype, [&](auto type) {
    using X = decltype(type);
    launch(ex, static_cast<unsigned>(here.groups.row_N.elements()), kThreads, share<X>, y_TD.as<X>(),
           mix_MD.as<X>(), part_TE.as<float>(), mixing(here, y_TD, part_TE));
  });
}

void mixture_part_gradient(Exec& ex, TensorView dpart_TE, ConstTensorView x_TD, ConstTensorView mix_MD,
                           const GroupsHere& here, Accumulate mode) {
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    launch(ex, static_cast<unsigned>(here.groups.row_N.elements()), kThreads, part_gradient<X>,
           dpart_TE.as<float>(), x_TD.as<X>(), mix_MD.as<X>(), mixing(here, x_TD, dpart_TE),
           mode == Accumulate::kAdd);
  });
}

}  // namespace upmoe::cuda
