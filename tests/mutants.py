#!/usr/bin/env python3
"""Plants one error at a time (layouts, GPU path, what is counted, families) and shows that the tests find it.

By hand, not in ctest: every mutant is built. usage: tests/mutants.py [--places] [--build DIR] [NAME ...]
The tree is copied first, so nothing here changes.
"""

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mutations.cpu
import mutations.data
import mutations.distillation
import mutations.families
import mutations.figures
import mutations.finetune
import mutations.generation
import mutations.gpu
import mutations.layouts
import mutations.machines
import mutations.recipes
import mutations.records
import mutations.routers

ROOT = Path(__file__).resolve().parent.parent

# name: file, what stands there, what is planted, the tests that must notice (a GoogleTest filter) and, unless it is
# layout_equivalence_test with its meshes, their program (those that end in _on_gpu have the pretended GPU)
MUTANTS = {name: mutant for room in (mutations.cpu, mutations.data, mutations.layouts, mutations.routers,
                                     mutations.families, mutations.gpu, mutations.figures, mutations.finetune,
                                     mutations.generation, mutations.machines, mutations.recipes, mutations.records,
                                     mutations.distillation)
           for name, mutant in room.MUTANTS.items()}


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def parse_arguments(description, mutants, *options):
    """What both scripts of mutants are asked; `options` are those of one alone, as (name, words for argparse)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant (default: all of them)")
    parser.add_argument("--places", action="store_true", help="only look for the places; a test does this")
    for option, words in options:
        parser.add_argument(option, **words)
    args = parser.parse_args()
    for name in args.names:
        if name not in mutants:
            near = difflib.get_close_matches(name, mutants)
            parser.error(f"no mutant '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
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
    """The tests fail, or the program stops with an error: both are a catch; a time-out is a hang, and None."""
    began = time.monotonic()
    device = {"UPMOE_TEST_DEVICE": "cuda"} if program.endswith("_on_gpu") else {}
    try:
        done = run([out / "bin" / program, f"--gtest_filter={tests}"], timeout=600,
                   env=os.environ | {"OMP_NUM_THREADS": "1"} | device)
    except subprocess.TimeoutExpired:
        return None, 0, time.monotonic() - began
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
        if caught(out, "*", program)[0] is not False:
            raise SystemExit(f"{program} fails or hangs without any mutant")
    survivors = []
    for name in args.names:
        path, old, new, tests, program = (*MUTANTS[name], LAYOUTS)[:5]
        source = (tree / path).read_text(encoding="utf-8")
        (tree / path).write_text(source.replace(old, new), encoding="utf-8")
        done = build(tree, out, program)
        if done.returncode != 0:
            raise SystemExit(f"{name} does not build:\n{done.stdout[-3000:]}")
        found, failed, seconds = caught(out, tests, program)
        word = {True: "caught", False: "SURVIVED", None: "HANGS"}[found]
        print(f"{name:50}{word:10}{failed:5} tests failed{seconds:7.1f} s", flush=True)
        if not found:
            survivors.append(name)
        (tree / path).write_text(source, encoding="utf-8")
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
