// What routers compute.

#include "kernels/core/exec.h"
#include "kernels/ops/activation.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/capacity.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/gemm.h"
#include "kernels/ops/grouped_gemm.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/noisy_routing.h"
#include "kernels/ops/norm.h"
#include "kernels/ops/pointwise.h"
#include "kernels/ops/router_draws.h"
#include "kernels/ops/routing.h"
#include "kernels/ops/sigmoid_routing.h"
#include "kernels/ops/token_groups.h"
#include "tests/bench/op_bench.h"

namespace upmoe::bench {

// Logits, probabilities and weights are fp32 beside rows of any dtype.
void add_routers() {
  const auto f32 = DType::kF32;
  const auto both = [=](const std::string& name, auto forward) {
    add(name, f32, [=](benchmark::State& state) {
      const Tensor logits({kTokens, kExperts}, f32), probs({kTokens, kExperts}, f32),
          weight({kTokens, kTopK}, f32);
      const Tensor index({kTokens, kTopK}, DType::kI32), lse({kTokens}, f32), bias({kExperts}, f32);
      measure(state, f32, [&](Exec& ex) {
        forward(ex, SigmoidRoutes{probs.view, index.view, weight.view, lse.view}, logits.view, bias.view);
      });
    });
  };
  both("route_tokens", [](Exec& ex, const SigmoidRoutes& r, ConstTensorView logits, ConstTensorView) {
    ops::route_tokens(ex, r.probs_TE, r.index_TK, r.weight_TK, r.lse_T, logits, true);
  });
  both("route_sigmoid", [](Exec& ex, const SigmoidRoutes& r, ConstTensorView logits, ConstTensorView bias) {
    ops::route_sigmoid(ex, r, logits, bias, {});
  });
  add("limit_choices", f32, [=](benchmark::State& state) {
    const Tensor kept({kTokens, kTopK}, DType::kI32), index({kTokens, kTopK}, DType::kI32),
        row({kTokens}, DType::kI32), lost({kTokens / 512, kExperts}, f32);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      row.view.as<std::int32_t>()[t] = static_cast<std::int32_t>(t);
      for (std::int64_t j = 0; j < kTopK; ++j)
        index.view.as<std::int32_t>()[t * kTopK + j] = static_cast<std::int32_t>((7 * t + 11 * j) % kExperts);
    }
    measure(state, f32, [&](Exec& ex) {
      ops::limit_choices(ex, kept.view, lost.view, {index.view, {}, row.view}, {512, 512 * kTopK / kExperts});
    });
  });
  add("jitter", f32, [=](benchmark::State& state) {
    const Tensor y({kTokens, 2048}, f32), x({kTokens, 2048}, f32), place({kTokens}, DType::kI32);
    measure(state, f32, [&](Exec& ex) {
      ops::jitter(ex, y.view, x.view, {1, 0, 0, place.view}, 0.01f, Accumulate::kOverwrite);
    });
  });
  add("draw_second", f32, [=](benchmark::State& state) {
    const Tensor kept({kTokens, 2}, DType::kI32), index({kTokens, 2}, DType::kI32), weight({kTokens, 2}, f32),
        place({kTokens}, DType::kI32);
    for (std::int64_t i = 0; i < 2 * kTokens; ++i)
      index.view.as<std::int32_t>()[i] = static_cast<std::int32_t>(7 * i % kExperts);
    measure(state, f32, [&](Exec& ex) {
      ops::draw_second(ex, kept.view, index.view, weight.view, {1, 0, 0, place.view});
    });
  });
  add("add_router_noise", f32, [=](benchmark::State& state) {
    const Tensor noisy({kTokens, kExperts}, f32), logits({kTokens, kExperts}, f32),
        scale({kTokens, kExperts}, f32), place({kTokens}, DType::kI32);
    measure(state, f32, [&](Exec& ex) {
      ops::add_router_noise(ex, noisy.view, logits.view, scale.view, {1, 0, 0, place.view});
    });
  });
}

namespace {

// What is at hand behind a router, and room for results.
struct Routed {
  Tensor logits_TE{{kTokens, kExperts}, DType::kF32}, probs_TE{{kTokens, kExperts}, DType::kF32},
      weight_TK{{kTokens, kTopK}, DType::kF32}, lse_T{{kTokens}, DType::kF32}, sum_E{{kExperts}, DType::kF32},
      index_TK{{kTokens, kTopK}, DType::kI32}, place_T{{kTokens}, DType::kI32};
  Tensor one_TE{{kTokens, kExperts}, DType::kF32}, other_TE{{kTokens, kExperts}, DType::kF32},
      index_TE{{kTokens, kExperts}, DType::kI32}, stats_3E{{3, kExperts}, DType::kF64}, z_1{{1}, DType::kF64};

  Routed() {
    std::iota(place_T.view.as<std::int32_t>(), place_T.view.as<std::int32_t>() + kTokens, 0);
    for (std::int64_t i = 0; i < kTokens * kTopK; ++i)
      index_TK.view.as<std::int32_t>()[i] = static_cast<std::int32_t>(7 * i % kExperts);
  }
  TokenDraws draws() const { return {1, 0, 0, place_T.view}; }
  NoisyLogits noisy() const { return {logits_TE.view, probs_TE.view, logits_TE.view, index_TK.view}; }
  TokenGroups groups() const { return {place_T.view, 8, 8}; }
};

}  // namespace

// Backward, the counts of balance terms, and what is drawn.
void add_routed() {
  const auto with = [](const std::string& name, void (*op)(Exec&, const Routed&)) {
    add(name, DType::kF32, [=](benchmark::State& state) {
      const Routed r;
      measure(state, DType::kF32, [&](Exec& ex) { op(ex, r); });
    });
  };
  with("route_tokens_backward", [](Exec& ex, const Routed& r) {
    ops::route_tokens_backward(ex, r.one_TE.view, r.weight_TK.view, {r.sum_E.view},
                               {r.probs_TE.view, r.index_TK.view, r.weight_TK.view, r.lse_T.view}, true);
  });
  with("route_sigmoid_backward", [](Exec& ex, const Routed& r) {
    ops::route_sigmoid_backward(ex, r.one_TE.view, r.weight_TK.view, {r.sum_E.view},
                                {r.logits_TE.view, r.index_TK.view, r.lse_T.view}, {});
  });
  with("balance_stats", [](Exec& ex, const Routed& r) {
    ops::balance_stats(ex, r.stats_3E.view, r.z_1.view, r.probs_TE.view, r.index_TK.view, r.lse_T.view);
  });
  with("noisy_load", [](Exec& ex, const Routed& r) {
    ops::noisy_load(ex, r.stats_3E.view.rows(0, 1).reshape({kExperts}), r.noisy());
  });
  with("add_router_noise_backward", [](Exec& ex, const Routed& r) {
    ops::add_router_noise_backward(ex, r.one_TE.view, r.other_TE.view, {r.probs_TE.view, r.sum_E.view},
                                   r.noisy(), r.draws());
  });
  with("sum_by_expert", [](Exec& ex, const Routed& r) {
    ops::sum_by_expert(ex, r.stats_3E.view.rows(0, 1).reshape({kExperts}), r.weight_TK.view, r.index_TK.view);
  });
  with("choose_tokens", [](Exec& ex, const Routed& r) {
    ops::choose_tokens(ex, r.index_TE.view, r.probs_TE.view, r.groups(), {1, 1});
  });
  with("mixture_parts", [](Exec& ex, const Routed& r) {
    ops::mixture_parts(ex, r.one_TE.view, r.logits_TE.view, r.groups(), 1.0f);
  });
  with("mixture_parts_backward", [](Exec& ex, const Routed& r) {
    ops::mixture_parts_backward(ex, r.one_TE.view, r.logits_TE.view, r.probs_TE.view, r.groups(), 1.0f);
  });
}

// Of groups of eight tokens.
void add_group_routers() {
  const auto with = [](const std::string& name, auto op) {
    add(name, DType::kF32, [=](benchmark::State& state) {
      const Tensor x({kTokens, 512}, DType::kF32), mix({kTokens / 8 * kExperts, 512}, DType::kF32),
          part({kTokens, kExperts}, DType::kF32), row({kTokens}, DType::kI32);
      std::iota(row.view.as<std::int32_t>(), row.view.as<std::int32_t>() + kTokens, 0);
      const GroupsHere here{{row.view, 8, 8}, 0};
      measure(state, DType::kF32, [&](Exec& ex) { op(ex, x.view, mix.view, part.view, here); });
    });
  };
  with("mix_tokens", [](Exec& ex, TensorView x, TensorView mix, TensorView part, const GroupsHere& here) {
    ops::mix_tokens(ex, mix, x, part, here);
  });
  with("mixture_part_gradient",
       [](Exec& ex, TensorView x, TensorView mix, TensorView part, const GroupsHere& here) {
         ops::mixture_part_gradient(ex, part, x, mix, here, Accumulate::kOverwrite);
       });
  with("share_mixtures", [](Exec& ex, TensorView x, TensorView mix, TensorView part, const GroupsHere& here) {
    ops::share_mixtures(ex, x, mix, part, here);
  });
}

}  // namespace upmoe::bench
