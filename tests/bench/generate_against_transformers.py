#!/usr/bin/env python3
"""Times generation of one answer by upmoe and by transformers at the same shape, random weights, on a CPU.

    tests/bench/generate_against_transformers.py --peer-python PYTHON_WITH_TORCH

Prefill is a prompt up to the first new token, decode the mean of the tokens behind it: of `upmoe generate --bench` at
one request at once here, of generate(do_sample=False) with its cache there. The two take turns, each in a process of
its own with the same number of threads and a few tokens to warm up, and a plain read of memory is timed in every round.
A side's figure is the median over rounds. The share of bandwidth is what decoding one token reads of the weights (all
but the rows of the embedding), by its time, of that plain read. Prefill stands beside training's forward as well: that
of `upmoe eval` over sequences as long as the prompt, logits and losses of all their tokens included. No program could
be faster at a prompt than the products with the layers' weights that the first new token needs (of the last layer, what
later tokens see of all tokens and the rest of one) at the machine's best rate, which `upmoe doctor --measure` takes at
the start: how far that is from either side is told. The result is printed and written to tests/bench/results/. Run it
on a machine that does nothing else.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bench_record import ROOT, checked, run_tool, write_record, write_tokens

# About 300 million parameters.
SHAPE = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "rope_theta": 1e6, "max_position_embeddings": 4096, "initializer_range": 0.02, "attention_dropout": 0.0,
         "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "float32",
         "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 32000}
BYTES = {"fp32": 4, "bf16": 2}
READ_BYTES = 1 << 30  # of the plain read: beyond every cache
FORWARD_SEQUENCES = 8


def peer_worker(job):
    """Runs inside the peer's Python: times transformers and prints what it found as JSON."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.manual_seed(1)
    fields = {k: v for k, v in job["config"].items() if k not in ("torch_dtype", "rope_theta", "architectures")}
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": job["config"]["rope_theta"]}
    config = transformers.AutoConfig.for_model(**fields)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    prompt = torch.randint(config.vocab_size, (1, job["prompt"]))

    def seconds(new_tokens):
        start = time.perf_counter()
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens,
                              min_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None,
                              pad_token_id=0)
        took = time.perf_counter() - start
        if made.shape[1] != job["prompt"] + new_tokens:
            raise SystemExit(f"{made.shape[1] - job['prompt']} new tokens, {new_tokens} were asked for")
        return took

    with torch.inference_mode():
        seconds(3)
        prefill, all_of_it = seconds(1), seconds(job["new"])
    print(json.dumps({"prefill_seconds": prefill, "token_seconds": (all_of_it - prefill) / (job["new"] - 1),
                      "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                      "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                   "python": sys.version.split()[0]}}))


def run_peer(args, config, precision):
    job = {"threads": args.threads, "precision": precision, "prompt": args.prompt, "new": args.new, "config": config}
    return json.loads(checked([args.peer_python, __file__, "--peer-job", json.dumps(job)],
                              args.threads).stdout.splitlines()[-1])


def run_ours(args, model, precision):
    done = checked([args.binary, "generate", model, "--bench", "--in", str(args.prompt), "--out", str(args.new),
                    "--concurrency", "1", "--rounds", "1", "--precision", precision, "--device", "cpu", "--json"],
                   args.threads)
    rates = json.loads(done.stdout)["models"][0]["rates"][0]
    return {"prefill_seconds": rates["prefill_seconds"], "token_seconds": rates["decode_seconds"] / (args.new - 1),
            "weight_bytes": rates["weight_bytes"]}


def write_weights(folder, config, length):
    """The shape with random weights, and tokens for it: what `upmoe eval` needs."""
    shape = folder / "shape.json"
    shape.write_text(json.dumps(config), encoding="utf-8")
    checked([sys.executable, ROOT / "launch" / "make_random_dense.py", folder / "weights", "--config", shape,
             "--dtype", "fp32"], 1)
    write_tokens(folder / "tokens.h5", config["vocab_size"], FORWARD_SEQUENCES * length + 1)


def run_forward(args, folder, precision):
    """Seconds of a forward of training's over as many tokens as the prompt has."""
    done = checked([args.binary, "eval", folder / "weights", "--data", folder / "tokens.h5", "--seq-len",
                    str(args.prompt), "--micro-batch", "1", "--precision", precision, "--device", "cpu"], args.threads)
    found = json.loads(done.stdout)
    return found["seconds"] * args.prompt / found["tokens"]


def read_bandwidth(threads, size=READ_BYTES, repeats=5):
    """Bytes per second of the fastest of some plain reads of memory, by so many threads."""
    import numpy as np

    parts = np.array_split(np.ones(size // 4, dtype=np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # without the interpreter's lock
            best = min(best, time.perf_counter() - start)
    return size / best


def bytes_of_a_token(config, precision, weight_bytes):
    """Of the weights, what decoding one token reads."""
    return weight_bytes - BYTES[precision] * config["vocab_size"] * config["hidden_size"]


def product_rates(args):
    """Operations per second in products, at best, of both precisions."""
    words = checked([args.binary, "doctor", "--measure", "--device", "cpu"], args.threads).stdout
    told = {precision: re.search(rf"^{precision}_tflops: ([0-9.e+-]+)$", words, re.MULTILINE) for precision in BYTES}
    if None in told.values():
        raise SystemExit(f"{args.binary} doctor --measure tells no rates of products:\n{words}")
    return {precision: 1e12 * float(rate[1]) for precision, rate in told.items()}


def seconds_of_products(config, precision, weight_bytes, tokens, rate):
    """Of so many tokens times all weights but the embedding's and the head's, at `rate` operations per second; of the
    last layer all tokens need keys and values, and the last token the rest: the queries, the output, the FFN."""
    width = config["hidden_size"]
    tables = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * width
    of_one_token = width * (2 * width + 3 * config["intermediate_size"])
    return 2 * (tokens * (weight_bytes / BYTES[precision] - tables) - (tokens - 1) * of_one_token) / rate


def summary(config, precision, rounds, prompt, product_rate):
    """Of rounds, each with both sides, `read_bytes_per_s` and `forward_seconds`: medians, ratios and shares. A side's
    share of the products' limit is what products with weights alone would take at `product_rate`, by what it took."""
    held = [side["weight_bytes"] for r in rounds for side in (r["upmoe"], r["transformers"])]
    if max(held) > 1.001 * min(held):  # what lies between tensors is less
        raise SystemExit(f"the two hold different weights: {held}")
    read = bytes_of_a_token(config, precision, rounds[0]["upmoe"]["weight_bytes"])
    bandwidth = median(r["read_bytes_per_s"] for r in rounds)
    products = seconds_of_products(config, precision, rounds[0]["upmoe"]["weight_bytes"], prompt, product_rate)
    result = {"precision": precision, "read_bytes_per_s": bandwidth, "bytes_of_a_token": read,
              "product_rate": product_rate, "products_seconds": products}
    for side in ("upmoe", "transformers"):
        prefill, token = (median(r[side][key] for r in rounds) for key in ("prefill_seconds", "token_seconds"))
        result[side] = {"prefill_seconds": prefill, "token_seconds": token, "bandwidth_share": read / token / bandwidth,
                        "products_share": products / prefill}
    for key in ("prefill_seconds", "token_seconds"):
        result[f"{key}_ratio"] = median(r["transformers"][key] / r["upmoe"][key] for r in rounds)
    result["forward_seconds"] = median(r["forward_seconds"] for r in rounds)
    result["prefill_of_forward"] = median(r["forward_seconds"] / r["upmoe"]["prefill_seconds"] for r in rounds)
    return result


def print_summary(args, r):
    print(f"\n{r['precision']}: a plain read {r['read_bytes_per_s'] * 1e-9:.1f} GB/s, products "
          f"{r['product_rate'] * 1e-12:.3f} TFLOP/s")
    print(f"{'':14}{'prefill, tokens/s':>19}{'of products':>13}{'ms per token':>14}{'of bandwidth':>14}")
    for side in ("upmoe", "transformers"):
        s = r[side]
        print(f"{side:14}{args.prompt / s['prefill_seconds']:19.1f}{100 * s['products_share']:11.1f} %"
              f"{1e3 * s['token_seconds']:14.2f}{100 * s['bandwidth_share']:12.1f} %")
    print(f"{'ratio':14}{r['prefill_seconds_ratio']:18.2f}x{'':13}{r['token_seconds_ratio']:13.2f}x")
    print(f"a prompt's products with weights alone, at that rate: {args.prompt / r['products_seconds']:.1f} tokens/s, "
          f"{1 / r['transformers']['products_share']:.2f} times transformers")
    print(f"training's forward: {args.prompt / r['forward_seconds']:.1f} tokens/s, of which prefill reaches "
          f"{100 * r['prefill_of_forward']:.1f} %", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with torch and transformers")
    parser.add_argument("--peer-job", help=argparse.SUPPRESS)
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    parser.add_argument("--precisions", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--new", type=int, default=64, help="new tokens, 2 or more (default: 64)")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "bench" / "results")
    args = parser.parse_args()
    if not args.peer_job and not args.peer_python:
        parser.error("--peer-python is missing: a Python with torch and transformers")
    if args.new < 2 or args.prompt < 1 or args.rounds < 1:
        parser.error("--new is 2 or more, --prompt and --rounds 1 or more")
    return args


def main():
    args = parse_arguments()
    if args.peer_job:
        return peer_worker(json.loads(args.peer_job))
    config = SHAPE | {"num_hidden_layers": args.layers}
    results, versions = [], {"python": sys.version.split()[0]}
    versions["upmoe"] = subprocess.run([args.binary, "--version"], capture_output=True, text=True,
                                       check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_weights(Path(folder), config, args.prompt)
        print("the machine's products", file=sys.stderr, flush=True)
        rates = product_rates(args)
        for precision in args.precisions:
            rounds = []
            for number in range(args.rounds):
                print(f"{precision}, round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
                rounds.append({"read_bytes_per_s": read_bandwidth(args.threads),
                               "upmoe": run_ours(args, model, precision),
                               "forward_seconds": run_forward(args, Path(folder), precision),
                               "transformers": run_peer(args, config, precision)})
                versions["peer"] = rounds[-1]["transformers"].pop("versions")
            results.append(summary(config, precision, rounds, args.prompt, rates[precision]) | {"rounds": rounds})
            print_summary(args, results[-1])
    write_record(args.out, Path(__file__).name, sys.argv[1:], results, threads=args.threads, versions=versions,
                 config=config, prompt_tokens=args.prompt, new_tokens=args.new)


if __name__ == "__main__":
    sys.exit(run_tool("generate_against_transformers", main))
