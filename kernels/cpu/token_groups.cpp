#include "kernels/ops/token_groups.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/router_rows.h"
#include "kernels/ops/backend.h"
#include "kernels/ops/weight_order.h"

namespace upmoe::cpu {

namespace {

// The rows of one group, in its order.
struct Group {
  const std::int32_t* row;
  std::int64_t size;
  bool last;  // of its position
};
Group group_of(const TokenGroups& groups, std::int64_t g) {
  const std::int64_t position = g / groups.of_position(), number = g % groups.of_position(),
                     begin = number * groups.size;
  return {groups.row_N.as<std::int32_t>() + position * groups.same + begin,
          std::min(groups.size, groups.same - begin), number + 1 == groups.of_position()};
}

void require_rows(const TokenGroups& groups) {
  const std::int64_t tokens = groups.row_N.elements();
  require_in_range(groups.row_N.as<std::int32_t>(), tokens, tokens, "row_N");
}

// body(local row, group) of every token that is here.
template <class Body>
void for_each_here(const GroupsHere& here, std::int64_t tokens, std::int64_t work, const Body& body) {
  require_rows(here.groups);
  parallel_for(here.groups.count(), here.groups.size * work, [&](std::int64_t g) {
    const Group group = group_of(here.groups, g);
    for (std::int64_t i = 0; i < group.size; ++i) {
      const std::int64_t t = group.row[i] - here.first;
      if (t >= 0 && t < tokens) body(t, g);
    }
  });
}

}  // namespace

void choose_tokens(Exec&, TensorView index_NE, ConstTensorView probs_NE, const TokenGroups& groups,
                   const GroupCapacity& capacity) {
  const std::int64_t experts = probs_NE.shape[1];
  const float* probs = probs_NE.as<float>();
  auto* index = index_NE.as<std::int32_t>();
  require_rows(groups);
  parallel_for(groups.count(), groups.size * experts * 4, [&](std::int64_t g) {
    const Group group = group_of(groups, g);
    const auto taken = static_cast<std::size_t>(group.last ? capacity.last : capacity.full);
    std::vector<std::int32_t> best;
    for (std::int64_t e = 0; e < experts; ++e) {
      best.assign(group.row, group.row + group.size);
      // Stable: among equals the group's order stays.
      std::stable_sort(best.begin(), best.end(), [&](std::int32_t a, std::int32_t b) {
        return compared_weight(probs[a * experts + e]) > compared_weight(probs[b * experts + e]);
      });
      for (std::size_t i = 0; i < best.size(); ++i)
        index[best[i] * experts + e] = i < taken ? static_cast<std::int32_t>(e) : -1;
    }
  });
}

void mixture_parts(Exec&, TensorView part_NE, ConstTensorView logits_NE, const TokenGroups& groups,
                   float temperature) {
  const std::int64_t experts = part_NE.shape[1];
  const float* logits = logits_NE.as<float>();
  float* part = part_NE.as<float>();
  require_finite(logits, logits_NE.shape[0], experts);
  require_rows(groups);
  parallel_for(groups.count(), groups.size * experts * 8, [&](std::int64_t g) {
    const Group group = group_of(groups, g);
    for (std::int64_t e = 0; e < experts; ++e) {
      float largest = logits[group.row[0] * experts + e], sum = 0;
      for (std::int64_t i = 1; i < group.size; ++i)
        largest = std::max(largest, logits[group.row[i] * experts + e]);
      for (std::int64_t i = 0; i < group.size; ++i) {
        const std::int64_t at = group.row[i] * experts + e;
        part[at] = std::exp((logits[at] - largest) / temperature);
        sum += part[at];
      }
      for (std::int64_t i = 0; i < group.size; ++i) part[group.row[i] * experts + e] /= sum;
    }
  });
}

// With p the softmax of h / temperature: dh_t = p_t (dp_t - sum_u p_u dp_u) / temperature.
void mixture_parts_backward(Exec&, TensorView dlogits_NE, ConstTensorView dpart_NE, ConstTensorView part_NE,
                            const TokenGroups& groups, float temperature) {
  const std::int64_t experts = part_NE.shape[1];
  const float *dpart = dpart_NE.as<float>(), *part = part_NE.as<float>();
  float* dlogits = dlogits_NE.as<float>();
  require_rows(groups);
  parallel_for(groups.count(), groups.size * experts * 4, [&](std::int64_t g) {
    const Group group = group_of(groups, g);
    for (std::int64_t e = 0; e < experts; ++e) {
      float dot = 0;
      for (std::int64_t i = 0; i < group.size; ++i) {
        const std::int64_t at = group.row[i] * experts + e;
        dot += part[at] * dpart[at];
      }
      for (std::int64_t i = 0; i < group.size; ++i) {
        const std::int64_t at = group.row[i] * experts + e;
        dlogits[at] = part[at] * (dpart[at] - dot) / temperature;
      }
    }
  });
}

void mix_tokens(Exec&, TensorView mix_MD, ConstTensorView x_TD, ConstTensorView part_TE,
                const GroupsHere& here) {
  const std::int64_t tokens = x_TD.shape[0], width = x_TD.shape[1], experts = part_TE.shape[1],
                     groups = here.groups.count();
  const float* part = part_TE.as<float>();
  require_rows(here.groups);
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    const X* x = x_TD.as<X>();
    X* mix = mix_MD.as<X>();
    std::fill(mix + groups * experts * width, mix + mix_MD.elements(), X{});
    parallel_for(groups, here.groups.size * experts * width, [&](std::int64_t g) {
      const Group group = group_of(here.groups, g);
      for (std::int64_t e = 0; e < experts; ++e)
        for_lanes(width, [&](std::int64_t column, auto lanes) {
          f32x16 sum{};
          for (std::int64_t i = 0; i < group.size; ++i) {
            const std::int64_t t = group.row[i] - here.first;
            if (t < 0 || t >= tokens) continue;
            sum += load(x + t * width + column, lanes) * part[t * experts + e];
          }
          store(mix + (g * experts + e) * width + column, sum, lanes);
        });
    });
  });
}

void share_mixtures(Exec&, TensorView y_TD, ConstTensorView mix_MD, ConstTensorView part_TE,
                    const GroupsHere& here) {
  const std::int64_t width = y_TD.shape[1], experts = part_TE.shape[1];
  with_float_type(y_TD.dtype, [&](auto type) {
    using X = decltype(type);
    for_each_here(here, y_TD.shape[0], experts * width, [&](std::int64_t t, std::int64_t g) {
      const float* part = part_TE.as<float>() + t * experts;
      const X* mix = mix_MD.as<X>() + g * experts * width;
      for_lanes(width, [&](std::int64_t column, auto lanes) {
        f32x16 sum{};
        for (std::int64_t e = 0; e < experts; ++e) sum += load(mix + e * width + column, lanes) * part[e];
        X* y = y_TD.as<X>() + t * width + column;
        store(y, load(y, lanes) + sum, lanes);
      });
    });
  });
}

void mixture_part_gradient(Exec&, TensorView dpart_TE, ConstTensorView x_TD, ConstTensorView mix_MD,
                           const GroupsHere& here, Accumulate mode) {
  const std::int64_t width = x_TD.shape[1], experts = dpart_TE.shape[1];
  with_float_type(x_TD.dtype, [&](auto type) {
    using X = decltype(type);
    for_each_here(here, x_TD.shape[0], experts * width, [&](std::int64_t t, std::int64_t g) {
      const X* x = x_TD.as<X>() + t * width;
      float* dpart = dpart_TE.as<float>() + t * experts;
      for (std::int64_t e = 0; e < experts; ++e) {
        const X* mix = mix_MD.as<X>() + (g * experts + e) * width;
        const float product = sum_lanes(width, [&](std::int64_t column, auto lanes) {
          return load(x + column, lanes) * load(mix + column, lanes);
        });
        dpart[e] = mode == Accumulate::kAdd ? dpart[e] + product : product;
      }
    });
  });
}

}  // namespace upmoe::cpu
