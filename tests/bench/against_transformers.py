#!/usr/bin/env python3
"""Times one training step (forward, backward, clip, AdamW) of upmoe and of transformers at the same shapes.

The two take turns, each in a process of its own, with the same number of threads. transformers runs with its sdpa
attention, PyTorch's fused AdamW and, of a mixture, whichever of its experts implementations is faster; bf16 means
autocast there and bf16 weights with fp32 masters here. A side's time is the median over rounds of the median step. The
result is printed, and written to tests/bench/results/ after each line.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_record import SHAPES, parser_of, run_tool, train, write_record

EXPERTS = ("eager", "grouped_mm")  # of mixtures
DENSE = ("none",)


def peer_worker(job):
    """Runs inside the peer's Python: times steps of transformers and prints them as JSON."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    fields = {k: v for k, v in job["config"].items() if k not in ("torch_dtype", "rope_theta", "architectures")}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": job["config"]["rope_theta"]}
    mixture = job["experts"] not in DENSE
    config = transformers.AutoConfig.for_model(**fields, **({"output_router_logits": True} if mixture else {}))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa",
        **({"experts_implementation": job["experts"]} if mixture else {}))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(config.vocab_size, (job["sequences"], job["seq_len"]))
    seconds, loss = [], None
    began = time.perf_counter()
    for i in range(job["steps"]):
        if i > job["warmup"] and time.perf_counter() - began > job["seconds_limit"]:
            break
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job["precision"] == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "loss": loss.item(), "torch": torch.__version__,
                      "transformers": transformers.__version__}))


def run_peer(args, shape, precision, experts, steps, warmup, seconds_limit=1e9):
    job = {"threads": args.threads, "experts": experts, "precision": precision, "steps": steps + warmup,
           "warmup": warmup, "seconds_limit": seconds_limit, **SHAPES[shape]}
    done = subprocess.run([args.peer_python, __file__, "--peer-job", json.dumps(job)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"}
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"step": median(result["seconds"][warmup:])}


def run_ours(args, folder, shape, precision):
    records, _ = train(folder, args.binary, shape, precision, steps=args.steps + args.warmup, threads=args.threads)
    seconds = [record["seconds"] for record in records]
    return {"seconds": seconds, "step": median(seconds[args.warmup:]), "loss": records[-1]["loss"],
            "flops": records[-1]["flops"]}


def faster_peer(args, shape, precision, trials):
    """A short trial of each experts implementation; the rounds then time the faster one."""
    names = EXPERTS if "num_experts_per_tok" in SHAPES[shape]["config"] else DENSE
    for name in names:
        trials[name] = run_peer(args, shape, precision, name, steps=3, warmup=2, seconds_limit=40)
    ran = [name for name in names if "error" not in trials[name]]
    if not ran:
        raise SystemExit(f"transformers ran with none of its implementations: {trials}")
    return min(ran, key=lambda name: trials[name]["step"])


def measure(args, folder, shape, precision):
    ours, theirs_all, trials = [], [], {}
    best = faster_peer(args, shape, precision, trials)
    for _ in range(args.rounds):
        ours.append(run_ours(args, folder, shape, precision))
        theirs_all.append(run_peer(args, shape, precision, best, args.steps, args.warmup))
        if "error" in theirs_all[-1]:
            raise SystemExit(f"transformers failed after its trial: {theirs_all[-1]['error']}")
    tokens = SHAPES[shape]["sequences"] * SHAPES[shape]["seq_len"]
    mine, theirs = median(r["step"] for r in ours), median(r["step"] for r in theirs_all)
    return {"shape": shape, "precision": precision, "tokens_per_step": tokens, "flops_per_step": ours[-1]["flops"],
            "upmoe_step_s": mine, "transformers_step_s": theirs, "transformers_experts": best,
            # Of single rounds, in which the two took turns.
            "speed_ratio": median(t["step"] / o["step"] for o, t in zip(ours, theirs_all, strict=True)),
            "upmoe_rounds": [r["seconds"] for r in ours],
            "transformers_rounds": [r["seconds"] for r in theirs_all], "transformers_trials": trials,
            "versions": {k: theirs_all[0][k] for k in ("torch", "transformers")}}


def main():
    parser = parser_of(__doc__, list(SHAPES), ["fp32", "bf16"])
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--peer-job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer_job:
        return peer_worker(json.loads(args.peer_job))
    if not args.peer_python:
        parser.error("--peer-python is missing; use against_transformers.sh")
    results, date = [], datetime.datetime.now(datetime.timezone.utc)
    print(f"tokens per second, {args.threads} threads")
    print(f"{'shape':16}{'precision':11}{'upmoe':>12}{'transformers':>26}{'ratio':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                r = measure(args, Path(folder), shape, precision)
                results.append(r)
                peer = f"{r['tokens_per_step'] / r['transformers_step_s']:,.0f} ({r['transformers_experts']})"
                print(f"{shape:16}{precision:11}{r['tokens_per_step'] / r['upmoe_step_s']:12,.0f}{peer:>26}"
                      f"{r['speed_ratio']:8.2f}x", flush=True)
                write_record(args.out, "against_transformers.sh", sys.argv[3:], results, date=date,
                             threads=args.threads)


if __name__ == "__main__":
    sys.exit(run_tool("against_transformers", main))
