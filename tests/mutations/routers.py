"""Errors in routers, their capacity, draws and balance terms; see tests/mutants.py."""

MUTANTS = {
    "the_first_slot_is_the_first_choice": (
        "trainer/routing_counts.cpp", "weight_K[k] > most ||", "false ||", "Routing*", "routing_counts_test"),
    "neighbours_across_sequences": (
        "trainer/routing_counts.cpp", "if (t % seq_len_ > 0 && now.first", "if (t > 0 && now.first", "Routing.*",
        "routing_counts_test"),
    "choices_of_the_tokens_behind": (
        "trainer/evaluation.cpp", "{ routing(batch.tokens_T, block, choices); }",
        "{ routing(batch.targets_T, block, choices); }", "Routing.*", "routing_counts_test"),
    "tokens_counted_for_every_mixture": (
        "trainer/routing_counts.cpp", "    if (block == mixtures_.front().block) count_tokens(tokens_T);",
        "    count_tokens(tokens_T);", "Routing.*", "routing_counts_test"),
    "chances_of_first_choices_by_all": (
        "trainer/routing_counts.cpp", "first = counts.first_by_source[source]", "first = counts.by_source[source]",
        "Routing*", "routing_counts_test"),
    "capacity_of_one_ranks_tokens": (
        "trainer/model/capacity_router.cpp", "tokens.pool->rank() * t;", "0 * t;",
        "Routers.CapacityOfAnyPoolAndOrder"),
    "capacity_in_the_order_of_rows": (
        "kernels/cpu/capacity.cpp", "return row_[i % tokens_] * k_ + i / tokens_;",
        "return (i % tokens_) * k_ + i / tokens_;", "*Capacity*", "capacity_test"),
    "second_choices_take_places_with_first_ones": (
        "kernels/cpu/capacity.cpp", "return row_[i % tokens_] * k_ + i / tokens_;",
        "return row_[i / k_] * k_ + i % k_;", "*Capacity*", "capacity_test"),
    "capacity_ties_go_to_the_last": (
        "kernels/cpu/capacity.cpp", "return pool.key(a) > pool.key(b);",
        "return pool.key(a) > pool.key(b) || (pool.key(a) == pool.key(b) && a > b);", "*Capacity*",
        "capacity_test"),
    "capacity_of_one_more_on_a_gpu": (
        "kernels/cuda/portable/capacity.cu", "taken + b.rank < room", "taken + b.rank <= room", "*Capacity*",
        "capacity_test_on_gpu"),
    "capacity_without_the_last_compared_bit_on_a_gpu": (
        "kernels/cuda/portable/capacity.cu", "bit >= kLeastComparedBit;", "bit > kLeastComparedBit;",
        "LimitChoices.*", "capacity_test_on_gpu"),
    "pools_behind_a_grid_are_the_first_ones_again": (
        "kernels/cuda/portable/capacity.cu", "    l.row += pools * l.pool;\n", "", "LimitChoices.*",
        "capacity_test_on_gpu"),
    "capacity_rounded_down": (
        "configs/expert_use.cpp", "std::ceil(share * (1 - 1e-12))", "share",
        "RouterGradient.CapacityIsRoundedUp", "router_gradient_test"),
    "capacity_in_evaluation": (
        "trainer/model/capacity_router.cpp", "    if (!balance.tokens) return all;\n", "",
        "RouterGradient.WhatTrainingDoesIsNotDoneOutside", "router_gradient_test"),
    "dropped_choices_counted_by_every_rank": (
        "trainer/model/capacity_router.cpp", " && tokens.pool->rank() == 0)", ")",
        "Routers.CapacityOfAnyPoolAndOrder"),
    "jitter_by_the_row_of_a_rank": (
        "kernels/cpu/token_draws.h",
        "return draws.first + static_cast<std::uint64_t>(draws.place_T.as<std::int32_t>()[t]);",
        "return draws.first + static_cast<std::uint64_t>(t);", "RouterDraws.*", "router_draws_test"),
    "noise_of_the_first_tokens_on_every_rank": (
        "trainer/model/transformer.cpp",
        "  const std::int64_t t = own_tokens(batch), first = tp->rank() * t;\n  routed.place_T",
        "  const std::int64_t t = own_tokens(batch), first = 0;\n  routed.place_T", "Routers.NoiseImportanceAndLoad"),
    "jitter_not_in_the_gradient": (
        "trainer/model/jitter_router.cpp", "ops::jitter(ex, dx_TD, djittered_TD, draws(balance), amount_,",
        "ops::jitter(ex, dx_TD, djittered_TD, draws(balance), 0.0f,", "RouterGradient.MoeOfJitteredInput",
        "router_gradient_test"),
    "draws_of_every_layer_alike": (
        "trainer/model/transformer.cpp",
        "routed.layer = static_cast<std::uint32_t>(first_block) + static_cast<std::uint32_t>(block);",
        "routed.layer = static_cast<std::uint32_t>(block);", "Routers.JitterAndCapacityOfSigmoidScores"),
    "draws_of_every_micro_batch_alike": (
        "trainer/pipeline.cpp", "step->first_token + before * shard->rows.size();", "step->first_token;",
        "Routers.MicroBatchesOfAnySizeDrawTheSame"),
    "load_without_the_bound_s_gradient": (
        "kernels/cpu/noisy_routing.cpp", "if (const float g = of_load(e); g != 0) dlogits[row.bound(e)] -= g;", ";",
        "*Noisy*", "noisy_routing_test"),
    "noise_not_in_its_scales_gradient": (
        "trainer/model/noisy_router.cpp", "    noise_.backward(ex, dx_TD, dscale_TE, saved.x_TD);\n", "",
        "RouterGradient.MoeWithNoise", "router_gradient_test"),
    "importance_without_a_gradient": (
        "trainer/model/balance.cpp", "  if (!weight_gradient_E.given()) return dweight_TK;", "  return dweight_TK;",
        "RouterGradient.MoeImportance", "router_gradient_test"),
    "mixtures_inside_a_router_not_shared_out": (
        "trainer/model/router_around.h", "    inner_->share_outputs(ex, y_TD, balance, saved);\n", "",
        "RouterAround.*", "router_around_test"),
    "sums_for_terms_without_a_coefficient": (
        "trainer/model/balance.cpp", " && t.coefficient != 0", "", "Routers.TermsWithoutACoefficient"),
    "importance_of_one_ranks_tokens": (
        "trainer/model/transformer.cpp", "if (pool->size() > 1 && saved.loads_ML.rows() > 0)",
        "if (pool->size() > 1 && saved.loads_ML.rows() > 0 && !saved.row.weights)", "Routers.NoiseImportanceAndLoad"),
    "chances_where_weights_are": (
        "kernels/ops/balance.h", "return weights_at() + (weights ? experts : 0);", "return weights_at();",
        "Terms.VariationOfSums", "balance_test"),
    "lost_assignments_of_one_mixture": (
        "kernels/ops/balance_formulas.h", "sum += value_of(m, i);",
        "sum = i == 1 ? value_of(m, i) : sum + value_of(m, i);",
        "Terms.VariationOfSums", "balance_test"),
    "variation_of_the_mean_s_gradient_left_out": (
        "kernels/ops/balance_formulas.h",
        "((sums_E[e] - v.mean) / square - v.variance * v.mean / (square * square))", "((sums_E[e] - v.mean) / square)",
        "Terms.VariationOfSums", "balance_test"),
    "second_choices_kept_with_their_weight": (
        "kernels/cpu/router_draws.cpp", "u < 2.0f * weight[2 * t + 1]", "u < weight[2 * t + 1]", "RouterDraws.*",
        "router_draws_test"),
    "capacity_rows_of_this_rank_alone": (
        "trainer/pipeline.cpp", "rank < context.ranks; ++rank", "rank < 1; ++rank",
        "Routers.CapacityOfAnyPoolAndOrder"),
    "router_bias_not_in_the_choice": (
        "kernels/cpu/sigmoid_routing.cpp", "return bias == nullptr ? scores[e] : scores[e] + bias[e]; });",
        "return scores[e] + (e < 0 ? bias[e] : 0.0f); });", "Routers.Sigmoid*"),
    "router_bias_in_the_weight": (
        "kernels/cpu/sigmoid_routing.cpp", "chosen += weight[j] = scores[top.index[j]];", "chosen += weight[j];",
        "SigmoidRouting.AsTransformersDots1", "sigmoid_routing_test"),
    "router_bias_moves_the_other_way": (
        "trainer/router_buffers.cpp", "lacks > 0 ? rate : lacks < 0 ? -rate : 0.0",
        "lacks > 0 ? -rate : lacks < 0 ? rate : 0.0",
        "RouterBiases.*", "layout_resume_test"),
    "factor_of_the_weights_left_out_of_backward": (
        "trainer/model/scaled_router.cpp",
        "    RouterAround::backward(ex, dx_TD, scaled(ex, dweight_TK, *ex.scratch), balance, saved);",
        "    RouterAround::backward(ex, dx_TD, dweight_TK, balance, saved);", "*Scaled*", "router_gradient_test"),
    "factor_of_the_weights_squared": (
        "trainer/model/scaled_router.cpp", "    ops::scale(ex, out_TK, factor_);",
        "    ops::scale(ex, out_TK, factor_ * factor_);", "*Factor*", "router_gradient_test"),
    "experts_choose_among_one_ranks_tokens": (
        "trainer/model/expert_choice_router.cpp", "first = groups.tp->rank() * T;", "first = 0 * T;",
        "Routers.ExpertsThatChooseTokens"),
    "groups_along_time": (
        "trainer/pipeline.cpp", "(half * count + s) * length + position", "(half * length + position) * count + s",
        "*LookAhead*", "look_ahead_test"),
    "experts_take_one_more": (
        "kernels/cpu/token_groups.cpp", "i < taken ?", "i <= taken ?", "*Groups*", "token_groups_test"),
    "experts_take_the_last_of_equals_on_a_gpu": (
        "kernels/cuda/portable/token_groups.cu", "(other == mine && j < i)", "(other == mine && j > i)", "*Groups*",
        "token_groups_test_on_gpu"),
    "temperature_not_in_the_gradient": (
        "kernels/cpu/token_groups.cpp", "part[at] * (dpart[at] - dot) / temperature;", "part[at] * (dpart[at] - dot);",
        "*Groups*", "token_groups_test"),
    "mixtures_of_one_ranks_tokens": (
        "trainer/model/token_mixture_router.cpp", "here.first_row = groups.tp->rank() * here.rows;",
        "here.first_row = 0 * here.rows;", "Routers.TokensInMixtures"),
    "parts_in_mixtures_without_a_gradient": (
        "trainer/model/token_mixture_router.cpp",
        "    ops::mixture_part_gradient(ex, dpart_TE, saved.x_TD, drow_MD, here.tokens, Accumulate::kOverwrite);",
        "    ops::fill(ex, dpart_TE, 0.0f);", "RouterGradient.MoeOfTokensInMixtures", "router_gradient_test"),
}
