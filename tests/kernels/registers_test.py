#!/usr/bin/env python3
"""Registers, stack and spills of every CUDA kernel, against the table kernels/cuda/registers.txt.

The build leaves what ptxas said beside each object. With the compiler that the table names, every number must be the
table's; with another one only spills count: a kernel that the table has without spills must have none. Hopper's
kernels of the experts never spill, whatever the table says, and begin with no more registers than a block of them is
given. Where ptxas names wgmma, it takes a kernel's products one by one: none may be named.
usage: registers_test.py BUILD_FOLDER [--write]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "cuda" / "registers.txt"
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
EXPERTS = "sm90::experts_"
EXPERTS_REGISTERS = 168  # of 65,536 for three warpgroups, in eights


def demangle(names):
    run = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    return run.stdout.splitlines()


def short(name):
    """upmoe::cuda::norm_dx<8, true, upmoe::bf16>(...) without namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").replace("upmoe::cuda::", "").replace("upmoe::", "")
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, c in enumerate(name):  # the parameters begin at the first bracket outside the template's
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def has_moved(report):
    """Of a source that is no longer there; its object may be."""
    source = str(report).partition(".dir/")[2].removesuffix(".o.ptxas")
    return not report.with_suffix("").exists() or not (ROOT / "kernels" / source).exists()


def kernels_of(folder):
    found = []
    for report in sorted(folder.rglob("*.cu.o.ptxas")):
        if has_moved(report):
            continue
        entry = frame = None
        for line in report.read_text().splitlines():
            if match := ENTRY.search(line):
                entry = match
            elif (match := FRAME.search(line)) and entry:
                frame = match
            elif (match := USED.search(line)) and entry and frame:
                found.append((entry[1], entry[2], report.name.removesuffix(".o.ptxas"), int(match[1]),
                              *(int(n) for n in frame.groups())))
                entry = frame = None
    names = demangle([f[0] for f in found])
    return sorted((file, target, short(name), *numbers)
                  for name, (_, target, file, *numbers) in zip(names, found, strict=True))


def words_about_wgmma(folder):
    return [f"{report.name.removesuffix('.o.ptxas')}: {line}" for report in sorted(folder.rglob("*.cu.o.ptxas"))
            if not has_moved(report) for line in report.read_text().splitlines()
            if "wgmma" in line and not ENTRY.search(line)]


def compiler_of(build):
    cache = (build / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^UPMOE_NVCC:\w+=(.*)$", cache, re.MULTILINE)[1]
    run = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True)
    return re.search(r"release \S+ V(\S+)", run.stdout)[1]


def lines_of(compiler, kernels):
    yield f"nvcc {compiler}; file, target, kernel: registers, bytes of stack, of spill stores, of spill loads"
    for file, target, name, *numbers in kernels:
        yield f"{file} {target} {name}: {' '.join(map(str, numbers))}"


def spills(lines):
    return {line.rsplit(": ", 1)[0] for line in lines if line.rsplit(" ", 2)[1:] != ["0", "0"]}


def faults_of_experts(kernels):
    found = [kernel for kernel in kernels if kernel[2].startswith(EXPERTS)]
    faults = [] if found else [f"no kernel is named {EXPERTS}"]
    for _, _, name, registers, *memory in found:
        if any(memory):
            faults.append(f"{name} must not spill: {' '.join(map(str, memory))} bytes of stack, stores, loads")
        if registers > EXPERTS_REGISTERS:
            faults.append(f"{name} begins with {registers} registers, more than {EXPERTS_REGISTERS}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--write", action="store_true", help="make the table what the build has")
    args = parser.parse_args()
    kernels = kernels_of(args.build / "kernels")
    if not kernels:
        sys.exit(f"registers_test: no reports of ptxas under {args.build / 'kernels'}")
    compiler = compiler_of(args.build)
    found = list(lines_of(compiler, kernels))
    if args.write:
        TABLE.write_text("\n".join(found) + "\n")
    table = TABLE.read_text().splitlines()
    if table[0] == found[0]:
        wrong = [f"- {line}" for line in table if line not in found]
        wrong += [f"+ {line}" for line in found if line not in table]
    else:
        print(f"registers_test: the table is of another compiler ({table[0].split(';')[0]}); comparing spills alone")
        wrong = [f"spills now: {name}" for name in sorted(spills(found[1:]) - spills(table[1:]))]
    beyond_tables = faults_of_experts(kernels) + words_about_wgmma(args.build / "kernels")
    wrong += beyond_tables
    print("\n".join(wrong) if wrong else f"registers_test: {len(kernels)} kernels as in the table")
    if len(wrong) > len(beyond_tables):
        print("look at each; `tests/kernels/registers_test.py BUILD_FOLDER --write` accepts them")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
