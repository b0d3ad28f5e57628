#!/usr/bin/env python3
"""What `sm90_bench` printed on a GPU, as one result file, and its figures side by side.

usage: sm90_record.py FOLDER [--out tests/bench/results]    writes the file, and prints
       sm90_record.py RESULT.json                           prints

FOLDER holds machine.txt (date, a digest of kernels/cuda/sm90, then what nvidia-smi says: name, driver, memory),
check*.txt, times*.txt and variants*.txt. Ratios are to 8192^3 of the same process, the mean of before and after. Of
variants, time_variants has left the table of the best in FOLDER/expert_variants.yaml.
"""

import argparse
import json
import sys
from pathlib import Path

from bench_record import run_tool

ROOT = Path(__file__).resolve().parent.parent.parent
# Of 8192^3 at 32,768 balanced tokens, foretold and not measured: what a kernel must reach, and the goal.
FORETOLD = {"up, pairs": (0.82, 0.88), "down, pairs": (0.86, 0.90), "dx, pairs": (0.86, 0.90),
            "dhidden, pairs": (0.70, 0.78), "dw gate_up, pairs": (0.83, 0.87), "dw down, pairs": (0.83, 0.87)}


def lines_of(paths):
    for path in sorted(paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def machine_of(folder):
    date, sources, gpu = (folder / "machine.txt").read_text(encoding="utf-8").splitlines()[:3]
    name, driver, memory = (part.strip() for part in gpu.split(","))
    return {"date": date, "sources": sources, "gpu": name, "driver": driver, "gpu_memory": memory}


def times_of(folder):
    """tokens, and the routing unless it is balanced -> kernel -> figures."""
    found, waiting, before = {}, [], None
    for line in lines_of(folder.glob("times*.txt")):
        if line.get("square") == "before":
            before, waiting = line["tflops"], []
        elif line.get("square") == "after":
            square = (before + line["tflops"]) / 2
            for t in waiting:
                name = str(t["tokens"]) + (f" {t['routing']}" if t["routing"] != "balanced" else "")
                found.setdefault(name, {})[t["kernel"]] = {
                    "ms": t["ms"], "tflops": t["tflops"], "gemm_8192_tflops": round(square, 1),
                    "share_of_gemm_8192": round(t["tflops"] / square, 3)}
        else:
            waiting.append(line)
    return found


def variants_of(folder):
    """tokens -> kernel -> variant in words -> milliseconds by routing, in the order in which they ran."""
    found = {}
    for t in lines_of(folder.glob("variants*.txt")):
        words = f"blocks {t['blocks']}, stages {t['stages']}, {t['order']}, lag {t['lag']}"
        kernels = found.setdefault(str(t["tokens"]), {})
        kernels.setdefault(t["variant_of"], {}).setdefault(words, {})[t["routing"]] = t["ms"]
    return found


def record_of(folder):
    checks = list(lines_of(folder.glob("check*.txt")))
    return {"command": "tests/bench/sm90.sh", "machine": machine_of(folder),
            "checks": {"right": sum(c["right"] for c in checks), "of": len(checks),
                       "wrong": [c for c in checks if not c["right"]]},
            "instructions": [c["instruction"] for c in checks if "instruction" in c],
            "kernels": [{k: c[k] for k in ("routing", "kernel", "errors")} for c in checks if "kernel" in c],
            "times": times_of(folder), "variants": variants_of(folder)}


def show(record):
    print(f"{record['machine']['gpu']}: {record['checks']['right']} of {record['checks']['of']} checks right")
    for tokens, kernels in record["times"].items():
        for kernel, t in kernels.items():
            must, goal = FORETOLD.get(kernel, (0, 0)) if tokens == "32768" else (0, 0)
            print(f"{tokens:>11} {kernel:28} {t['ms']:8.3f} ms {t['tflops']:7.1f} TFLOP/s {t['share_of_gemm_8192']:.3f}"
                  + (f"  (foretold: must {must:.2f}, goal {goal:.2f})" if must else ""))
    show_variants(record)


def show_variants(record):
    for tokens, kernels in record.get("variants", {}).items():  # not in records of before there were any
        for kernel, variants in kernels.items():
            sums = {words: sum(ms.values()) for words, ms in variants.items()}
            first, best = next(iter(sums)), min(sums, key=sums.get)
            print(f"{tokens:>11} {kernel:12} {len(sums)} variants, first {sums[first]:8.3f} ms, "
                  f"best {sums[best]:8.3f} ms: {best}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/bench/results")
    arguments = parser.parse_args()
    if arguments.path.is_file():
        show(json.loads(arguments.path.read_text(encoding="utf-8")))
        return
    record = record_of(arguments.path)
    gpu = record["machine"]["gpu"].removeprefix("NVIDIA ").lower().replace(" ", "_")
    day = "".join(c for c in record["machine"]["date"] if c.isdigit())
    path = arguments.out / f"sm90_kernels_{gpu}_{day[:8]}_{day[8:14]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    show(record)
    print(path)


if __name__ == "__main__":
    sys.exit(run_tool("sm90_record", main))
