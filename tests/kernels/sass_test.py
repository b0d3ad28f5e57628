#!/usr/bin/env python3
"""Machine code of the experts' kernels for Hopper, against the table kernels/cuda/sass.txt.

A kernel multiplies by HGMMA, loads boxes by UTMALDG and gathers rows by LDGSTS; around its products, no other
instruction may touch the registers of their sums, which would mean that they are moved or multiplied one by one. With
the compiler that the table names, the counts must be the table's; with another one, each kernel must still have those
instructions. cuobjdump and nvdisasm come with launch/requirements-cuda.txt, or lie beside nvcc.
usage: sass_test.py BUILD_FOLDER [--write]
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from registers_test import ROOT, compiler_of, demangle, short

TABLE = ROOT / "kernels" / "cuda" / "sass.txt"
OBJECTS = "kernels/CMakeFiles/kernels_sm90.dir/cuda/sm90/experts_*.cu.o"
COUNTED = ("HGMMA", "UTMALDG", "LDGSTS")
NOT_THERE = 69  # CMakeLists.txt: what ctest takes for skipped
FUNCTION = re.compile(r"\.text\.(\S+):")
LABEL = re.compile(r"(\.L_\w+):")
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
SUMS = re.compile(r"64x(\d+)x16")
TARGET = re.compile(r"`\((\.L_\w+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")


def tool(name, build):
    nvcc = re.search(r"^UPMOE_NVCC:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    folders = list(ROOT.glob(".venv/lib/python3*/site-packages/nvidia/cu13/bin"))
    folders += [Path(nvcc[1]).parent] if nvcc else []
    return shutil.which(name, path=":".join(map(str, folders))) or shutil.which(name)


def disassembled(path, build):
    tools = {name: tool(name, build) for name in ("cuobjdump", "nvdisasm")}
    missing = [name for name, found in tools.items() if found is None]
    if missing:
        print(f"sass_test: skipped: no {' and no '.join(missing)} in .venv (launch/requirements-cuda.txt), beside nvcc "
              "or on the path; ./launch/setup.sh installs them")
        sys.exit(NOT_THERE)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tools["cuobjdump"], "-xelf", "all", path.resolve()], cwd=folder, check=True,
                       capture_output=True)
        images = sorted(Path(folder).glob("*.cubin"))
        run = subprocess.run([tools["nvdisasm"], "-c", *images], text=True, capture_output=True, check=True)
    return run.stdout


class Kernel:
    def __init__(self):
        self.code = []  # (operation, operands)
        self.labels = {}

    def count(self):
        return Counter(op.split(".")[0] for op, _ in self.code)

    def products(self):
        return [i for i, (op, _) in enumerate(self.code) if op.startswith("HGMMA")]

    def main_loop(self):
        """All products and the shortest loop that has some: what ptxas made of the loop over stages, with the turns
        that it took out of it."""
        first, last = self.products()[0], self.products()[-1]
        loops = []
        for i, (op, operands) in enumerate(self.code):
            begin = self.labels.get(match[1]) if op.startswith("BRA") and (match := TARGET.search(operands)) else None
            if begin is not None and any(begin <= product <= i for product in self.products()):
                loops.append((i - begin, begin, i))
        _, begin, end = min(loops)
        return range(min(first, begin), max(last, end) + 1)

    def moves(self):
        """Instructions of the main loop beside the products that name a register of their sums."""
        sums = set()
        for i in self.products():
            op, operands = self.code[i]
            first = int(REGISTER.search(operands)[1])
            sums |= set(range(first, first + int(SUMS.search(op)[1]) // 2))
        named = [(op, {int(n) for n in REGISTER.findall(operands)}) for op, operands in
                 (self.code[i] for i in self.main_loop())]
        return [op for op, registers in named if registers & sums and not op.startswith("HGMMA")]


def kernels_of(text):
    kernels = {}
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            kernel = kernels[match[1]] = Kernel()
        elif match := LABEL.match(line):
            if kernels:
                kernel.labels[match[1]] = len(kernel.code)
        elif (match := INSTRUCTION.match(line)) and kernels:
            kernel.code.append((match[1], match[2]))
    return dict(zip(map(short, demangle(list(kernels))), kernels.values(), strict=True))


def faults_of(name, kernel):
    counts = kernel.count()
    needed = [op for op in COUNTED if op != "LDGSTS" or "rows_kernel" not in name]  # whose rows lie in order
    faults = [f"{name}: no {op}" for op in needed if counts[op] == 0]
    if counts["HGMMA"] > 0 and (moves := kernel.moves()):
        faults.append(f"{name}: {len(moves)} instructions of the main loop touch its sums: "
                      f"{', '.join(sorted(set(moves)))}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path)
    parser.add_argument("--write", action="store_true", help="make the table what the build has")
    args = parser.parse_args()
    objects = [path for path in sorted(args.build.glob(OBJECTS))
               if (ROOT / "kernels/cuda/sm90" / path.stem).exists()]  # else of a source that has moved
    kernels = {}
    for path in objects:
        kernels |= kernels_of(disassembled(path, args.build))
    wrong = [] if kernels else [f"no kernels in {args.build / OBJECTS}"]
    found = [f"nvcc {compiler_of(args.build)}; kernel: {', '.join(COUNTED)}"]
    for name, kernel in sorted(kernels.items()):
        wrong += faults_of(name, kernel)
        found.append(f"{name}: {' '.join(str(kernel.count()[op]) for op in COUNTED)}")
    if args.write:
        TABLE.write_text("\n".join(found) + "\n")
    table = TABLE.read_text().splitlines()
    if table[0] == found[0]:
        wrong += [f"- {line}" for line in table if line not in found]
        wrong += [f"+ {line}" for line in found if line not in table]
    else:
        print(f"sass_test: the table is of another compiler ({table[0].split(';')[0]}); only the instructions' kinds "
              "count")
    print("\n".join(wrong) if wrong else
          f"sass_test: {len(kernels)} kernels as in the table, no sums moved between products")
    if wrong:
        print("look at each; `tests/kernels/sass_test.py BUILD_FOLDER --write` accepts other counts")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
