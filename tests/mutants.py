#!/usr/bin/env python3
"""Plants one error at a time (layouts, GPU path, what is counted, families) and shows that the tests find it.

By hand, not in ctest: every mutant is built, which takes hours for all of them (with ccache, where it is installed,
fewer). usage: tests/mutants.py [--places [--programs DIR]] [--build DIR] [--record FILE] [NAME ...]
The tree is copied first, so nothing here changes. With --record a run that was cut off goes on where it was;
tests/mutations/tried.jsonl is such a record: what was caught there is not tried again until the error itself changes.
"""

import argparse
import datetime
import difflib
import hashlib
import json
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
ISAS = ("AVX512_CORE_BF16", "AVX512_CORE", "AVX2")  # upmoe_isa_tests in the CMakeLists.txt of the tests


def configure(tree, out):
    """With a cache of compilations if there is one: a source that is mended again is then not compiled again. What is
    for a GPU runs on the pretended one, which nvcc has no part in."""
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    return run(["cmake", "-S", tree, "-B", out, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                "-DUPMOE_CUDA=OFF", f"-DUPMOE_PYTHON={sys.executable}", *launcher])


def build(tree, out, *programs):
    return run(["cmake", "--build", out, "--target", *programs, "-j2"], cwd=tree)


class Record:
    """A line of JSON for each mutant that was tried: name, a digest of what was planted, result, commit, date."""

    def __init__(self, path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.results = {entry["name"]: entry for entry in map(json.loads, lines)}
        self.commit = run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]).stdout.strip()

    @staticmethod
    def digest(mutant):
        return hashlib.sha256(json.dumps(mutant).encode()).hexdigest()[:16]

    def has_caught(self, name, mutant):
        entry = self.results.get(name)
        return entry is not None and entry["result"] == "caught" and entry["mutant"] == self.digest(mutant)

    def add(self, name, mutant, result, failed, seconds):
        if not self.path:
            return
        entry = {"name": name, "mutant": self.digest(mutant), "result": result, "tests_failed": failed,
                 "seconds": round(seconds, 1), "commit": self.commit,
                 "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        self.results[name] = entry
        lines = [json.dumps(self.results[known]) for known in sorted(self.results)]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_tests(folder, program, tests, *options, isa=None):
    device = ({"UPMOE_TEST_DEVICE": "cuda", "UPMOE_SIMT_ORDER": "7", "UPMOE_FAKE_DELAYS": "7"}  # as ctest runs most
              if program.endswith("_on_gpu") else {})
    return run([folder / program, f"--gtest_filter={tests}", *options], timeout=600,
               env=os.environ | {"OMP_NUM_THREADS": "1"} | device | ({"ONEDNN_MAX_CPU_ISA": isa} if isa else {}))


def check_tests(names, folder):
    """Tests move on too: a program that is not there, or a filter that lets none of its tests through, is told here."""
    asked = {}
    for name in names:
        asked.setdefault(((*MUTANTS[name], LAYOUTS)[4], MUTANTS[name][3]), []).append(name)
    lost = []
    for (program, tests), of in asked.items():
        if not (folder / program).exists():
            lost.append(f"{', '.join(of)}: no program {program} in {folder}")
        elif "\n  " not in run_tests(folder, program, tests, "--gtest_list_tests").stdout:
            lost.append(f"{', '.join(of)}: {program} has no test {tests}")
    if lost:
        raise SystemExit("\n".join(lost))


def caught(out, tests, program, isa=None):
    """The tests fail, or the program stops with an error: both are a catch; a time-out is a hang, and None."""
    began = time.monotonic()
    try:
        done = run_tests(out / "bin", program, tests, isa=isa)
    except subprocess.TimeoutExpired:
        return None, 0, time.monotonic() - began
    failed = sum(line.startswith("[  FAILED  ]") and "(" in line for line in done.stdout.splitlines())
    return done.returncode != 0, failed, time.monotonic() - began


def check_program(tree, out, program, names):
    """Without any mutant it builds, has the tests of these mutants, and all of its tests pass."""
    done = build(tree, out, program)
    if done.returncode != 0:
        raise SystemExit(f"{program} does not build without mutants:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    check_tests(names, out / "bin")
    if caught(out, "*", program)[0] is not False:
        raise SystemExit(f"{program} fails or hangs without any mutant")


def try_mutant(tree, out, name, record):
    """Whether the tests find it. One that does not build is no mutant: told, and counted as not found."""
    path, old, new, tests, program = (*MUTANTS[name], LAYOUTS)[:5]
    source = (tree / path).read_text(encoding="utf-8")
    (tree / path).write_text(source.replace(old, new), encoding="utf-8")
    done = build(tree, out, program)
    found, failed, seconds = False, 0, 0.0
    if done.returncode == 0:
        # As this processor, and as those that the tests make of it: each goes other ways through the kernels.
        for isa in (None, *ISAS):
            found, failed, seconds = caught(out, tests, program, isa)
            if found is not False:
                break
    (tree / path).write_text(source, encoding="utf-8")
    word = "NO BUILD" if done.returncode != 0 else {True: "caught", False: "SURVIVED", None: "HANGS"}[found]
    print(f"{name:50}{word:10}{failed:5} tests failed{seconds:7.1f} s", flush=True)
    if done.returncode != 0:
        print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}", flush=True)
    record.add(name, MUTANTS[name], word, failed, seconds)
    return bool(found)


def main():
    args = parse_arguments(__doc__, MUTANTS, ("--build", {"type": Path, "default": ROOT / "build" / "mutants"}),
                           ("--programs", {"type": Path, "help": "with --places: and for the tests, in the programs of "
                                                                 "this folder"}),
                           ("--record", {"type": Path, "help": "results are added to this file, and what it has as "
                                                               "caught is not tried again"}))
    check_places(MUTANTS, args.names)
    if args.places:
        if args.programs:
            check_tests(args.names, args.programs)
        return
    record = Record(args.record)
    names = [name for name in args.names if not record.has_caught(name, MUTANTS[name])]
    names.sort(key=lambda name: ((*MUTANTS[name], LAYOUTS)[4], MUTANTS[name][0]))  # few changes of program and source
    tree, out = args.build / "tree", args.build / "out"
    copy_tree(tree)
    done = configure(tree, out)
    if done.returncode != 0:
        raise SystemExit(f"the tree is not configured:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    checked = set()
    survivors = []
    for name in names:
        program = (*MUTANTS[name], LAYOUTS)[4]
        if program not in checked:
            check_program(tree, out, program, [n for n in names if (*MUTANTS[n], LAYOUTS)[4] == program])
            checked.add(program)
        if not try_mutant(tree, out, name, record):
            survivors.append(name)
    print(f"{len(names) - len(survivors)} of {len(names)} caught"
          + (f", {len(args.names) - len(names)} were before" if len(names) < len(args.names) else ""))
    if survivors:
        sys.exit(f"not caught: {', '.join(survivors)}")


if __name__ == "__main__":
    main()
