"""What the benchmark scripts share: their arguments, the files they run on, and the record they leave."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "launch"))
from command_line import BadUsage, own_python, run_tool  # noqa: E402, F401  run_tool of the scripts that import this

DECODER = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 2048,
           "initializer_range": 0.02, "num_hidden_layers": 4, "attention_dropout": 0.0, "tie_word_embeddings": False,
           "torch_dtype": "float32"}
COMMON = DECODER | {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 60,
                    "num_experts_per_tok": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                    "router_aux_loss_coef": 0.001, "use_sliding_window": False}
# Of other families, with the ratios of their published shapes; the window is a part of a sequence, as in long ones.
TINY = DECODER | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}
SHAPES = {
    "tiny": {"sequences": 8, "seq_len": 256, "config": COMMON | {
        "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 688,
        "moe_intermediate_size": 176, "shared_expert_intermediate_size": 704, "vocab_size": 4096}},
    "mid": {"sequences": 4, "seq_len": 512, "config": COMMON | {
        "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2752,
        "moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816, "vocab_size": 8192}},
    "tiny_mistral": {"sequences": 8, "seq_len": 256, "config": TINY | {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "intermediate_size": 896,
        "sliding_window": 64}},
    "tiny_gemma": {"sequences": 8, "seq_len": 256, "config": TINY | {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 4, "head_dim": 96, "intermediate_size": 2048,
        "tie_word_embeddings": True}},
    "tiny_qwen3_moe": {"sequences": 8, "seq_len": 256, "config": TINY | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 128, "intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 96, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "attention_bias": False,
        "use_sliding_window": False}},
    "tiny_mixtral": {"sequences": 8, "seq_len": 256, "config": TINY | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "intermediate_size": 896,
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "sliding_window": None}},
}


def parser_of(description, shapes, precisions):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=precisions)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a round (default: 5)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "bench" / "results")
    return parser


def machine():
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    return {"processor": model, "cores": os.cpu_count(), "memory_bytes":
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "system": platform.platform()}


def write_record(folder, script, arguments, results, *, date=None, **more):
    """folder/NAME_DATE.json with what was run, on what, and what came out. Prints its path. With the `date` of an
    earlier call (default: now) it takes that one's place, without a word."""
    date = date or datetime.datetime.now(datetime.timezone.utc)
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    record = {"date": date.isoformat(), "command": " ".join([f"tests/bench/{script}", *arguments]),
              "commit": commit.stdout.strip(), **more, "machine": machine(), "results": results}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(script).stem}_{date:%Y%m%d_%H%M%S}.json"
    words = None if path.exists() else path
    part = path.with_suffix(".part")  # a reader, and who stops this, finds a whole record
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    if words:
        print(words, flush=True)


def write_tokens(path, vocab_size, count):
    try:
        import h5py
        import numpy as np
    except ImportError as missing:
        raise BadUsage(own_python(missing)) from None

    with h5py.File(path, "w") as file:
        file["tokens"] = np.random.default_rng(1).integers(0, vocab_size, count, dtype=np.uint32)
        file["document_ends"] = np.array([count], dtype=np.int64)
        file.attrs.update({"vocab_size": vocab_size, "eos_id": 0, "tokenizer_sha256": "0" * 64,
                           "format": "upmoe-tokens-1"})


def write_run(folder, run_dir, shape, precision, *, steps, micro_batches=1, global_batch=None, parallel=None,
              recompute="none", save_every=0):
    """The file of a run in run_dir; model and tokens are made in `folder`, once."""
    s = SHAPES[shape]
    model, tokens = folder / shape, folder / f"{shape}.h5"
    if not tokens.exists():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(s["config"]), encoding="utf-8")
        write_tokens(tokens, s["config"]["vocab_size"], s["sequences"] * s["seq_len"] * 4 + 1)
    batch = global_batch or s["sequences"]
    config = Path(run_dir) / "run.yaml"
    config.write_text(f"""run: {{dir: {run_dir}/run, seed: 1}}
model: {{path: {model}, init: random}}
data: {{train: [{{path: {tokens}, weight: 1.0}}], seq_len: {s["seq_len"]}}}
train: {{steps: {steps}, global_batch: {batch}, micro_batch: {batch // micro_batches}, precision: {precision},
         recompute: {recompute}}}
parallel: {json.dumps(parallel or {})}
checkpoint: {{every: {save_every}}}
log: {{every: 1, tensorboard: false}}
""", encoding="utf-8")
    return config


def local_ranks(ranks):
    return [ROOT / "launch" / "run_local.sh", str(ranks)] if ranks > 1 else []


def checked(command, threads):
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed with {done.returncode}:\n{done.stderr}")
    return done


def choices_of(binary, key):
    """The values that a run's key takes, as the program's help names them."""
    words = checked([binary, "train", "--help"], 1).stdout
    told = re.search(rf"^ *{re.escape(key)} = .*\[(.*)\]$", words, re.MULTILINE)
    if told is None:
        raise SystemExit(f"{binary} train --help tells no values of {key}")
    return told[1].split(" | ")


def train(folder, binary, shape, precision, *, ranks=1, threads=2, launcher=None, **run):
    """A run in a folder of its own; (its metrics, one for each step, and what it said)."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:  # with its checkpoint, which is large
        config = write_run(folder, run_dir, shape, precision, **run)
        done = checked([*(launcher or local_ranks(ranks)), binary, "train", config], max(1, threads // ranks))
        lines = (Path(run_dir) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "kind" not in record], done.stderr
