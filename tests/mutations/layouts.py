"""Errors in what ranks share, sum and keep under a mesh; see tests/mutants.py."""

MUTANTS = {
    "kv_bias_gradient_summed_over_tp_alone": (
        "parallel/layout.cpp", "return {data * tp.count + tp.index, copies * tp.count};",
        "return {tp.index, tp.count};", "*"),
    "no_reduction_of_norm_and_router_over_tp": (
        "parallel/layout.cpp", "    if (spread.kind == OverTp::kWhole) return true;",
        "    if (spread.kind == OverTp::kWhole) return mine == theirs;", "*"),
    "shared_gate_gradient_counted_twice_over_tp": (
        "trainer/model/dense_ffn.cpp",
        "  if (gate_1D) gate_backward(ex, leaves ? TensorView{} : dx.partial_TD(), dgate_T, x_TD, saved);",
        "  if (gate_1D) gate_backward(ex, leaves ? TensorView{} : dx.partial_TD(), dgate_T, x_TD, saved);\n"
        "  if (gate_1D && tp->size() > 1) gate_backward(ex, dx.partial_TD(), dgate_T, x_TD, saved);", "*moe*"),
    "clip_norm_counts_replicas": (
        "trainer/optimizer.cpp", "  for (const OwnedSlice& s : slices_) gradients.push_back(s.grad);",
        "  for (const OwnedSlice& s : slices_) gradients.push_back(s.param->grad);", "*"),
    "loss_counted_on_every_tp_rank": (
        "trainer/model/lm_head.cpp", "    if (tp->rank() == 0) ops::sum(ex, loss_1, loss_C);",
        "    ops::sum(ex, loss_1, loss_C);", "*"),
    "balance_pool_of_one_rank": (
        "trainer/model/transformer.cpp", "  saved.tokens = shape[0] * pool->size();",
        "  saved.tokens = shape[0];", "*moe*"),
    "balance_pool_of_one_stage": (
        "trainer/pipeline.cpp", "    link_->receive(ex, *link_->backward, link_->next(), g_tD, f->all_2E);",
        "    link_->receive(ex, *link_->backward, link_->next(), g_tD, f->all_2E);\n    f->all_2E = f->pool_2E;",
        "*moe*"),
    "assignments_of_a_later_stage_in_the_first_rows": (
        "trainer/pipeline.cpp", "totals.assigned_ME(*first, *first + loads_ML.rows())",
        "totals.assigned_ME(0, loads_ML.rows())", "*moe*"),
    "loss_of_the_last_micro_batch_alone": (
        "trainer/pipeline.cpp", "ops::add_sums(ex, totals.loss_1(), f->saved.loss_1);",
        "ops::cast(ex, totals.loss_1(), f->saved.loss_1);", "*moe*"),
    "pool_not_begun_anew": (
        "trainer/pipeline.cpp", "f.is_first ? Accumulate::kOverwrite : Accumulate::kAdd", "Accumulate::kAdd", "*moe*"),
    "vocabulary_shard_forgets_its_beginning": (
        "trainer/model/make_transformer.cpp", "  return {p.shard.offset[0], p.spec.shape[0]};",
        "  return {0, p.spec.shape[0]};", "*"),
    "divisor_of_this_ranks_tokens": (
        "trainer/trainer.cpp",
        "  const std::int64_t all = run.tokens_per_step();",
        "  const std::int64_t all =\n"
        "      s_.batches->rounds() * s_.mesh.spec().dp * run.train.micro_batch * run.data.seq_len;", "*"),
    "one_piece_of_an_expert_computed_twice": (
        "trainer/model/expert_shares.cpp",
        "      piece_EP[static_cast<std::size_t>(e * etp + rank % etp)] = static_cast<std::int32_t>(piece++);",
        "      piece_EP[static_cast<std::size_t>(e * etp + rank % etp)] =\n"
        "          static_cast<std::int32_t>(piece++ - (rank % etp > 0 ? experts.size() : 0));", "*moe*"),
    "router_weight_of_one_piece_only": (
        "trainer/model/exchange.cpp",
        "  ops::gather_sum_rows(ex, sum_TK.reshape({T * K, 1}), rows_N1, plan.slot_TS.reshape({T * K, plan.pieces}));",
        "  ops::gather_rows(ex, sum_TK.reshape({T * K, 1}), rows_N1,\n"
        "                   plan.slot_TS.reshape({T * K * plan.pieces}).rows(0, T * K), 1);", "*moe*"),
    "gate_and_up_swapped_where_tp_cuts": (
        "trainer/model/dense_ffn.cpp", "  gate_up.forward(ex, gate_up_TG, x_TD);\n  if (gate_1D)",
        "  gate_up.forward(ex, gate_up_TG, x_TD);\n"
        "  if (tp->size() > 1)\n"
        "    for (std::int64_t i = 0; i + 1 < gate_up_TG.elements(); i += 2)\n"
        "      std::swap(gate_up_TG.as<float>()[i], gate_up_TG.as<float>()[i + 1]);\n"
        "  if (gate_1D)", "*"),
    "keys_of_later_chunks_are_seen": (
        "trainer/model/context_ring.cpp", "        if (keys > queries) continue;", "", "*"),
    "key_gradients_of_the_ring_forget_a_hop": (
        "trainer/model/context_ring.cpp", "    if (s > 0) ops::add(ex, sum_TK[s % 2], sum_TK[s % 2], own_TK);",
        "    if (s > 1) ops::add(ex, sum_TK[s % 2], sum_TK[s % 2], own_TK);", "*"),
    "partial_attention_outputs_not_weighed": (
        "trainer/model/context_ring.cpp",
        "      if (begun[q]) ops::attention_merge(ex, ring.half(sum_TQ, q), ring.half(lse_TN, q), out, lse);",
        "      if (begun[q]) ops::add(ex, ring.half(sum_TQ, q), ring.half(sum_TQ, q), out);", "*"),
    "keys_before_the_window_are_seen": (
        "trainer/model/context_ring.cpp", ".ahead = ahead};", ".ahead = chunk_.seq_len};", "*mistral*"),
    "a_pair_of_chunks_left_out_that_the_window_reaches": (
        "trainer/model/context_ring.cpp", "ahead - (chunk_.seq_len - 1) >= chunk_.window;",
        "ahead >= chunk_.window;", "*mistral*"),
    "norms_of_heads_summed_over_tp_as_if_cut": (
        "configs/param_table.cpp",
        "    case Role::kQueryNorm:\n    case Role::kKeyNorm:\n      return {{size}, {Dim::kHeadSize}};",
        "    case Role::kQueryNorm:\n    case Role::kKeyNorm:\n      return {{size}, {Dim::kHeads}};", "*qwen3*"),
    "scale_of_the_embedding_not_in_its_gradient": (
        "trainer/model/transformer.cpp", "  if (embedding->scale != 1) ops::scale(ex, g_tD, embedding->scale);",
        "  if (embedding->scale != 1 && tp->size() == 1) ops::scale(ex, g_tD, embedding->scale);", "*gemma*"),
    "scale_of_the_embedding_once_for_each_rank": (
        "trainer/model/transformer.cpp",
        "  x.reduce(ex);\n  if (embedding->scale != 1) ops::scale(ex, x_tD, embedding->scale);",
        "  for (int r = 0; r < tp->size(); ++r)\n"
        "    if (embedding->scale != 1) ops::scale(ex, x.partial_TD(), embedding->scale);\n  x.reduce(ex);",
        "*gemma*"),
    "scale_of_the_embedding_in_the_tied_head": (
        "trainer/model/transformer.cpp", "  saved.loss_1 = loss_sum(ex, keep);\n",
        "  if (embedding && embedding->scale != 1) ops::scale(ex, branch_tD, embedding->scale);\n"
        "  saved.loss_1 = loss_sum(ex, keep);\n", "*Cases*", "golden_test"),
    "scale_of_the_embedding_in_the_tied_heads_gradient": (
        "trainer/model/transformer.cpp",
        "                          embedding->shard);\n}\n\nvoid Transformer::Sees",
        "                          embedding->shard);\n"
        "  if (embedding->scale != 1) ops::scale(ex, embedding->weight_VD.grad, embedding->scale);\n"
        "}\n\nvoid Transformer::Sees", "*Cases*", "golden_test"),
    "tied_embedding_reduced_on_one_stage": (
        "parallel/layout.cpp", "    if (p.tied && is_end(rank)) return is_end(r);", "", "*tied*"),
    "shared_gradients_not_cleared_between_blocks": (
        "trainer/grad_reducer.cpp", "  params_.forget_shared_gradients(layer);  // packed", "  // packed",
        "Features.*"),
    "shared_gradients_of_the_last_micro_batch_alone": (
        "trainer/grad_reducer.cpp", "p->shares_grad ? p->write_owned_grad().mode : Accumulate::kOverwrite;",
        "Accumulate::kOverwrite;", "Features.*"),
    "weights_of_the_first_owner_not_taken": (
        "trainer/grad_reducer.cpp", "b.shards, b.group->rank(), Accumulate::kOverwrite);",
        "b.shards, 0, Accumulate::kOverwrite);", "*AllHaveTheWeights", "grad_reducer_test"),
    "gradients_packed_in_a_call_for_each_owner": (
        "trainer/grad_reducer.cpp", "  ops::pack_parts(ex, b.packed(dtype), b.grads, b.shards);",
        "  for (int r = 0; r < b.group->size(); ++r) ops::pack_parts(ex, b.packed(dtype), b.grads, b.shards);",
        "*InOneCall", "grad_reducer_test"),
    "parts_of_tensors_over_each_other": (
        "kernels/cpu/pack.cpp", "      at += size;\n", "", "Pack.*", "pack_test"),
    "every_block_of_a_row_from_its_beginning": (
        "kernels/cpu/pack.cpp", "move(i, begin + first - at, ", "move(i, begin, ", "Pack.*", "pack_test"),
    "what_is_left_packed_booked": (
        "kernels/ops/pack.cpp",
        "  if (except != kNoRow) elements -= static_cast<double>(packing.row_elements(except));\n", "", "*Books*",
        "pack_test"),
    "bucket_of_several_dtypes": (
        "trainer/grad_reducer.cpp", "b->group == &group && b->value_dtype == p.value.dtype &&",
        "b->group == &group &&", "Dtypes.*"),
    "gradient_of_an_fp32_router_rounded": (
        "trainer/model/param_store.h", "return spec.fp32 ? DType::kF32 : options_.grad_dtype; }",
        "return spec.name.empty() ? DType::kF32 : options_.grad_dtype; }", "Dtypes.*"),
    "moments_of_a_buffer": (
        "trainer/model/param_store.h", "return spec.trained && !frozen; }", "return !frozen; }", "Dtypes.*"),
    "gradients_ready_before_the_last_micro_batch": (
        "trainer/pipeline.cpp", "  const bool last = action.micro_batch + 1 == step.batches.rounds();",
        "  const bool last = action.micro_batch == 0;", "*"),
    "rows_of_other_ranks_not_kept": (
        "trainer/model/experts.cpp", "if (wants_rows() && (!rows.lasting || (keeps.rows && !saved.fused))) {",
        "if (wants_rows() && keeps.rows && !saved.fused) {", "*Recomputation*"),
    "hidden_rows_kept_by_the_fused_path": (
        "trainer/model/experts.cpp", "if (keeps.hidden && wants_hidden() && !saved.fused)",
        "if (keeps.hidden && wants_hidden())", "*/none", "fused_experts_test_on_gpu"),
    "shared_gate_booked_by_every_tp_rank": (
        "trainer/model/dense_ffn.cpp", "  return tp->rank() == 0 ? ex : not_booked(ex);", "  return ex;", "ModelCost.*",
        "cost_test"),
    "router_bias_of_one_ranks_counts": (
        "trainer/trainer.cpp", "s_.config, report.assigned, ", "s_.config, sums.assigned, ", "Routers.Sigmoid*"),
    "sequences_numbered_by_rank": (
        "trainer/pipeline.cpp", "    sequences = context.take(whole.data(), count);",
        "    sequences.assign(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(tokens.size()));",
        "Routers.EveryBalanceTerm"),
    "degrees_multiplied_in_64_bits": (
        "configs/run_problems.cpp", "static_cast<__int128>(p_.pp) * p_.cp * p_.tp",
        "std::int64_t{p_.pp} * p_.cp * p_.tp",
        "RunProblems.*", "run_problems_test"),
    "a_save_left_by_one_rank_alone": (
        "trainer/checkpoint.cpp", "run_agreed(world, [&] { stage(session, *staged); });", "stage(session, *staged);",
        "OneRankAlone.*", "recovery_test"),
    "held_out_data_of_every_host_its_own": (
        "trainer/same_inputs.cpp", "  require_equal(world, \"held-out data\", read.held_out);\n", "", "OneRankAlone.*",
        "recovery_test"),
    "weights_of_every_host_its_own": (
        "trainer/training_run.cpp", ".weights = model_digest_ + teacher_digest_,", ".weights = {},", "OneRankAlone.*",
        "recovery_test"),
    "configurations_of_every_host_its_own": (
        "trainer/same_inputs.cpp", "\"copies of model.path or train.teacher.model\", read.models", "\"\", \"\"",
        "OneRankAlone.*", "recovery_test"),
}
