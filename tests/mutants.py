#!/usr/bin/env python3
"""Plants one error at a time (layouts, GPU path, what is counted, families) and shows that the tests find it.

By hand, not in ctest: every mutant is built. usage: tests/mutants.py [--places] [--build DIR] [NAME ...]
The tree is copied first, so nothing here changes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: file, what stands there, what is planted, the tests that must notice (a GoogleTest filter) and, unless it is
# layout_equivalence_test with its meshes, their program (those that end in _on_gpu have the pretended GPU)
MUTANTS = {
    "kv_bias_gradient_summed_over_tp_alone": (
        "parallel/layout.cpp", "return {data * tp.count + tp.index, copies * tp.count};",
        "return {tp.index, tp.count};", "*"),
    "no_reduction_of_norm_and_router_over_tp": (
        "parallel/layout.cpp", "    if (spread.kind == OverTp::kWhole) return true;",
        "    if (spread.kind == OverTp::kWhole) return mine == theirs;", "*"),
    "shared_gate_gradient_counted_twice_over_tp": (
        "trainer/model/dense_ffn.cpp",
        "  if (gate_1D) gate_backward(ex, dx.partial_TD(), dgate_T, x_TD, saved);",
        "  if (gate_1D) gate_backward(ex, dx.partial_TD(), dgate_T, x_TD, saved);\n"
        "  if (gate_1D && tp->size() > 1) gate_backward(ex, dx.partial_TD(), dgate_T, x_TD, saved);", "*moe*"),
    "clip_norm_counts_replicas": (
        "trainer/optimizer.cpp", "  for (const OwnedSlice& s : slices_) gradients.push_back(s.grad);",
        "  for (const OwnedSlice& s : slices_) gradients.push_back(s.param->grad);", "*"),
    "loss_counted_on_every_tp_rank": (
        "trainer/model/lm_head.cpp", "    if (tp->rank() == 0) ops::sum(ex, loss_1, loss_C);",
        "    ops::sum(ex, loss_1, loss_C);", "*"),
    "balance_pool_of_one_rank": (
        "trainer/model/transformer.cpp", "LayerLoad::unpack(tokens * pool->size(), ",
        "LayerLoad::unpack(tokens, ", "*moe*"),
    "balance_pool_of_one_stage": (
        "trainer/pipeline.cpp", "f->pool = link_->receive(ex, *link_->backward, link_->next(), g_tD);",
        "link_->receive(ex, *link_->backward, link_->next(), g_tD);", "*moe*"),
    "vocabulary_shard_forgets_its_beginning": (
        "trainer/model/make_transformer.cpp", "  return {p.shard.offset[0], p.spec.shape[0]};",
        "  return {0, p.spec.shape[0]};", "*"),
    "divisor_of_this_ranks_tokens": (
        "trainer/trainer.cpp",
        "  step.loss_scale = 1.0 / static_cast<double>(run.train.global_batch * run.data.seq_len);",
        "  step.loss_scale = 1.0 / static_cast<double>(s_.batches->rounds() * s_.mesh.spec().dp * "
        "run.train.micro_batch * run.data.seq_len);", "*"),
    "one_piece_of_an_expert_computed_twice": (
        "trainer/model/expert_shares.cpp",
        "      piece_EP[static_cast<std::size_t>(e * etp + rank % etp)] = static_cast<std::int32_t>(piece++);",
        "      piece_EP[static_cast<std::size_t>(e * etp + rank % etp)] =\n"
        "          static_cast<std::int32_t>(piece++ - (rank % etp > 0 ? experts.size() : 0));", "*moe*"),
    "router_weight_of_one_piece_only": (
        "trainer/model/exchange.cpp",
        "  ops::gather_sum_rows(ex, sum_TK.reshape({T * K, 1}), rows_N1, plan.slot_TS.reshape({T * K, plan.pieces}),\n"
        "                       Accumulate::kOverwrite);",
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
    "tied_embedding_reduced_on_one_stage": (
        "parallel/layout.cpp", "    if (p.tied && is_end(rank)) return is_end(r);", "", "*tied*"),
    "shared_gradients_not_cleared_between_blocks": (
        "trainer/grad_reducer.cpp", "  params_.zero_shared_gradients(ex);  // packed", "  // packed", "Features.*"),
    "shared_gradients_of_the_last_micro_batch_alone": (
        "trainer/grad_reducer.cpp", "p.shares_grad ? ops::add(ex, p.owned_grad, p.owned_grad, sum)",
        "p.shares_grad ? ops::cast(ex, p.owned_grad, sum)", "Features.*"),
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
        "kernels/core/exec.h", "      ledger->again(op, flops, work);", "", "*Again*", "core_test"),
    "fused_products_are_no_model_work": (
        "kernels/ops/experts.cpp",
        "          bytes_of(out_RN), Work::kModel);", "          bytes_of(out_RN));", "*SameModelWork",
        "expert_ffn_test_on_gpu"),
    "fused_experts_of_any_width": (
        "kernels/cuda/choose/expert_ffn.cpp", "s.width % kColumns != 0", "s.width % 8 != 0", "*SaysWhyNot",
        "choose_test"),
    "rows_of_other_ranks_not_kept": (
        "trainer/model/experts.cpp", "if (!rows.lasting || (keeps.rows && !saved.fused)) {",
        "if (keeps.rows && !saved.fused) {", "FusedExpertsOfRanks.*", "fused_experts_test_on_gpu"),
    "hidden_rows_kept_by_the_fused_path": (
        "trainer/model/experts.cpp", "if (keeps.hidden && !saved.fused)", "if (keeps.hidden)", "*/none",
        "fused_experts_test_on_gpu"),
    "experts_in_any_order": (
        "kernels/cuda/portable/expert_index.cu", "  ranking[place] = e;", "  ranking[place] = e / 2;",
        "*WeightGradients*", "experts_test_on_gpu"),
    "parts_of_weight_gradients_left_out": (
        "kernels/cuda/portable/expert_index.cu", "for (int p = 0; p < each; ++p)", "for (int p = 1; p < each; ++p)",
        "*DHidden*", "experts_test_on_gpu"),
    "shared_gate_booked_by_every_tp_rank": (
        "trainer/model/dense_ffn.cpp", "  return tp->rank() == 0 ? ex : not_booked(ex);", "  return ex;", "ModelCost.*",
        "cost_test"),
    "shared_gate_is_no_work_of_the_model": (
        "kernels/ops/activation.cpp", "          bytes_of(gate_T), Work::kModel);", "          bytes_of(gate_T));",
        "ModelCost.*", "cost_test"),
    "work_done_again_is_the_models": (
        "kernels/core/exec.h", "      ledger->again(op, flops, work);",
        "      ledger->book(op, flops, bytes_read, bytes_written, work);", "ModelCost.*", "cost_test"),
    "rows_of_the_embedding_are_multiplied": (
        "trainer/cost/model_cost.cpp", " && (p.role != Role::kEmbedding || p.tied);", ";", "ModelCost.*", "cost_test"),
    "all_experts_are_read_for_a_token": (
        "trainer/cost/roofline.cpp", "m.routed_bytes * expected_experts(m, tokens) / m.experts", "m.routed_bytes",
        "Roofline.*", "cost_test"),
    "source_charged_twice": (
        "trainer/cost/claim.cpp", "left = cost - charged,", "left = cost - 2 * charged,", "Claim.*", "cost_test"),
    "flops_of_one_rank_for_all": (
        "trainer/cost/run_curve.cpp", """number(line, "flops", where) * number(line, "ranks", where)""",
        """number(line, "flops", where)""", "RunCurves.*", "cost_test"),
    "router_bias_not_in_the_choice": (
        "kernels/cpu/sigmoid_routing.cpp", "return bias == nullptr ? scores[e] : scores[e] + bias[e]; });",
        "return scores[e] + (e < 0 ? bias[e] : 0.0f); });", "Routers.Sigmoid*"),
    "router_bias_in_the_weight": (
        "kernels/cpu/sigmoid_routing.cpp", "chosen += weight[j] = scores[top.index[j]];", "chosen += weight[j];",
        "SigmoidRouting.AsTransformersDots1", "sigmoid_routing_test"),
    "router_bias_of_one_ranks_counts": (
        "trainer/trainer.cpp", "s_.config, report.assigned, ", "s_.config, sums.assigned, ", "Routers.Sigmoid*"),
    "sequences_numbered_by_rank": (
        "trainer/pipeline.cpp", "    sequences = context.take(whole.data(), count);",
        "    sequences.assign(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(tokens.size()));",
        "Routers.EveryBalanceTerm"),
    "router_bias_moves_the_other_way": (
        "trainer/router_buffers.cpp", "lacks > 0 ? rate : lacks < 0 ? -rate : 0.0",
        "lacks > 0 ? -rate : lacks < 0 ? rate : 0.0",
        "RouterBiases.*", "layout_resume_test"),
    "mixtral_gate_and_up_exchanged": (
        "configs/families/mixtral.cpp",
        """experts.{1}.w1.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w3.weight"},""",
        """experts.{1}.w3.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w1.weight"},""",
        "*Cases*", "golden_test"),
    "mixtral_not_renormalised": (
        "configs/families/mixtral.cpp", "  c.norm_topk_prob = true;", "  c.norm_topk_prob = false;", "*Cases*",
        "golden_test"),
    "mixtral_with_biases": (
        "configs/families/mixtral.cpp", "  c.qkv_bias = false;", "  c.qkv_bias = true;", "*Cases*", "golden_test"),
    "deepseek_first_layer_a_mixture": (
        "configs/families/deepseek.cpp", '  json.set("first_k_dense_replace", c.first_k_dense_replace);',
        '  json.set("first_k_dense_replace", 0);', "FamilyTensors.*", "hf_model_test"),
    "deepseek_shared_expert_behind_a_gate": (
        "configs/families/experts.cpp", "  c.shared_expert_gate = false;", "  c.shared_expert_gate = true;", "*Cases*",
        "golden_test"),
    "deepseek_one_shared_expert_instead_of_two": (
        "configs/families/experts.cpp", "  c.shared_expert_intermediate_size = shared * c.moe_intermediate_size;",
        "  c.shared_expert_intermediate_size = std::min<std::int64_t>(shared, 1) * c.moe_intermediate_size;",
        "*Deepseek*", "moe_families_test"),
    "auto_asks_nobody_what_it_carries": (
        "configs/families/mixture_choice.cpp", "    if (lacking.none()) return {family, \"\"};\n    tried",
        "    return {family, \"\"};\n    tried", "*", "mixture_choice_test"),
    "dense_layers_in_front_count_as_between": (
        "configs/families/traits.cpp", "first + c.num_moe_layers() < c.num_hidden_layers", "first > 0", "*",
        "mixture_choice_test"),
    "kept_layers_get_the_shared_width": (
        "configs/families/qwen2_moe.cpp", "  const bool all = c.num_moe_layers() == c.num_hidden_layers;",
        "  const bool all = true;", "*", "mixture_choice_test"),
    "shared_expert_doubled_without_a_gate": (
        "upcycle/scale.cpp", "value_or(gate ? 2.0 : 1.0)", "value_or(2.0)", "*", "mixture_families_test"),
    "every_n_begins_at_layer_0": (
        "configs/layer_choice.cpp", "(layer + 1) % choice.count == 0", "layer % choice.count == 0",
        "*", "upcycle_config_test"),
    "factor_of_the_weights_left_out_of_backward": (
        "trainer/model/scaled_router.cpp",
        "    router_->backward(ex, dx_TD, scaled(ex, dweight_TK, *ex.scratch), balance, saved);",
        "    router_->backward(ex, dx_TD, dweight_TK, balance, saved);", "*Scaled*", "layer_gradient_test"),
    "factor_of_the_weights_squared": (
        "trainer/model/scaled_router.cpp", "    ops::scale(ex, out_TK, factor_);",
        "    ops::scale(ex, out_TK, factor_ * factor_);", "*Factor*", "layer_gradient_test"),
    "dots1_scores_by_a_softmax": (
        "configs/families/dots1.cpp", "  c.router.score = RouterScore::kSigmoid;\n  c.router_bias",
        "  c.router.score = RouterScore::kSoftmax;\n  c.router_bias", "*Cases*", "golden_test"),
    "dots1_without_its_biases": (
        "configs/families/dots1.cpp", "  c.router_bias = true;", "  c.router_bias = false;", "*Cases*", "golden_test"),
    "dots1_opens_every_group": (
        "configs/families/dots1.cpp", '  f.integer("topk_group", c.router.group_topk, 1, kMostGroups, false);',
        "  c.router.group_topk = c.router.groups;", "*Cases*", "golden_test"),
    "dots1_factor_not_read": (
        "configs/families/dots1.cpp", '  f.number("routed_scaling_factor", c.router.scale, false, false);\n', "",
        "*Cases*", "golden_test"),
    "dots1_window_of_a_file_without_a_word": (
        "configs/families/dots1.cpp", '  json.set_null("sliding_window");  // without the key there would be one\n',
        '  json.erase("sliding_window");\n', "*Dots1*", "moe_families_test"),
    "biases_of_routers_rounded_to_bf16": (
        "data/hf_names.cpp", "  tensor.fp32 = p.fp32;\n", "", "*Fp32*", "hf_model_test"),
    "sigmoids_scaled_as_a_softmax": (
        "upcycle/scale.cpp", "score == RouterScore::kSigmoid ? 2 : config.target.num_experts",
        "config.target.num_experts", "Scale.*", "unit_map_test"),
    "softmax_exported_as_sigmoid": (
        "configs/router_record.cpp", "  const Traits lost = without_words(c).without({Trait::kChoiceBias});",
        "  const Traits lost = without_words(c).without({Trait::kChoiceBias, Trait::kSoftmaxScores});",
        "FamilyTensors.*", "hf_model_test"),
    "keys_before_queries_in_one_tensor": (
        "configs/families/dbrx.cpp", """    {Role::kQuery, Half::kWhole, kQkv},
    {Role::kKey, Half::kWhole, kQkv},""", """    {Role::kKey, Half::kWhole, kQkv},
    {Role::kQuery, Half::kWhole, kQkv},""", "*Cases*", "golden_test"),
    "down_projections_not_transposed": (
        "configs/families/dbrx.cpp", '"transformer.blocks.{0}.ffn.experts.mlp.w2", true}',
        '"transformer.blocks.{0}.ffn.experts.mlp.w2"}', "FamilyTensors.*", "hf_model_test"),
    "transposed_in_the_reader_alone": (
        "data/hf_writer.cpp", "  if (!t.transposed) return", "  return", "FamilyTensors.*", "hf_model_test"),
    "limit_of_another_dbrx": (
        "configs/families/dbrx.cpp", '  f.number("clip_qkv", c.clip_qkv, true, false);', "  c.clip_qkv = 8;",
        "*Cases*", "golden_test"),
    "limit_without_a_mask": (
        "trainer/model/attention_layer.cpp",
        "  if (clip > 0) ops::clip_backward(ex, dqkv_TH, saved.before_TH, clip);\n", "", "*Limited*",
        "layer_gradient_test"),
    "limit_after_the_rotation": (
        "trainer/model/attention_layer.cpp",
        "  if (clip > 0) ops::clip(ex, saved.qkv_TH, saved.before_TH, clip);\n"
        "  ops::rope(ex, saved.qkv_TH, places.positions_T, at, rope_theta, /*inverse=*/false);",
        "  ops::rope(ex, saved.qkv_TH, places.positions_T, at, rope_theta, /*inverse=*/false);\n"
        "  if (clip > 0) ops::clip(ex, saved.qkv_TH, saved.before_TH, clip);", "*Cases*", "golden_test"),
    "mean_left_in_the_gradient": (
        "kernels/cpu/layer_norm.cpp", " - g_mean - n_i * gn_mean)", " - n_i * gn_mean)", "*", "layer_norm_test"),
    "epsilon_of_other_norms": (
        "configs/families/dbrx.cpp", "constexpr double kEps = 1e-5;", "constexpr double kEps = 1e-6;",
        "*Dbrx*", "moe_families_test"),
}


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def parse_arguments(description, mutants, *options):
    """What both scripts of mutants are asked; `options` are those of one alone, as (name, words for argparse)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*mutants, []], metavar="NAME")
    parser.add_argument("--places", action="store_true", help="only look for the places; a test does this")
    for option, words in options:
        parser.add_argument(option, **words)
    args = parser.parse_args()
    args.names = args.names or list(mutants)
    return args


def check_places(mutants, names):
    """Sources move on; a mutant that finds its place no more, or twice, must say so before the hour of builds."""
    lost = []
    for name in names:
        path, old = mutants[name][:2]
        count = (ROOT / path).read_text(encoding="utf-8").count(old)
        if count != 1:
            lost.append(f"{name}: {path} has {count} times: {old}")
    if lost:
        raise SystemExit("\n".join(lost))


def copy_tree(tree):
    """Touches only what differs: the mutant that an earlier run was cut off in is younger than its source."""
    files = set(filter(None, run(["git", "-C", ROOT, "ls-files", "-z"]).stdout.split("\0")))
    for old in [p for p in tree.rglob("*") if p.is_file() and str(p.relative_to(tree)) not in files]:
        old.unlink()
    for name in files:
        content = (ROOT / name).read_bytes()
        if not (tree / name).exists() or (tree / name).read_bytes() != content:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)
        shutil.copymode(ROOT / name, tree / name)


LAYOUTS = "layout_equivalence_test"


def build(tree, out, *programs):
    return run(["cmake", "--build", out, "--target", *programs, "-j2"], cwd=tree)


def caught(out, tests, program):
    """The tests fail, or the program stops with an error: both are a catch; a time-out is a hang, and none."""
    began = time.monotonic()
    device = {"UPMOE_TEST_DEVICE": "cuda"} if program.endswith("_on_gpu") else {}
    done = run([out / "bin" / program, f"--gtest_filter={tests}"], timeout=600,
               env=os.environ | {"OMP_NUM_THREADS": "1"} | device)
    failed = sum(line.startswith("[  FAILED  ]") and "(" in line for line in done.stdout.splitlines())
    return done.returncode != 0, failed, time.monotonic() - began


def main():
    args = parse_arguments(__doc__, MUTANTS, ("--build", {"type": Path, "default": ROOT / "build" / "mutants"}))
    check_places(MUTANTS, args.names)
    if args.places:
        return
    tree, out = args.build / "tree", args.build / "out"
    copy_tree(tree)
    done = run(["cmake", "-S", tree, "-B", out, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                f"-DUPMOE_PYTHON={sys.executable}"])
    programs = sorted({LAYOUTS, *(p for name in args.names for p in MUTANTS[name][4:])})
    if done.returncode == 0:
        done = build(tree, out, *programs)
    if done.returncode != 0:
        raise SystemExit(f"the tree without mutants does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    for program in programs:
        if caught(out, "*", program)[0]:
            raise SystemExit(f"{program} fails without any mutant")
    survivors = []
    for name in args.names:
        path, old, new, tests, program = (*MUTANTS[name], LAYOUTS)[:5]
        source = (tree / path).read_text(encoding="utf-8")
        (tree / path).write_text(source.replace(old, new), encoding="utf-8")
        done = build(tree, out, program)
        if done.returncode != 0:
            raise SystemExit(f"{name} does not build:\n{done.stdout[-3000:]}")
        found, failed, seconds = caught(out, tests, program)
        print(f"{name:50}{'caught' if found else 'SURVIVED':10}{failed:5} tests failed{seconds:7.1f} s", flush=True)
        if not found:
            survivors.append(name)
        (tree / path).write_text(source, encoding="utf-8")
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
