#!/usr/bin/env python3
"""Plants one classic mistake at a time in the Hopper kernels and shows that the model of the hardware finds it.

By hand, not in ctest: every mutant is compiled. usage: tests/sm90_mutants.py [--places] [NAME ...]
The sources are copied first, so nothing here changes.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutants import ROOT, check_places, parse_arguments

FOLDER = "kernels/cuda/sm90/"
TEST = "tests/kernels/sm90_experts_test.cpp"
VARIANTS = "tests/kernels/sm90_variants_test.cpp"  # of what the first variant of a kernel does not have
TRAFFIC = "tests/kernels/sm90_traffic_test.cpp"  # of mistakes that move no result
MODEL = "tests/support/fake_cuda"
TWIN = [f"{MODEL}/{name}" for name in re.search(r"add_library\(sm90_emulation STATIC ([^)]*)\)", (
    ROOT / MODEL / "CMakeLists.txt").read_text(encoding="utf-8"))[1].split()]
MAPS = FOLDER + "tensor_map.cu"  # asks the model of the driver, as it stands
FLAGS = ["-std=c++20", "-O1", "-march=native", "-w", "-Itests/support/fake_cuda", "-I."]

# name: file, what stands there, what is planted, the tests that must notice, words of the finding: of the model,
# or, where only the result is wrong, which one
MUTANTS = {
    "no_empty_wait": (
        FOLDER + "experts_down.cuh",
        "      mbarrier_wait(&s.empty[at.stage], at.parity ^ 1);\n",
        "",
        "*.Down/*", "more arrivals"),
    "no_full_wait": (
        FOLDER + "expert_pipeline.cuh",
        "  mbarrier_wait(full, parity);\n",
        "",
        "*.Down/*", "a wait is missing"),
    "wrong_parity": (
        FOLDER + "expert_pipeline.cuh",
        "      mbarrier_wait(&s.empty[at.stage], at.parity ^ 1);",
        "      mbarrier_wait(&s.empty[at.stage], at.parity);",
        "*.Up/*", "nobody can go on"),
    "wrong_bytes": (
        FOLDER + "experts_up.cuh",
        "mbarrier_arrive_expect_tx(full, UpShared<C>::kBBytes)",
        "mbarrier_arrive_expect_tx(full, UpShared<C>::kBBytes / 2)",
        "*.Up/*", "nobody can go on"),
    "no_swizzle": (
        FOLDER + "expert_pipeline.cuh",
        "operand + swizzled(t / 8, t % 8)",
        "operand + t * 16",
        "*.Up/*", "of_gate_up.relative()"),
    "wrong_sbo": (
        FOLDER + "sm90.cuh",
        "descriptor(operand + row * kRowBytes + k * 2, 16, 8 * kRowBytes)",
        "descriptor(operand + row * kRowBytes + k * 2, 16, 4 * kRowBytes)",
        "*.Down/*", "of_y.relative()"),
    "wrong_lbo": (
        FOLDER + "sm90.cuh",
        "k * kRowBytes, kPanelBytes, 8",
        "k * kRowBytes, kPanelBytes / 2, 8",
        "*.DRows/*", "of_y.relative()"),
    "swapped_lbo_sbo": (
        FOLDER + "sm90.cuh",
        "kPanelBytes, 8 * kRowBytes)",
        "8 * kRowBytes, kPanelBytes)",
        "*.DRows/*", "of_y.relative()"),
    "arrival_before_copies": (
        FOLDER + "expert_pipeline.cuh",
        "      gathered.copy(s.a[at.stage]);\n      arrivals.copied(s, at.stage);",
        "      arrivals.copied(s, at.stage);\n      gathered.copy(s.a[at.stage]);",
        "*.Up/*", "a wait is missing"),
    "no_copy_wait": (
        FOLDER + "experts_dhidden.cuh",
        "      cp_async_wait<kFetched - 1>();\n",
        "",
        "*.DHidden/*", "to which another copy is under way"),
    "no_proxy_fence": (
        FOLDER + "expert_pipeline.cuh",
        "  if constexpr (kCopied) fence_proxy_async();\n",
        "",
        "*.Up/*", "without fence.proxy.async"),
    "no_wgmma_fence": (
        FOLDER + "expert_pipeline.cuh",
        "    wgmma_fence();\n",
        "",
        "*.Down/*", "without wgmma.fence"),
    "no_wgmma_wait": (
        FOLDER + "expert_pipeline.cuh",
        "  wgmma_wait<0>();",
        "  ",
        "*.Down/*", "the block ends while a product is under way"),
    "stage_released_early": (
        FOLDER + "expert_pipeline.cuh",
        "      release<kBlocks>(&s.empty[before]);\n    }\n    before",
        "      release<kBlocks>(&s.empty[at.stage]);\n    }\n    before",
        "*.Down/*", "nobody can go on"),
    "stage_never_released": (
        FOLDER + "expert_pipeline.cuh",
        "  if (steps > 0) release<kBlocks>(&s.empty[before]);",
        "",
        "*.Down/*", "nobody can go on"),
    "stage_released_late": (
        FOLDER + "expert_pipeline.cuh",
        "    if (step > 0) {\n      wgmma_wait<1>();\n      release<kBlocks>(&s.empty[before]);\n    }\n",
        "    if (step > 0) wgmma_wait<1>();\n    if (step >= S::kStages) release<kBlocks>(&s.empty[at.stage]);\n",
        "*.Up/*", "nobody can go on"),
    "wrong_arrival_count": (
        FOLDER + "experts_up.cuh",
        "s.init(1 + kGroupThreads, kConsumers * 4 * C::kBlocks)",
        "s.init(1 + kGroupThreads, kConsumers * 4)",
        "*.Up/*", "that a product still reads"),
    "no_tail_predicate": (
        FOLDER + "expert_pipeline.cuh",
        "    if (row < rows) store_global(first",
        "    store_global(first",
        "*.Down/*", "guards_stand()"),
    "release_to_own_block_only": (
        FOLDER + "expert_pipeline.cuh",
        "mbarrier_arrive_remote(empty, lane)",
        "mbarrier_arrive_remote(empty, cluster_rank())",
        "*.Up/*", "to which another copy is under way"),
    "no_cluster_sync_at_the_start": (
        FOLDER + "expert_pipeline.cuh",
        "  cluster_sync();  // the other block's barriers are there\n",
        "",
        "*.Up/*", "no barrier was made here"),
    "no_cluster_sync_at_the_end": (
        FOLDER + "expert_pipeline.cuh",
        "  cluster_sync();  // nobody writes",
        "  // nobody writes",
        "*.Up/*", "has left"),
    "barriers_shown_to_nobody": (
        FOLDER + "experts_down.cuh",
        "    fence_mbarrier_init();\n",
        "",
        "*.Down/*", "has not shown the barrier"),
    "multicast_to_a_third_block": (
        FOLDER + "experts_up.cuh",
        "tma_load_multicast((1 << C::kBlocks) - 1, s.b",
        "tma_load_multicast((2 << C::kBlocks) - 1, s.b",
        "*.Up/*", "that the cluster does not have"),
    "more_registers_than_a_block_has": (
        FOLDER + "experts_up.cuh",
        "take_roles<56, 224>(",
        "take_roles<48, 232>(",
        "*.Up/*", "wait for registers"),
    "no_turn": (
        FOLDER + "experts_dhidden.cuh",
        "    mbarrier_wait(&s.tiles.turn[group], turns++ & 1);\n",
        "",
        "*.DHidden/*", "nobody can go on"),
    "wrong_count_of_a_turn": (
        FOLDER + "experts_dhidden.cuh",
        "mbarrier_init(&turn, 4)",
        "mbarrier_init(&turn, 5)",
        "*.DHidden/*", "nobody can go on"),
    "staging_rewritten_early": (
        FOLDER + "experts_up.cuh",
        "  store_lines<8>(staging, first, row_bytes, rows);\n  __syncwarp();",
        "  store_lines<8>(staging, first, row_bytes, rows);",
        "*.Up/*", "of_gate_up.relative()"),
    "rows_of_another_expert": (
        FOLDER + "experts_dweights.cuh",
        "lane < 16 && row < tile.rows ?",
        "lane < 16 ?",
        "*.DGateUpWeights/*", "of_dw.relative()"),
    "stage_released_before_its_products_end": (
        FOLDER + "expert_pipeline.cuh",
        "    if (step > 0) {\n      wgmma_wait<1>();",
        "    if (step > 0) {\n      wgmma_wait<2>();",
        "*.Down/*", "still reads"),
    "steps_of_elements_for_four_dimensions": (
        MAPS, "every[5] = {1, 1, 1, 1, 1}", "every[5] = {1, 1, 1, 1}", "*.Up/*", "a step over no elements"),
    "half_the_swizzle": (
        MAPS, "CU_TENSOR_MAP_SWIZZLE_128B", "CU_TENSOR_MAP_SWIZZLE_64B", "*.Down/*", "only the 128-byte swizzle"),
    "strides_of_the_dimensions_before": (
        MAPS, "strides.begin()[i - 1]", "strides.begin()[0]", "*.Up/*", "of_gate_up.relative()"),
    "no_fence_behind_a_lag": (
        FOLDER + "expert_pipeline.cuh",
        "    fence_proxy_async();\n    mbarrier_arrive(&s.full[stage <",
        "    mbarrier_arrive(&s.full[stage <",
        "*Sm90Variants.Up/*", "without fence.proxy.async"),
    "arrival_of_copies_under_way": (
        FOLDER + "expert_pipeline.cuh",
        "cp_async_wait<kLag>()",
        "cp_async_wait<kLag + 1>()",
        "*Sm90Variants.D*Weights/*", "a wait is missing"),
    "last_arrivals_never_said": (
        FOLDER + "experts_dweights.cuh",
        "  arrivals.finish(s, at.stage);\n",
        "",
        "*Sm90Variants.D*Weights/*", "nobody can go on"),
    "arrival_of_the_stage_before": (
        FOLDER + "expert_pipeline.cuh",
        "stage + S::kStages - kLag)",
        "stage + S::kStages - kLag - 1)",
        "*Sm90Variants.DHidden/*", "nobody can go on"),
    "columns_of_half_an_expert": (
        FOLDER + "expert_tiles.cuh",
        "(by_rows ? within % groups : within / columns)",
        "(by_rows ? within % groups : within / columns / 2)",
        "*Sm90Variants.Down/*", "other bits than those of the first variant"),
    "columns_of_gradients_by_rows": (
        FOLDER + "experts_dweights.cuh",
        "kByRows ? within / tiles_y : within % groups;",
        "within / tiles_y;",
        "*Sm90Variants.D*Weights/*", "other bits than those of the first variant"),
    "no_swizzle_of_results": (
        FOLDER + "expert_pipeline.cuh",
        "kLaneBytes == 4 ? swizzled(row, chunk) :",
        "kLaneBytes == 4 ? row * kRowBytes + (chunk << 4) :",
        "Sm90TrafficOfATile.Down", "conflicts of banks: stmatrix"),
    "wrong_swizzle_of_gates_and_ups": (
        FOLDER + "expert_pipeline.cuh",
        "((chunk ^ (row & 3) << 1) << 4)",
        "((chunk ^ (row & 7)) << 4)",
        "Sm90TrafficOfATile.Up", "conflicts of banks: store"),
}


def compile_objects(folder, sources):
    for source in sources:
        subprocess.run(["g++", *FLAGS, "-x", "c++", "-c", source, "-o", Path(source).stem + ".o"], cwd=folder,
                       check=True)


def main():
    args = parse_arguments(__doc__, MUTANTS)
    names, missed = args.names, []
    check_places(MUTANTS, names)
    if args.places:
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for part in ("kernels", "tests/support", "tests/kernels"):
            shutil.copytree(ROOT / part, folder / part)
        compile_objects(folder, TWIN)
        for name in names:
            file, old, new, tests, words = MUTANTS[name]
            path = folder / file
            right = path.read_text(encoding="utf-8")
            path.write_text(right.replace(old, new), encoding="utf-8")
            begin = time.monotonic()
            test = next((source for word, source in (('Traffic', TRAFFIC), ('Variants', VARIANTS)) if word in tests),
                        TEST)
            compile_objects(folder, [test, MAPS])
            objects = [Path(s).stem + ".o" for s in [test, MAPS, *TWIN]]
            libraries = ["-lboost_context", "-lgtest_main", "-lgtest"]
            subprocess.run(["g++", *objects, *libraries, "-o", "mutant"], cwd=folder, check=True)
            run = subprocess.run(["./mutant", f"--gtest_filter={tests}", "--gtest_brief=1"], cwd=folder, text=True,
                                 capture_output=True, timeout=300, check=False)
            found = run.returncode != 0 and words in run.stdout
            missed += [] if found else [name]
            said = [line.strip() for line in run.stdout.splitlines()
                    if any(word in line for word in ("block ", "actual", "conflicts"))]
            first = said[0][:110] if said else f"status {run.returncode}"
            seconds = time.monotonic() - begin
            print(f"{'found ' if found else 'MISSED'} {name} ({seconds:.0f} s): {first}", flush=True)
            path.write_text(right, encoding="utf-8")
    print(f"{len(names) - len(missed)} of {len(names)} found" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
