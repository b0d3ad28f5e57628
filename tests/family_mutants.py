#!/usr/bin/env python3
"""Plants one error at a time in what families say and what becomes of a dense model, and shows that the tests find it.

By hand, not in ctest: every mutant is built. usage: tests/family_mutants.py [--places] [--build DIR] [NAME ...]
The tree is copied first, so nothing here changes.
"""

import sys
import time
from pathlib import Path

from mutants import ROOT, check_places, copy_tree, parse_arguments, run

FAMILIES = "configs/families/"

# name: file, what stands there, what is planted, the program that must notice, its tests (a GoogleTest filter)
MUTANTS = {
    "mixtral_gate_and_up_exchanged": (
        FAMILIES + "mixtral.cpp",
        """experts.{1}.w1.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w3.weight"},""",
        """experts.{1}.w3.weight"},
    {Role::kExpertDown, Half::kWhole, "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight"},
    {Role::kExpertGateUp, Half::kUp, "model.layers.{0}.block_sparse_moe.experts.{1}.w1.weight"},""",
        "golden_test", "*Cases*"),
    "mixtral_not_renormalised": (
        FAMILIES + "mixtral.cpp", "  c.norm_topk_prob = true;", "  c.norm_topk_prob = false;", "golden_test",
        "*Cases*"),
    "mixtral_with_biases": (
        FAMILIES + "mixtral.cpp", "  c.qkv_bias = false;", "  c.qkv_bias = true;", "golden_test", "*Cases*"),
    "deepseek_first_layer_a_mixture": (
        FAMILIES + "deepseek.cpp", '  json.set("first_k_dense_replace", c.first_k_dense_replace);',
        '  json.set("first_k_dense_replace", 0);', "hf_model_test", "FamilyTensors.*"),
    "deepseek_shared_expert_behind_a_gate": (
        FAMILIES + "deepseek.cpp", "  c.shared_expert_gate = false;", "  c.shared_expert_gate = true;", "golden_test",
        "*Cases*"),
    "deepseek_one_shared_expert_instead_of_two": (
        FAMILIES + "deepseek.cpp", "  c.shared_expert_intermediate_size = shared * c.moe_intermediate_size;",
        "  c.shared_expert_intermediate_size = std::min<std::int64_t>(shared, 1) * c.moe_intermediate_size;",
        "model_config_test", "*Deepseek*"),
    "auto_asks_nobody_what_it_carries": (
        FAMILIES + "mixture_choice.cpp", "    if (lacking.none()) return {family, \"\"};\n    tried",
        "    return {family, \"\"};\n    tried", "mixture_choice_test", "*"),
    "dense_layers_in_front_count_as_between": (
        FAMILIES + "traits.cpp", "first + c.num_moe_layers() < c.num_hidden_layers", "first > 0", "mixture_choice_test",
        "*"),
    "kept_layers_get_the_shared_width": (
        FAMILIES + "qwen2_moe.cpp", "  const bool all = c.num_moe_layers() == c.num_hidden_layers;",
        "  const bool all = true;", "mixture_choice_test", "*"),
    "shared_expert_doubled_without_a_gate": (
        "upcycle/scale.cpp", "value_or(gate ? 2.0 : 1.0)", "value_or(2.0)", "mixture_families_test", "*"),
    "every_n_begins_at_layer_0": (
        "configs/layer_choice.cpp", "(layer + 1) % choice.count == 0", "layer % choice.count == 0",
        "upcycle_config_test", "*"),
    "factor_of_the_weights_left_out_of_backward": (
        "trainer/model/scaled_router.cpp",
        "    router_->backward(ex, dx_TD, scaled(ex, dweight_TK, *ex.scratch), balance, saved);",
        "    router_->backward(ex, dx_TD, dweight_TK, balance, saved);", "layer_gradient_test", "*Scaled*"),
    "factor_of_the_weights_squared": (
        "trainer/model/scaled_router.cpp", "    ops::scale(ex, out_TK, factor_);",
        "    ops::scale(ex, out_TK, factor_ * factor_);", "layer_gradient_test", "*Factor*"),
}


def build(tree, out, program):
    done = run(["cmake", "--build", out, "--target", program, "-j2"], cwd=tree)
    if done.returncode != 0:
        raise SystemExit(f"{program} does not build:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def passes(out, program, tests):
    return run([out / "bin" / program, f"--gtest_filter={tests}"], timeout=600).returncode == 0


def main():
    args = parse_arguments(__doc__, MUTANTS, ("--build", {"type": Path, "default": ROOT / "build" / "mutants"}))
    check_places(MUTANTS, args.names)
    if args.places:
        return
    tree, out = args.build / "tree", args.build / "out"
    copy_tree(tree)
    run(["cmake", "-S", tree, "-B", out, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
         f"-DUPMOE_PYTHON={sys.executable}"])
    survivors = []
    for name in args.names:
        path, old, new, program, tests = MUTANTS[name]
        build(tree, out, program)
        if not passes(out, program, tests):
            raise SystemExit(f"{program} {tests} fails without any mutant")
        source, began = (tree / path).read_text(encoding="utf-8"), time.monotonic()
        (tree / path).write_text(source.replace(old, new), encoding="utf-8")
        build(tree, out, program)
        found = not passes(out, program, tests)
        print(f"{name:50}{'caught' if found else 'SURVIVED':10}{time.monotonic() - began:7.1f} s", flush=True)
        survivors += [] if found else [name]
        (tree / path).write_text(source, encoding="utf-8")
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
