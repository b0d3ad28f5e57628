#!/usr/bin/env python3
"""Plants one error at a time in the parallel layouts and shows that the tests find it.

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

# name: file, what stands there, what is planted, the meshes that must notice (a GoogleTest filter), and the program
# that has them, if it is another one
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


PROGRAM = "layout_equivalence_test"


def build(tree, out, program=PROGRAM):
    return run(["cmake", "--build", out, "--target", program, "-j2"], cwd=tree)


def caught(out, meshes, program=PROGRAM):
    """The tests fail, or the program stops with an error: both are a catch; a time-out is a hang, and none."""
    began = time.monotonic()
    done = run([out / "bin" / program, f"--gtest_filter={meshes}"], timeout=600,
               env=os.environ | {"OMP_NUM_THREADS": "1"})
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
    if done.returncode == 0:
        done = build(tree, out)
    if done.returncode != 0:
        raise SystemExit(f"the tree without mutants does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    if caught(out, "*")[0]:
        raise SystemExit("the tests fail without any mutant")
    survivors = []
    for name in args.names:
        path, old, new, meshes, *program = MUTANTS[name]
        source = (tree / path).read_text(encoding="utf-8")
        (tree / path).write_text(source.replace(old, new), encoding="utf-8")
        done = build(tree, out, *program)
        if done.returncode != 0:
            raise SystemExit(f"{name} does not build:\n{done.stdout[-3000:]}")
        found, failed, seconds = caught(out, meshes, *program)
        print(f"{name:50}{'caught' if found else 'SURVIVED':10}{failed:5} tests failed{seconds:7.1f} s", flush=True)
        if not found:
            survivors.append(name)
        (tree / path).write_text(source, encoding="utf-8")
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
