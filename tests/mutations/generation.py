"""Errors in what generation keeps, draws and shares; see tests/mutants.py."""

PROGRAM = "generation_test"
RATES = "trainer/generation_rates.cpp"
RUN_TILES, ON_GPU = "kernels/cuda/portable/attention_run.cu", "attention_decode_test_on_gpu"

MUTANTS = {
    "window_of_one_key_more": (
        "kernels/cpu/attention_decode.cpp", "std::max<std::int64_t>(0, position - window + 1)",
        "std::max<std::int64_t>(0, position - window)", "*mistral*", PROGRAM),
    "slots_for_a_window_without_its_chunk": (
        "trainer/generation_room.cpp", "std::min(longest, window + chunk - 1)",
        "std::min(longest, std::max(window, chunk))", "*mistral*", PROGRAM),
    "picked_tokens_are_the_first_rank_s": (
        "trainer/model/sequence_shards.cpp", "first = n * tp.rank();", "first = 0 * tp.rank();", "*PickedTokens*",
        PROGRAM),
    "picked_tokens_are_added_to_the_first_ones": (
        "trainer/model/block.cpp", "  return picked_TD;", "  return saved.x_TD.rows(0, shape[0]);", "*PickedTokens*",
        PROGRAM),
    "some_tokens_of_the_last_block_are_read_as_all": (
        "trainer/model/transformer.cpp", "picks_fewer(rows) ? ConstTensorView{} : rows.pick_N", "rows.pick_N",
        "*PickedTokens*", PROGRAM),
    "a_prompt_costs_every_token_s_logits": (
        "trainer/cost/roofline.cpp", "rehearse_prompt(model, prompt)", "rehearse_forward(model, prompt)", "Roofline.*",
        "cost_test"),
    "work_of_a_call_counts_what_others_took": (
        "trainer/generation.cpp", "  keep.restart_peak();\n", "", "*MemoryIsUsedAgain*", PROGRAM),
    "later_chunk_forgets_the_first": (
        "trainer/generation.cpp", "step.begins = begin == 0;", "step.begins = true;", "Cases/EveryModel.Cache*",
        PROGRAM),
    "vectors_of_a_step_all_in_one_place": (
        "trainer/placed_vectors.cpp", "    at += n;\n", "", "PlacedVectors.*", f"{PROGRAM}_on_gpu"),
    "new_token_one_position_too_far": (
        "trainer/generation.cpp", "rows_[r].length - 1);", "rows_[r].length);", "Cases/EveryModel.Cache*", PROGRAM),
    "new_token_one_position_too_far_by_what_is_said": (
        "trainer/generation.cpp", "rows_[r].length - 1);", "rows_[r].length);", "*Places*", PROGRAM),
    "draws_by_place_among_the_others": (
        "trainer/generation.cpp", "{prompts_[row.prompt].row, row.length}",
        "{static_cast<std::int64_t>(row.prompt), row.length}", "*OneRow*", PROGRAM),
    "stop_token_left_out": (
        "trainer/generation.cpp", "  made_[row.prompt].push_back(token);",
        "  if (std::find(options_.stop.begin(), options_.stop.end(), token) == options_.stop.end())\n"
        "    made_[row.prompt].push_back(token);", "GenerationEnds.*", PROGRAM),
    "logits_of_a_share_in_the_first_columns": (
        "trainer/model/lm_head.cpp", "copy_columns(ex, logits_NV, shard.begin, own_Nv, 0, v);",
        "copy_columns(ex, logits_NV, 0, own_Nv, 0, v);", "*ManyRanks*", PROGRAM),
    "answers_of_other_ranks_lost": (
        "trainer/generation.cpp", "  if (model_.mesh.world().size() == 1) return made_;", "  return made_;",
        "*ManyRanks*", PROGRAM),
    "equal_logits_the_last_of_them": (
        "trainer/sampling.cpp", "if (logits_V[v] > logits_V[best]) best = v;",
        "if (logits_V[v] >= logits_V[best]) best = v;", "Sampling.Greedy*", PROGRAM),
    "cold_times_counted": (
        RATES, "      if (round == 0)\n", "      if (round < 0)\n", "GenerationRates.*", PROGRAM),
    "slowest_round_for_the_median": (
        RATES, "quantile(decode, 0.5)", "quantile(decode, 1)", "GenerationRates.*", PROGRAM),
    "memory_of_the_last_round": (
        RATES, "if (prefill.empty()) memory = g.memory;", "memory = g.memory;", "GenerationRates.*", PROGRAM),
    "steps_of_one_round": (
        RATES, "steps.insert(steps.end(), g.step_seconds.begin(), g.step_seconds.end());", "steps = g.step_seconds;",
        "GenerationRates.*", PROGRAM),
    "one_round_after_the_other_for_each_model": (
        RATES, "      for (auto& [m, of_model] : in_turns) {\n",
        "      for (auto at = in_turns.rbegin(); at != in_turns.rend(); ++at) {\n        auto& [m, of_model] = *at;\n",
        "GenerationRates.*", PROGRAM),
    "rows_by_the_longest_prompt_for_the_first": (
        RATES, "row == 0 ? r.prompt : 1", "r.prompt", "GenerationRates.*", PROGRAM),
    "second_wave_begins_with_the_first": (
        "trainer/generation.cpp", "i = wave * at_once_; i < std::min", "i = 0; i < std::min", "*OneRow*", PROGRAM),
    "room_for_rows_of_other_waves": (
        "trainer/generation.cpp", "std::min(mine_.size(), at_once_)", "mine_.size()", "Rows.*", PROGRAM),
    "weights_not_counted_in_the_room": (
        "trainer/generation_room.cpp", " - kept.weights;", ";", "Rows.*", PROGRAM),
    "weights_of_one_model_in_the_room_of_several": (
        "trainer/generation_room.cpp", "weights += k.weights;", "weights = k.weights;", "RoomForRequests.*", PROGRAM),
    "most_that_fit_not_timed": (
        RATES, "  numbers.push_back(most);\n", "", "Concurrency.*", PROGRAM),
    "window_of_a_chunk_forgotten": (
        "kernels/cpu/attention.cpp", "visibility_in(s, {})", "Visibility{}", "*AttentionRuns*",
        "attention_decode_test"),
    "last_token_of_a_chunk_lost": (
        "kernels/cpu/attention.cpp", "s.seq_len = begin + tokens.run;", "s.seq_len = begin + tokens.run - 1;",
        "*AttentionRuns*", "attention_decode_test"),
    "ring_that_turns_within_a_block": (
        "kernels/cpu/attention.cpp", "seq.slots == 0 || row + rows <= seq.slots", "true", "*AttentionRuns*",
        "attention_decode_test"),
    "keys_of_another_row": (
        "kernels/cpu/attention.cpp", "*tokens.row_T.as<std::int32_t>() * slots * width", "0", "*AttentionRuns*",
        "attention_decode_test"),
    "window_of_a_chunk_forgotten_in_its_tiles": (
        RUN_TILES, "in.window > 0 ? ahead - in.window + 1 : -L::kRows", "-L::kRows", "*AttentionRuns*", ON_GPU),
    "tiles_from_the_window_of_the_last_query": (
        RUN_TILES, "max(0, position - in.window + 1)", "max(0, last - in.window + 1)", "*AttentionRuns*", ON_GPU),
    "keys_behind_a_query_in_its_tile": (
        RUN_TILES, "                        ahead,\n", "                        ahead + 1,\n", "*AttentionRuns*",
        ON_GPU),
    "ring_that_turns_within_a_tile": (
        RUN_TILES, "(slot < slots ? slot : slot - slots)", "slot", "*AttentionRuns*", ON_GPU),
    "tiles_over_the_keys_of_the_first_row": (
        RUN_TILES, "*in.row * in.slots * in.kv_stride +", "0 +", "*AttentionRuns*", ON_GPU),
    "tiles_over_the_keys_of_another_head": (
        RUN_TILES, "(at.head / (in.heads / in.kv_heads))", "(at.head % in.kv_heads)", "*AttentionRuns*", ON_GPU),
    "tokens_of_none_behind_tiles_left_as_they_were": (
        RUN_TILES, "if (others.elements() > 0)", "if (others.elements() < 0)", "*AttentionRuns*", ON_GPU),
    "chunks_token_by_token_on_a_gpu": (
        "kernels/cuda/choose/attention_decode.cpp", "d.run >= kTilesFrom ?", "d.run < 0 ?", "*AttentionRuns*",
        ON_GPU),
    "tokens_of_none_in_a_chunk_left_as_they_were": (
        "kernels/cpu/attention_decode.cpp",
        "    std::memset(others.data, 0, static_cast<std::size_t>(others.elements()) * size_of(others.dtype));\n", "",
        "*AttentionRuns*", "attention_decode_test"),
    "context_cut_where_it_means_something_else": (
        "launch/growing_text.cpp", "text.size() <= held_back || !text_.ends_with(text)", "text.size() <= held_back",
        "GrowingText.*", "growing_text_test"),
    "half_a_character_shown": (
        "launch/growing_text.cpp", "constexpr int kBegun = 3;", "constexpr int kBegun = 0;", "GrowingText.*",
        "growing_text_test"),
    "whole_answer_decoded_for_each_token": (
        "launch/growing_text.cpp", "if (tokens_.size() > kLongest) shorten();", "", "GrowingText.*",
        "growing_text_test"),
    "share_of_all_instead_of_the_likeliest": (
        "trainer/sampling.cpp", "  if (rule.top_p < 1) keep_share(all, rule.top_p);",
        "  if (rule.top_p < 1) keep_share(all, 1 - rule.top_p);", "Sampling.KeepsTheFewest*", PROGRAM),
    "a_run_of_bytes_is_shown_before_it_ends": (
        "launch/growing_text.cpp", "  if (before < all.size()) return decode_(all.first(before)).size();", "", "*",
        "growing_text_test"),
}
