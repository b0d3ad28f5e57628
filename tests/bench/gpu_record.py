#!/usr/bin/env python3
"""The folder that `tests/gpu_suite.sh run` left, as one result file, and its figures side by side.

usage: gpu_record.py FOLDER [--out tests/bench/results]    writes the file, and prints
       gpu_record.py RESULT.json                           prints

Ratios to PyTorch and transformers are of the same run on the same GPU. Nothing is computed here but ratios and tables.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from bench_record import run_tool

ROOT = Path(__file__).resolve().parent.parent.parent
FIRST_STEP = 3  # the first steps choose algorithms and take memory
PUBLISHED_BACKWARD = 2.5 / 2  # attention's backward as published figures count it, in forwards, and as ours do
# Of which the record keeps what they said.
WORDS = ("models/beside_the_cpu", "step/fused_twice_the_same", "step/fused_as_streams", "inference/inference",
         "quickstart/same_as_on_cpu")
PEAK_TFLOPS = 989.0  # TFLOP/s, the data sheet's dense bf16 of an H100 or H200 SXM


def lines_of(path):
    """JSON lines of a file that holds other lines too."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def machine_of(folder):
    lines = (folder / "machine.txt").read_text(encoding="utf-8").splitlines()
    date, commit = lines[:2]
    gpus = [line for line in lines[2:] if line.count(",") == 2]  # one line each
    system, *libraries = lines[2 + len(gpus):]
    name, driver, memory = (part.strip() for part in gpus[0].split(","))
    return {"date": date, "commit": commit, "gpu": name, "gpus": len(gpus), "driver": driver, "gpu_memory": memory,
            "system": system, "libraries": libraries}


def checks_of(folder):
    """part -> name -> {status, seconds}."""
    found = {}
    for path in sorted(folder.glob("*/summary.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.fullmatch(r"(\S+): status (\d+), (\d+) s", line):
                found.setdefault(path.parent.name, {})[match[1]] = {"status": int(match[2]), "seconds": int(match[3])}
    return found


def benchmarks_of(text):
    """What Google Benchmark wrote, to the last result of a program that was ended."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        whole = text.rfind("\n    }")
        return json.loads(text[:whole] + "\n    }]}") if whole >= 0 else {"benchmarks": []}


def ops_of(folder):
    path = folder / "bench" / "bench_gpu.json"
    if not path.exists():
        return {}
    data = benchmarks_of(path.read_text(encoding="utf-8"))
    ops = {b["name"].removesuffix("/iterations:1/manual_time"): {
        "microseconds": round(b["real_time"], 1), "tflops": round(b["tflops"], 1),
        "gbytes_per_s": round(b["gbytes"]), "share_of_limit": round(b["share"], 3)}
        for b in data["benchmarks"] if "real_time" in b and "share" in b}
    after = [b["tflops"] for b in data["benchmarks"] if b["name"].startswith("gemm_8192_cubed/after")]
    # Kernels' authors count the product that makes the scores again; the model's FLOPs are without it.
    for name, op in ops.items():
        if name.startswith("attention_backward/"):
            op["published_tflops"] = round(op["tflops"] * PUBLISHED_BACKWARD, 1)
    if not ops:
        return {}
    return {"gemm_8192_tflops": float(data["context"]["gemm_tflops"]),
            "gemm_8192_tflops_after": round(after[0], 1) if after else None,
            "add_gbytes_per_s": float(data["context"]["gbytes_per_second"]), "ops": ops}


def fusions_of(ops):
    """Each pass that stands for several beside those: what it gains, and what it would if all were bound by memory."""
    found = {}
    for name, apart in ops.get("ops", {}).items():
        fused = ops["ops"].get(name.replace("_apart/", "/"))
        if "_apart/" in name and fused is not None:
            moved = [op["gbytes_per_s"] * op["microseconds"] for op in (apart, fused)]
            found[name.replace("_apart/", "/")] = {
                "microseconds": fused["microseconds"], "apart_microseconds": apart["microseconds"],
                "times_as_fast": round(apart["microseconds"] / fused["microseconds"], 2),
                "by_bytes": round(moved[0] / moved[1], 2)}
    return found


def step_of(path):
    """Of a file of bench_step: what the steps after the first ones took, and the shares of one step."""
    all_lines = list(lines_of(path))
    steps = [x for x in all_lines if "tokens_per_s" in x and x["step"] >= FIRST_STEP]
    if not steps:
        return None
    seconds = sorted(x["seconds"] for x in steps)
    median = seconds[len(seconds) // 2]
    chosen = next(x for x in steps if x["seconds"] == median)
    result = {"steps": len(steps), "seconds": median, "seconds_of_all": [x["seconds"] for x in steps],
              "tokens_per_s": chosen["tokens_per_s"], "model_tflops": chosen["tflops"],
              "share_of_989": round(chosen["tflops"] / PEAK_TFLOPS, 3),
              "losses": [x["loss"] for x in all_lines if "tokens_per_s" in x]}
    for x in all_lines:
        if "gpu_memory_used_mib_peak" in x:
            result["gpu_memory_used_mib_peak"] = x["gpu_memory_used_mib_peak"]
        if "parameters_bytes" in x:
            result["memory"] = x
    result["milliseconds_by_op"] = {x["op"]: x["milliseconds"] for x in all_lines if "op" in x}
    return result


def steps_of(folder):
    found = {}
    for path in sorted(path for part in ("step", "full", "largest") for path in folder.glob(f"{part}/*.txt")):
        if path.name != "summary.txt" and (step := step_of(path)) is not None:
            found[path.stem] = step
    return found


def peers_of(folder):
    path = folder / "peers" / "gpu_peers.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def best_peer(peers, name):
    times = [(r["milliseconds"], r.get("experts", "")) for r in peers.get("results", [])
             if r["name"] == name and "milliseconds" in r]
    return min(times, default=None)


def ratios_of(ops, steps, peers):
    """Ours and the fastest of theirs, in milliseconds, where both were measured."""
    ratios = {}

    def compare(name, ours, peer):
        if ours is not None and peer is not None:
            ratios[name] = {"upmoe_ms": round(ours, 3), "peer_ms": round(peer[0], 3), "peer": peer[1],
                            "times_as_fast": round(peer[0] / ours, 2)}

    def microseconds(*names):
        found = [ops.get("ops", {}).get(name) for name in names]
        return None if None in found else sum(op["microseconds"] for op in found) / 1000

    for tokens in (8192, 16384, 32768):
        compare(f"attention forward, {tokens} tokens", microseconds(f"attention_forward/{tokens}"),
                best_peer(peers, f"attention_forward/{tokens}"))
        compare(f"attention forward and gradient, {tokens} tokens",
                microseconds(f"attention_forward/{tokens}", f"attention_backward/{tokens}"),
                best_peer(peers, f"attention_forward_and_gradient/{tokens}"))
        compare(f"experts' first product, {tokens} tokens", microseconds(f"grouped_gemm_forward/gate_up/{tokens}"),
                best_peer(peers, f"grouped_mm gate_up forward, balanced/{tokens}") or
                best_peer(peers, f"grouped_mm gate_up/{tokens}"))  # as older results name it
        compare(f"layer forward and backward, {tokens} tokens", microseconds(f"layer_forward_backward/{tokens}"),
                best_peer(peers, f"layer_forward_backward/{tokens}"))
        step = steps.get(f"four_layers_{tokens}")
        compare(f"step of 4 layers, {tokens} tokens", step and step["seconds"] * 1000,
                best_peer(peers, f"step of 4 layers/{tokens}"))
    return ratios


def show(record):
    print(f"{record['machine']['gpu']}, driver {record['machine']['driver']}, {record['machine']['date']}")
    for part, checks in record["checks"].items():
        bad = [name for name, c in checks.items() if c["status"] != 0]
        print(f"  {part}: {len(checks) - len(bad)} of {len(checks)} with status 0"
              + (f"; not: {', '.join(bad)}" if bad else ""))
    if "gemm_8192_tflops" in record["ops"]:
        after = record["ops"].get("gemm_8192_tflops_after")
        print(f"  8192 cubed: {record['ops']['gemm_8192_tflops']:.1f} TFLOP/s, of which the shares below are"
              + (f"; {after:.1f} after all of them, on a warm card" if after else ""))
    for name, op in record["ops"].get("ops", {}).items():
        print(f"  {name:44} {op['microseconds']:10.1f} us {op['tflops']:7.1f} TFLOP/s {op['gbytes_per_s']:6} GB/s  "
              f"{op['share_of_limit']:6.1%} of the limit"
              + (f"  ({op['published_tflops']} as published figures count)" if "published_tflops" in op else ""))
    for name, f in record.get("fusions", {}).items():
        print(f"  {name:44} {f['microseconds']:10.1f} us, its passes apart {f['apart_microseconds']:.1f}: "
              f"{f['times_as_fast']} times as fast ({f['by_bytes']} by the bytes they move)")
    for name, step in record["steps"].items():
        print(f"  {name}: {step['tokens_per_s']:,.0f} tokens/s, {step['model_tflops']:.0f} TFLOP/s, "
              f"{step['share_of_989']:.1%} of 989, {step.get('gpu_memory_used_mib_peak', 0):,} MiB")
    for name in WORDS:
        for line in record.get(name, []):
            print(f"  {name}: {line}")
    for name, r in record["ratios"].items():
        print(f"  {name}: {r['upmoe_ms']} ms, theirs {r['peer_ms']} ({r['peer'] or 'PyTorch'}): "
              f"{r['times_as_fast']} times as fast")


def record_of(folder):
    ops, steps, peers = ops_of(folder), steps_of(folder), peers_of(folder)
    record = {"command": "tests/gpu_suite.sh run", "machine": machine_of(folder), "checks": checks_of(folder),
              "ops": ops, "fusions": fusions_of(ops), "steps": steps, "peers": peers,
              "ratios": ratios_of(ops, steps, peers)}
    for name in WORDS:
        path = folder / f"{name}.txt"
        if path.exists():
            record[name] = path.read_text(encoding="utf-8").splitlines()
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "bench" / "results")
    args = parser.parse_args()
    if args.source.is_file():
        show(json.loads(args.source.read_text(encoding="utf-8")))
        return
    if not (args.source / "machine.txt").is_file():
        parser.error(f"{args.source} is neither a result file nor a folder that `tests/gpu_suite.sh run` left "
                     "(no machine.txt)")
    record = record_of(args.source)
    show(record)
    day, time = record["machine"]["date"].split("T")
    name = record["machine"]["gpu"].lower().replace("nvidia ", "").replace(" ", "_")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu_suite_{name}_{day.replace('-', '')}_{time[:8].replace(':', '')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    sys.exit(run_tool("gpu_record", main))
