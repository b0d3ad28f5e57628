#!/usr/bin/env python3
"""Times one training step (forward, backward, clip, AdamW) of upmoe and of transformers at the same shapes.

The two take turns, each in a process of its own, with the same number of threads. transformers runs with whichever of
its experts implementations is faster, its sdpa attention and PyTorch's fused AdamW; bf16 means autocast there and bf16
weights with fp32 masters here. A side's time is the median over rounds of the median step. The result is printed and
written to tests/bench/results/.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERTS = ("eager", "grouped_mm")
COMMON = {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_act": "silu",
          "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 2048, "initializer_range": 0.02,
          "num_hidden_layers": 4, "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False,
          "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "attention_dropout": 0.0,
          "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "float32"}
SHAPES = {
    "tiny": {"sequences": 8, "seq_len": 256, "config": COMMON | {
        "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 688,
        "moe_intermediate_size": 176, "shared_expert_intermediate_size": 704, "vocab_size": 4096}},
    "mid": {"sequences": 4, "seq_len": 512, "config": COMMON | {
        "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2752,
        "moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816, "vocab_size": 8192}},
}


def peer_worker(job):
    """Runs inside the peer's Python: times steps of transformers and prints them as JSON."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    fields = {k: v for k, v in job["config"].items() if k not in ("torch_dtype", "rope_theta", "architectures")}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": job["config"]["rope_theta"]}
    config = transformers.AutoConfig.for_model(**fields, output_router_logits=True)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa",
                                                          experts_implementation=job["experts"])
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


def write_tokens(path, vocab_size, count):
    import h5py
    import numpy as np

    with h5py.File(path, "w") as file:
        file["tokens"] = np.random.default_rng(1).integers(0, vocab_size, count, dtype=np.uint32)
        file["document_ends"] = np.array([count], dtype=np.int64)
        file.attrs.update({"vocab_size": vocab_size, "eos_id": 0, "tokenizer_sha256": "0" * 64,
                           "format": "upmoe-tokens-1"})


def run_ours(args, folder, shape, precision):
    """`upmoe train` from random weights; a fresh run directory each time."""
    s = SHAPES[shape]
    model, tokens = folder / shape, folder / f"{shape}.h5"
    steps = args.steps + args.warmup
    if not tokens.exists():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(s["config"]), encoding="utf-8")
        write_tokens(tokens, s["config"]["vocab_size"], s["sequences"] * s["seq_len"] * 4 + 1)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    run = folder / "run.yaml"
    run.write_text(f"""run: {{dir: {run_dir}, seed: 1}}
model: {{path: {model}, init: random}}
data: {{train: [{{path: {tokens}, weight: 1.0}}], seq_len: {s["seq_len"]}}}
train: {{steps: {steps}, global_batch: {s["sequences"]}, micro_batch: {s["sequences"]}, precision: {precision}}}
log: {{every: 1, tensorboard: false}}
""", encoding="utf-8")
    done = subprocess.run([args.binary, "train", run], capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
    if done.returncode != 0:
        raise SystemExit(f"upmoe train failed with {done.returncode}:\n{done.stderr}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if "kind" not in record]
    for path in sorted(run_dir.rglob("*"), reverse=True):  # its checkpoint is large
        path.rmdir() if path.is_dir() else path.unlink()
    seconds = [record["seconds"] for record in records]
    return {"seconds": seconds, "step": median(seconds[args.warmup:]), "loss": records[-1]["loss"],
            "flops": records[-1]["flops"]}


def faster_peer(args, shape, precision, trials):
    """A short trial of each experts implementation; the rounds then time the faster one."""
    for name in EXPERTS:
        trials[name] = run_peer(args, shape, precision, name, steps=3, warmup=2, seconds_limit=40)
    ran = [name for name in EXPERTS if "error" not in trials[name]]
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
            "speed_ratio": theirs / mine, "upmoe_rounds": [r["seconds"] for r in ours],
            "transformers_rounds": [r["seconds"] for r in theirs_all], "transformers_trials": trials,
            "versions": {k: theirs_all[0][k] for k in ("torch", "transformers")}}


def machine():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    return {"processor": model, "cores": os.cpu_count(), "memory_bytes":
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.platform()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--peer-job", help=argparse.SUPPRESS)
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a round (default: 5)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "bench" / "results")
    args = parser.parse_args()
    if args.peer_job:
        return peer_worker(json.loads(args.peer_job))
    if not args.peer_python:
        parser.error("--peer-python is missing; use against_transformers.sh")
    results = []
    print(f"tokens per second, {args.threads} threads")
    print(f"{'shape':6}{'precision':11}{'upmoe':>12}{'transformers':>26}{'ratio':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for precision in args.precisions:
                r = measure(args, Path(folder), shape, precision)
                results.append(r)
                peer = f"{r['tokens_per_step'] / r['transformers_step_s']:,.0f} ({r['transformers_experts']})"
                print(f"{shape:6}{precision:11}{r['tokens_per_step'] / r['upmoe_step_s']:12,.0f}{peer:>26}"
                      f"{r['speed_ratio']:8.2f}x", flush=True)
    date = datetime.datetime.now(datetime.timezone.utc)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"against_transformers_{date:%Y%m%d_%H%M%S}.json"
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    command = " ".join(["tests/bench/against_transformers.sh", *sys.argv[3:]])
    record = {"date": date.isoformat(), "command": command, "commit": commit.stdout.strip(), "threads": args.threads,
              "machine": machine(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
