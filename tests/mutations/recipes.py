"""Errors in what recipes make of their sources; see tests/mutants.py."""

MUTANTS = {
    "random_split_in_order": (
        "upcycle/recipe.cpp", "experts.split == SplitOrder::kRandom ? UnitMap::Rule::kPermuted : UnitMap::Rule::kWrap",
        "UnitMap::Rule::kWrap", "*RandomSplit*", "transforms_test"),
    "random_split_shuffled_anew_in_every_round": (
        "upcycle/unit_map.cpp", "permutations.get(layer, 0)[", "permutations.get(layer, position / source_width)[",
        "UnitMap.*", "unit_map_test"),
    "noise_on_every_unit": (
        "upcycle/transforms.cpp", "  if (kept.noise != 0.0f) kept.noisy = m.map.noisy_units(m.matrix, context.seed);\n",
        "", "*Noise*", "transforms_test"),
    "noisy_columns_of_rows": (
        "upcycle/transforms.cpp", "[&](std::int64_t j) { return kept.reaches(j); }",
        "[&](std::int64_t j) { return kept.reaches((j + 1) % width); }", "*Noise*", "transforms_test"),
    "block_statistics_of_what_is_kept": (
        "upcycle/transforms.cpp", "if (after[j] == kNewUnit && before >= 0) units.push_back(before);",
        "if (after[j] != kNewUnit && before >= 0) units.push_back(before);", "*Block*", "transforms_test"),
    "block_deviation_over_n": (
        "upcycle/transforms.cpp", "(square - sum * sum / n) / (n - 1)", "(square - sum * sum / n) / n", "*Block*",
        "transforms_test"),
    "experts_deal_dense_models_in_turn": (
        "upcycle/recipe.cpp", "m.source = expert / layer.experts_of_source();",
        "m.source = expert % (config_.target.num_experts / layer.experts_of_source());", "*", "sources_test"),
    "second_dense_model_goes_on_in_the_row_of_copies": (
        "upcycle/recipe.cpp", "const int place = expert % experts_of_source();", "const int place = expert;", "*Alone*",
        "sources_test"),
    "average_without_the_last": (
        "upcycle/transforms.cpp", "for (int i = 0; i < copy.average_of; ++i) {",
        "for (int i = 0; i + 1 < copy.average_of; ++i) {", "*Mean*", "sources_test"),
    "statistics_of_the_first_dense_model": (
        "upcycle/transforms.cpp", "context.survey_of(m.source).moments", "context.survey_of(0).moments", "*Redrawn*",
        "sources_test"),
    "copies_beside_each_other": (
        "upcycle/growth.cpp", "t.expert % source.num_experts;",
        "t.expert * source.num_experts / grown.num_experts;", "*", "growth_test"),
    "noise_on_the_first_experts_too": (
        "upcycle/transforms.cpp", "if (r >= repeated.rows && !kept.bitwise())", "if (!kept.bitwise())", "*Exact*",
        "growth_test"),
    # Of the grown recipe alone the source's experts would be the same: its first copies are they.
    "growth_held_against_itself": (
        "upcycle/layer_error.cpp", "Layer{origin, origin.layers[at], context.source.model().config(), context}",
        "Layer{recipe, recipe.layers[at], moe, context}", "*Exact*", "growth_test"),
    "an_error_above_1_goes_unsaid": (
        "upcycle/report.cpp", "if (largest_error(layers) > kErrorOfNothing)", "if (largest_error(layers) > 1e9)",
        "Report.*", "upcycle_test"),
    "hidden_states_before_the_second_norm": (
        "trainer/model/transformer.cpp", "if (inputs) inputs(number, saved.normed2_TD);",
        "if (inputs) inputs(number, saved.h_TD);", "*", "ffn_inputs_test"),
    "means_of_the_last_sequence": (
        "trainer/ffn_inputs.cpp", "for (std::size_t d = 0; d < D; ++d) sum[d] += *x++;",
        "for (std::size_t d = 0; d < D; ++d) sum[d] = *x++;", "*Mean*", "ffn_inputs_test"),
    "every_rank_without_what_rank_0_was_told": (
        "upcycle/upcycler.cpp", "return calibration_from(broadcast_text(comm_, bytes, 0));",
        "return calibration_from(bytes);", "*Rank*", "calibration_test"),
    "rows_stay_where_they_were_placed": (
        "upcycle/clustering.cpp", "if (move.row < 0 || distance[at(a)] + move.cost >= distance[at(b)]) continue;",
        "if (move.row >= 0 || groups_ > 0) continue;", "BalancedAssignment.*", "clustering_test"),
    "distances_count_tokens_of_both_once": (
        "upcycle/clustering.cpp", "* groups + seed_of[at(b)])] -= 2;", "* groups + seed_of[at(b)])] += 2;",
        "Clusters.*", "clustering_test"),
    "routed_clusters_begin_at_the_shared_ones": (
        "upcycle/recipe.cpp", "map.begin = map.source_width - routed_neurons(config, sources) + place * map.width;",
        "map.begin = place * map.width;", "*Divide*", "clustering_test"),
    "activity_of_the_gate_alone": (
        "upcycle/neuron_activity.cpp", "g / (1 + std::exp(-g)) * u;", "g / (1 + std::exp(-g)) + 0 * u;", "*Active*",
        "clustering_test"),
    "clusters_scaled_as_a_split": (
        "upcycle/scale.cpp", "width / kept * config.target.num_experts_per_tok / weights;",
        "neurons / (kept * weights);", "*Divide*", "clustering_test"),
    "a_mixture_of_what_lies_on_each_host": (
        "upcycle/upcycler.cpp", "require_equal(comm_, \"models in --from\", digests);", "", "*Sources*",
        "sources_test"),
    "a_recipe_of_each_rank": (
        "upcycle/upcycler.cpp", "require_equal(comm_, \"recipes\", to_yaml(config));", "", "*Sources*", "sources_test"),
}
