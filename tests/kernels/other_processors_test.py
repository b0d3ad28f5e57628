#!/usr/bin/env python3
"""Every source that asks the compiler what the processor has is code for processors with other registers too.

A build compiles one side of each such question, so that the other sides rot unseen on a machine with AVX-512. Sources
whose own text or headers ask (or count a register's lanes, which simd.h answers) are checked by the compiler for AVX2
and for neither, without code. tests/architectures.sh, by hand, builds and runs them.
usage: other_processors_test.py BUILD_FOLDER [ARCHITECTURE...]
"""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("x86-64-v3", "x86-64-v2")
ASKS = re.compile(r"__AVX|__SSE|__F16C|__FMA|\bkRegisterLanes\b|\bkVectorsAtOnce\b")
ANSWERS = ROOT / "kernels/cpu/simd.h"  # which nearly every source includes
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


@functools.cache
def asks(path):
    text = path.read_text(encoding="utf-8")
    if path != ANSWERS and ASKS.search(text):
        return True
    return any(asks(ROOT / name) for name in INCLUDE.findall(text) if (ROOT / name).is_file())


def product_sources(build):
    """The compiler's words for each source of the product that asks, by file."""
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        path = Path(entry["file"])
        inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] != "tests"
        if inside and path.suffix == ".cpp" and path not in found and asks(path):
            found[path] = entry
    return found


def words_for(entry, architecture):
    words, given = [], iter(shlex.split(entry["command"]))
    for word in given:
        if word == "-o":
            next(given)
        elif not word.startswith("-march="):
            words.append(word)
    return [*words, f"-march={architecture}", "-fsyntax-only"]


def check(path, entry, architecture):
    run = subprocess.run(words_for(entry, architecture), cwd=entry["directory"], capture_output=True, text=True,
                         check=False)
    if run.returncode == 0:
        return []
    return [f"{path.relative_to(ROOT)} is no code for {architecture}:\n{run.stderr[:2000]}"]


def main():
    build, architectures = Path(sys.argv[1]), sys.argv[2:] or ARCHITECTURES
    sources = product_sources(build)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(check, path, entry, a) for a in architectures for path, entry in sources.items()]
        problems = [problem for job in jobs for problem in job.result()]
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{len(sources)} sources for {', '.join(architectures)}: {len(problems)} problems")
    return 1 if problems or not sources else 0


if __name__ == "__main__":
    sys.exit(main())
