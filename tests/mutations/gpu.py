"""Errors in what runs on a GPU; see tests/mutants.py."""

CLUSTER_LOSS, PORTABLE_LOSS = "kernels/cuda/sm90/cross_entropy_row.cuh", "kernels/cuda/portable/loss.cu"
LOSS_ON_GPU = "loss_test_on_gpu"
TOLD_SHARES = """  if (threadIdx.x < static_cast<unsigned>(r.blocks)) {
    store_remote(&s.most[rank], threadIdx.x, static_cast<double>(largest));
    store_remote(&s.sum[rank], threadIdx.x, sum);
  }
  if (has_target)
    for (int b = 0; b < r.blocks; ++b)
      store_remote(&s.target, static_cast<u32>(b), static_cast<double>(at_target));
  __syncwarp();
"""

MUTANTS = {
    "a_channel_goes_while_it_is_called": (
        "parallel/nccl_channel.cpp", "calling(calling_, std::try_to_lock); calling.owns_lock())",
        "calling(calling_, std::try_to_lock); true)", "Nccl.NoChannel*", "nccl_test"),
    "nccl_operations_begin_in_any_order": (
        "parallel/nccl_channel.cpp", 'setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0)',
        'setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0", 0)', "*OneOrder", "nccl_test"),
    "log_sum_exps_of_other_heads_in_a_slice": (
        "kernels/cuda/library/cudnn_sdpa.cpp", "(slice.first_sequence * s.heads + first_head()) * s.seq_len",
        "(slice.first_sequence * s.heads) * s.seq_len", "*Slices", "cudnn_test_on_gpu"),
    "attention_backward_in_one_go": (
        "kernels/cuda/library/cudnn_sdpa.cpp", "if (!deterministic) return", "if (s.heads > 0) return", "*Slices",
        "cudnn_test_on_gpu"),
    "arenas_grow_by_an_eighth": (
        "kernels/cuda/runtime/memory.cu", "std::min(committed_ / 8, kMostAhead)", "committed_ / 8", "*GrowsByLittle",
        "gpu_test_on_gpu"),
    "code_of_one_architecture_for_its_family": (
        "kernels/cuda/runtime/device.cu", "(alone ? gpu_minor == minor : gpu_minor >= minor)", "gpu_minor >= minor",
        "*ThatAlone", "gpu_test_on_gpu"),
    "pointers_in_structs_unseen": (
        "tests/support/fake_cuda/cuda_runtime.h", "    add_pointers_in(&argument, sizeof argument, reads);", "",
        "*PointersInStructs", "stream_order_test_on_gpu"),
    "what_is_done_again_untold": (
        "kernels/core/exec.h", "        return ledger->again(op, flops, bytes_read, bytes_written, work);",
        "        return;", "*Again*", "core_test"),
    "fused_products_are_no_model_work": (
        "kernels/ops/experts.cpp",
        "          bytes_of(out_RN), Work::kGroupedProducts);", "          bytes_of(out_RN));", "*SameModelWork",
        "expert_ffn_test_on_gpu"),
    "fused_experts_of_any_width": (
        "kernels/ops/expert_shape.h", "s.width % kExpertColumns != 0", "s.width % 8 != 0", "*SaysWhyNot",
        "choose_test"),
    "experts_in_any_order": (
        "kernels/cuda/portable/expert_index.cu", "  ranking[place] = e;", "  ranking[place] = e / 2;",
        "*WeightGradients*", "experts_test_on_gpu"),
    "parts_of_weight_gradients_left_out": (
        "kernels/cuda/portable/expert_index.cu", "for (int p = 0; p < each; ++p)", "for (int p = 1; p < each; ++p)",
        "*DHidden*", "experts_test_on_gpu"),
    "shared_gate_is_no_work_of_the_model": (
        "kernels/ops/activation.cpp", "          bytes_of(gate_T), Work::kRowSums);", "          bytes_of(gate_T));",
        "ModelCost.*", "cost_test"),
    "work_done_again_is_the_models": (
        "kernels/core/exec.h", "        return ledger->again(op, flops, bytes_read, bytes_written, work);",
        "        return ledger->book(op, flops, bytes_read, bytes_written, work);", "ModelCost.*", "cost_test"),
    "branch_of_a_block_left_out": (
        "trainer/model/norm.cpp",
        "residual.sum_TD, saved.rstd_T, residual.branch_TD, residual.x_TD,",
        "residual.sum_TD, saved.rstd_T, residual.x_TD, residual.x_TD,", "*"),
    "last_branch_of_a_stage_not_added": (
        "trainer/model/transformer.cpp", "    saved.output_tD = summed(ex, x);", "    saved.output_tD = x.x_TD;", "*"),
    "norm_of_the_sum_before_it_is_rounded": (
        "kernels/cuda/portable/norm.cu", "v[j] = to_float(from_float<T>(v[j] + r[j]));", "v[j] = v[j] + r[j];",
        "*AddForwardIsTheTwoPasses*", "norm_test_on_gpu"),
    "bias_gradient_of_rows_before_they_are_rounded": (
        "kernels/cuda/portable/rope.cu",
        "          a[j] = to_float(from_float<T>(a[j]));  // the sum is of what is stored\n", "",
        "*BackwardSumsTheBiasGradient*", "attention_test_on_gpu"),
    "bias_gradient_of_rows_not_turned_back": (
        "kernels/cpu/rope.cpp", "rotate_token(row, row_of(t), padded, shape, -1.0f);",
        "rotate_token(row, row_of(t), padded, shape, 1.0f);", "*BackwardSumsTheBiasGradient*", "attention_test"),
    "bias_gradient_before_the_norms_of_heads": (
        "trainer/model/attention_layer.cpp", "  if (!head_norms && clip == 0 && qkv.bias_N",
        "  if (clip == 0 && qkv.bias_N", "*NormsOfHeads", "layer_gradient_test"),
    "gates_share_of_the_gradient_left_to_nobody": (
        "trainer/model/dense_ffn.cpp", "gate_1D && left != nullptr && tp->size() == 1;",
        "gate_1D && tp->size() == 1;\n  GateGradient nobodys;\n  if (left == nullptr) left = &nobodys;",
        "*SharedExpert", "layer_gradient_test"),
    "gates_share_under_tp_left_to_one_rank": (
        "trainer/model/dense_ffn.cpp", "gate_1D && left != nullptr && tp->size() == 1;",
        "gate_1D && left != nullptr && tp->rank() == 0;", "*moe*"),
    "residual_left_out_of_a_mixtures_sum": (
        "trainer/model/moe_layer.cpp", "  SumOnto onto{.residual_TD = residual_TD};",
        "  SumOnto onto{.residual_TD = residual_TD.given() ? ConstTensorView{} : residual_TD};", "*moe*"),
    "residual_added_before_the_sum_is_rounded": (
        "kernels/cuda/portable/routing_sort.cu", "sum[n] = to_float(from_float<Y>(sum[n])) + residual[n];",
        "sum[n] += residual[n];", "*BaseAndResidual*", "gather_sum_test_on_gpu"),
    "gates_share_not_rounded_by_itself": (
        "kernels/cpu/routing.cpp", "before = rounded_to<Y>(before + dlogit * load(w + i, lanes));",
        "before += dlogit * load(w + i, lanes);", "*BaseAndGate*", "gather_sum_test"),
    "norms_output_of_another_block": (
        "trainer/model/block.cpp", "  if (shares_norms()) norm2.again(again, saved.normed2_TD, saved.norm2);\n", "",
        "*RecomputationIsTheSame*"),
    "norms_output_of_the_other_norm": (
        "trainer/model/block.cpp", "  if (shares_norms()) norm1.again(again, saved.normed1_TD, saved.norm1);\n", "",
        "*RecomputationIsTheSame*"),
    "norms_outputs_kept_all_the_same": (
        "trainer/model/block.cpp", "shares_norms() ? out.normed_TD.rows(0, attended_TD.rows()) :", "false ? out.y_TD :",
        "RecomputeMemory.*", "recompute_memory_test"),
    "norms_outputs_kept_under_elementwise": (
        "trainer/model/block.h", " || recompute == Recompute::kElementwise", "", "RecomputeMemory.*",
        "recompute_memory_test"),
    "algorithms_of_another_device": (
        "kernels/core/product_algorithms.cpp", "algorithms.tables.find(library);",
        "library.version > 0 ? algorithms.tables.begin() : algorithms.tables.end();",
        "ProductAlgorithms.Chooses*", "product_algorithms_test"),
    "algorithm_of_the_table_is_not_taken": (
        "kernels/cuda/library/cublaslt.cu", "  plan.algorithm = found[static_cast<std::size_t>(place)].algo;",
        "  plan.algorithm = found[0].algo;", "CublasLtTable.*", "cublaslt_test_on_gpu"),
    "plan_of_another_table": (
        "kernels/cuda/library/cublaslt.cu", "                place};", "                0};", "CublasLtTable.*",
        "cublaslt_test_on_gpu"),
    "algorithm_that_is_not_offered": (
        "kernels/cuda/library/cublaslt.cu", "  if (place >= count)\n", "  if (place >= kOfferedAlgorithms)\n",
        "CublasLtTable.*", "cublaslt_test_on_gpu"),
    "second_line_for_a_product_is_ignored": (
        "configs/product_algorithms.cpp", "wrong.empty() && !table.emplace(shape, line.algorithm).second",
        "!table.emplace(shape, line.algorithm).second && !wrong.empty()", "*Damaged*", "product_algorithms_test"),
    "variant_of_another_device": (
        "kernels/core/expert_variants.cpp", "variants.tables.find(device);", "variants.tables.begin();",
        "ExpertVariants.Choose*", "expert_variants_test"),
    "variant_of_far_fewer_rows": (
        "kernels/core/expert_variants.cpp", "times(from.rows) <= 2 && ", "", "ExpertVariants.Choose*",
        "expert_variants_test"),
    "variant_that_a_width_does_not_have": (
        "kernels/core/expert_variants.cpp", "!of_weights || s.width", "true || s.width", "ExpertVariants.*",
        "expert_variants_test"),
    "variant_that_is_not_compiled_is_read": (
        "configs/expert_variants.cpp", "if (!why.empty()) wrong.add", "if (why == line.order) wrong.add",
        "ExpertVariants.ADamaged*", "expert_variants_test"),
    "second_line_for_a_kernel_is_ignored": (
        "configs/expert_variants.cpp", "wrong.empty() && !table.emplace(line.shape, line.variant).second",
        "!table.emplace(line.shape, line.variant).second && !wrong.empty()", "ExpertVariants.ADamaged*",
        "expert_variants_test"),
    "experts_without_their_table": (
        "kernels/cuda/experts.cpp", "ex.expert_variants}", "nullptr}", "*VariantsOfATable*", "experts_test_on_gpu"),
    "first_gradient_of_a_step_added": (
        "trainer/model/param.h", "return {grad, first ? Accumulate::kOverwrite : Accumulate::kAdd};",
        "return {grad, Accumulate::kAdd};", "GradientMemory.*"),
    "every_gradient_of_a_step_overwrites": (
        "trainer/model/param.h", "return {grad, first ? Accumulate::kOverwrite : Accumulate::kAdd};",
        "return {grad, Accumulate::kOverwrite};", "GradientMemory.*:Features.*"),
    "first_sum_over_ranks_added": (
        "trainer/model/param_store.h", "return {owned_grad, first ? Accumulate::kOverwrite : Accumulate::kAdd};",
        "return {owned_grad, Accumulate::kAdd};", "GradientMemory.*"),
    "gradients_without_a_writer_left_as_they_were": (
        "trainer/grad_reducer.cpp", "  params_.zero_unwritten_gradients(ex, layer);\n", "", "GradientMemory.*"),
    "gradients_written_in_the_step_before": (
        "trainer/trainer.cpp", "  s_.params.forget_gradients();\n", "", "*"),
    "last_of_a_run_not_packed": (
        "kernels/cuda/portable/pack.cu", "int i = head + whole * N + thread; i < n;",
        "int i = head + whole * N + thread; i < head;", "Pack.*", "pack_test_on_gpu"),
    "packs_of_tensors_that_begin_between_two": (
        "kernels/cuda/portable/pack.cu", "aligned == until_aligned<N>(in) && aligned < n ? aligned : n",
        "aligned < n ? n % N : n", "Pack.*", "pack_test_on_gpu"),
    "every_row_taken_apart_as_the_first": (
        "kernels/cuda/portable/pack.cu", "begin[i] = balanced_begin(tensors.elements[i], tensors.parts, row);",
        "begin[i] = balanced_begin(tensors.elements[i], tensors.parts, 0);", "Pack.*", "pack_test_on_gpu"),
    "squares_of_one_launch_alone": (
        "kernels/cuda/portable/pointwise.cu", "if (tensors.count == kSummed) flush();",
        "if (tensors.count == kSummed) break;", "*ManyTensors", "pointwise_test_on_gpu"),
    "sums_of_a_tensor_over_anothers": (
        "kernels/cuda/portable/pointwise.cu", "tensors.partial[tensors.count] = first;",
        "tensors.partial[tensors.count] = 0;", "*Tensors", "pointwise_test_on_gpu"),
    "sums_of_the_same_pack_again": (
        "kernels/cuda/portable/pointwise.cu", "(x + i + p * kStride);", "(x + i);", "*WhereElementsLie",
        "pointwise_test_on_gpu"),
    "shares_joined_without_their_largest": (
        CLUSTER_LOSS, "expf(static_cast<float>(s.most[b] - all.largest))", "1.0f", "*CrossEntropy*", LOSS_ON_GPU),
    "gradient_of_a_share_relative_to_itself": (
        CLUSTER_LOSS, "static_cast<double>(expf(largest - whole)) / all.sum", "1.0 / all.sum", "*CrossEntropy*",
        LOSS_ON_GPU),
    "last_share_as_long_as_the_others": (
        CLUSTER_LOSS, "n = max(0, min(share, r.columns - begin))", "n = share", "*CrossEntropy*", LOSS_ON_GPU),
    "target_told_to_its_own_block": (
        CLUSTER_LOSS, "store_remote(&s.target, static_cast<u32>(b),", "store_remote(&s.target, cluster_rank(),",
        "*TargetsAndLargest*", LOSS_ON_GPU),
    "shares_read_before_they_are_told": (
        CLUSTER_LOSS, "  cluster_sync();  // nobody writes", "  // nobody writes", "*CrossEntropy*", LOSS_ON_GPU),
    "told_to_blocks_that_have_not_begun": (
        CLUSTER_LOSS, "  cluster_wait();\n" + TOLD_SHARES, TOLD_SHARES + "  cluster_wait();\n", "*TargetsAndLargest*",
        LOSS_ON_GPU),
    "a_cluster_that_nobody_waits_for": (
        CLUSTER_LOSS, "  cluster_wait();\n", "", "*TargetsAndLargest*", LOSS_ON_GPU),
    "sums_told_to_their_own_block": (
        CLUSTER_LOSS, "store_remote(&s.sum[rank], threadIdx.x,", "store_remote(&s.sum[rank], cluster_rank(),",
        "*CrossEntropy*", LOSS_ON_GPU),
    "sums_of_all_blocks_in_one_place": (
        CLUSTER_LOSS, "store_remote(&s.sum[rank], threadIdx.x,", "store_remote(&s.sum[0], threadIdx.x,",
        "*CrossEntropy*", LOSS_ON_GPU),
    "largest_logits_of_all_blocks_in_one_place": (
        CLUSTER_LOSS, "store_remote(&s.most[rank], threadIdx.x,", "store_remote(&s.most[0], threadIdx.x,",
        "*CrossEntropy*", LOSS_ON_GPU),
    "first_share_left_out_of_the_sum": (
        CLUSTER_LOSS, "b = 0; b < blocks; ++b)\n    all.sum +=", "b = 1; b < blocks; ++b)\n    all.sum +=",
        "*CrossEntropy*", LOSS_ON_GPU),
    "last_share_left_out_of_the_sum": (
        CLUSTER_LOSS, "b < blocks; ++b)\n    all.sum +=", "b + 1 < blocks; ++b)\n    all.sum +=",
        "*TargetsAndLargest*", LOSS_ON_GPU),
    "largest_logit_of_all_shares_but_the_last": (
        CLUSTER_LOSS, "b < blocks; ++b) all.largest", "b + 1 < blocks; ++b) all.largest",
        "*TargetsAndLargest*", LOSS_ON_GPU),
    "sum_of_one_warp_of_a_block": (
        CLUSTER_LOSS, "block_sum(static_cast<double>(exponentials<T>(kept, n, largest)), s.warp_sum)",
        "warp_sum(static_cast<double>(exponentials<T>(kept, n, largest)))", "*CrossEntropy*", LOSS_ON_GPU),
    "largest_logit_of_one_warp_of_a_block": (
        CLUSTER_LOSS, "block_max(most, s.warp_most)", "warp_max(most)", "*CrossEntropy*", LOSS_ON_GPU),
    "packs_that_no_share_has": (
        CLUSTER_LOSS, "(columns / kRowPack + blocks - 1) / blocks", "columns / kRowPack / blocks",
        "*TargetsAndLargest*", LOSS_ON_GPU),
    "gradient_of_the_target_written_over": (
        CLUSTER_LOSS, "  if (has_target)\n    dlogits", "  if (has_target && n == 0)\n    dlogits",
        "*CrossEntropy*", LOSS_ON_GPU),
    "loss_of_an_ignored_row_left_as_it_was": (
        CLUSTER_LOSS, "    if (speaks) loss[row] = 0;\n", "", "*CrossEntropy*", LOSS_ON_GPU),
    "no_number_where_a_share_is_of_nobody": (
        CLUSTER_LOSS, "  float most = kLeastLogit;", "  float most = -INFINITY;", "*LogitsOfNobody*", LOSS_ON_GPU),
    "no_number_where_a_threads_first_logits_are_of_nobody": (
        PORTABLE_LOSS, "  float largest = kLeastLogit, sum = 0;", "  float largest = -INFINITY, sum = 0;",
        "*LogitsOfNobody*", LOSS_ON_GPU),
    "sum_of_a_thread_not_scaled_when_its_largest_grows": (
        PORTABLE_LOSS, "      sum *= expf(largest - most);\n", "", "*CrossEntropy*", LOSS_ON_GPU),
    "sums_of_threads_joined_without_their_largest": (
        PORTABLE_LOSS, "static_cast<double>(expf(largest - all.largest))", "1.0", "*CrossEntropy*", LOSS_ON_GPU),
    "sums_of_ranks_joined_without_their_largest": (
        PORTABLE_LOSS, "    sum += s[1] * exp(s[0] - largest);", "    sum += s[1];",
        "*DividedVocabulary*", LOSS_ON_GPU),
    "target_of_the_block_that_kept_its_exponential": (
        CLUSTER_LOSS, "expf(at_target - whole)", "expf(kept[at] - whole)", "*CrossEntropy*", LOSS_ON_GPU),
    "ignored_rows_keep_their_gradient": (
        CLUSTER_LOSS, "    return store_zeros(dlogits + first, n);", "    return;", "*CrossEntropy*", LOSS_ON_GPU),
    "targets_that_are_none_unreported": (
        "kernels/cuda/loss.cpp", "  portable::check_targets(ex, targets_C, columns);\n", "", "*ReportsTargets*",
        "loss_kernels_test_on_gpu"),
    "clusters_of_half_the_blocks": (
        "kernels/cuda/choose/cross_entropy.cpp", "kTwoBlocksBytes = 112 << 10", "kTwoBlocksBytes = 224 << 10",
        "ChooseCrossEntropy.*", "choose_test"),
    "sum_of_a_row_not_scaled_when_its_largest_grows": (
        "kernels/cpu/loss.cpp",
        "      row.sum *= std::exp(static_cast<double>(row.largest) - static_cast<double>(most));\n", "",
        "CrossEntropy*", "loss_test"),
    "parts_of_a_row_that_are_no_numbers_passed_over": (
        "kernels/cpu/loss.cpp", "    row.sum += sum_exp(x + begin,", "    if (!none) row.sum += sum_exp(x + begin,",
        "CrossEntropy*", "loss_test"),
    "weights_and_their_moments_share_chance": (
        "kernels/ops/moment_codes.h", "  return i % 2 == 0 ? word : word << 16 | word >> 16;",
        "  return i % 2 == 0 ? word : (word >> 16) * 0x10001u;", "MomentCodes.*", "adamw8bit_test"),
    "blocks_at_the_place_of_the_first": (
        "kernels/cuda/portable/adamw8bit.cu", "__shfl_sync(kAllLanes, mine, b)", "__shfl_sync(kAllLanes, mine, 0)",
        "*TheseBits*", "adamw8bit_test_on_gpu"),
    "last_step_of_a_root_left_out": (
        "kernels/ops/newton.h", "  return std::fma(std::fma(-root, root, x), 0.5f * y, root);", "  return root;",
        "Newton.*", "newton_test"),
    "experts_without_rows_keep_their_gradient": (
        "kernels/cuda/grouped_gemm.cpp",
        "  if (mode == Accumulate::kOverwrite)\n    for (std::size_t e = 0;",
        "  if (d.rows < 0)\n    for (std::size_t e = 0;",
        "*Overwrite*", "expert_ffn_test_on_gpu"),
    "fused_experts_wait_for_offsets": (
        "trainer/model/moe_layer.cpp", "  const bool one_by_one = !experts.fuses(ex);",
        "  const bool one_by_one = true;", "*mixture", "host_waits_test_on_gpu"),
    "loss_of_each_micro_batch_is_read": (
        "trainer/pipeline.cpp", "  f->all_2E = f->pool_2E;\n",
        "  f->all_2E = f->pool_2E;\n  read_totals(ex, totals);\n", "*dense", "host_waits_test_on_gpu"),
    "counts_are_read_before_they_land": (
        "kernels/ops/transfer.cpp", "  if (there_ != nullptr) there_->wait();\n", "", "*Lands*",
        "transfer_test_on_gpu"),
    "fused_rows_arrive_in_scratch": (
        "trainer/model/moe_layer.cpp", "one_by_one ? *ex.scratch : keep)", "*ex.scratch)", "FusedExpertsOfRanks.*",
        "fused_experts_test_on_gpu"),
    "rehearsal_of_streams_alone": (
        "kernels/ops/experts.cpp",
        "    return ex.experts == ExpertsPath::kFused && shape.experts > 0 && why_not_fused(shape).empty();",
        "    return false;", "*none", "fused_experts_test_on_gpu"),
    "documents_by_the_offsets_of_out": (
        "kernels/cuda/library/cudnn_sdpa.cpp", "memory[kQkvOffset] = place(table.qkv_offset_b1);",
        "memory[kQkvOffset] = place(table.out_offset_b1);", "*CudnnDocuments*", "cudnn_test_on_gpu"),
    "documents_as_long_as_their_slice": (
        "kernels/cuda/attention.cpp", "    size[i] = i < documents ? slice.size[i] : 0;",
        "    size[i] = i < documents ? static_cast<std::int32_t>(slice.length) : 0;", "*CudnnDocuments*",
        "cudnn_test_on_gpu"),
    "log_sum_exp_of_the_first_heads": (
        "kernels/cuda/portable/attention.cu", "runs.all_heads + runs.first_head + head;",
        "runs.all_heads + head;", "CudnnDocumentPlans.*", "cudnn_test_on_gpu"),
    "documents_in_slices_of_any_memory": (
        "kernels/cuda/attention.cpp", "ex.deterministic ? sdpa_workspace() : 0", "0", "CudnnDocumentPlans.*",
        "cudnn_test_on_gpu"),
    "rows_laid_out_with_gaps": (
        "trainer/model/exchange.cpp", "if (!dispatch.whole() && !dispatch.gaps)", "if (!dispatch.whole())", "*",
        "exchange_test"),
    "gaps_counted_as_rows": (
        "trainer/model/token_dispatch.cpp", "if (exchange.size() == 1 && !plan.gaps) {", "if (exchange.size() == 1) {",
        "RouterGradient.*", "router_gradient_test"),
    "offsets_with_the_experts_own_rows": (
        "kernels/cuda/portable/routing_sort.cu", "for (std::int64_t i = 0; i < e; ++i) before += counts[i];",
        "for (std::int64_t i = 0; i <= e && i < experts; ++i) before += counts[i];", "*Offsets*",
        "routing_test_on_gpu"),
    "dropped_choices_left_unsaid": (
        "trainer/model/capacity_router.cpp", "return {kept_TK, all.weight_TK, true};",
        "return {kept_TK, all.weight_TK, false};", "RouterGradient.MoeWithinCapacity", "router_gradient_test"),
}
