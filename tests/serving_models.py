#!/usr/bin/env python3
"""Writes a small model of every family, for launch/after_training.sh: random weights of a wide range, with noise on
norms and biases, so that a greedy answer has many different tokens, and depends on each kind of tensor.

    .venv/bin/python tests/serving_models.py OUT
    for model in OUT/models/*; do launch/after_training.sh "$model" --record; done

OUT/models/FAMILY is a directory as upmoe exports it, with a tokenizer of the project's documents. Takes a minute.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))
from command_line import ToolParser, end_without_package, own_python, run_tool  # noqa: E402

VOCAB, LENGTH = 2048, 64
NOISE = 0.2  # deviation of what is added to norms and biases
COMMON = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
          "rope_theta": 1e4, "hidden_act": "silu", "initializer_range": 0.15, "attention_dropout": 0.0,
          "tie_word_embeddings": False, "bos_token_id": VOCAB - 1, "eos_token_id": VOCAB - 1, "torch_dtype": "float32"}
DENSE_FIRST = {"n_routed_experts": 32, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 80,
               "first_k_dense_replace": 1, "moe_layer_freq": 1}
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 96,
                               "shared_expert_intermediate_size": 384, "norm_topk_prob": False,
                               "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "qwen3": ("Qwen3", {"head_dim": 64}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 64, "num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": True,
                               "moe_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma": ("Gemma", {"head_dim": 48, "num_key_value_heads": 1, "hidden_act": "gelu_pytorch_tanh",
                        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "deepseek": ("Deepseek", DENSE_FIRST | {"norm_topk_prob": False, "scoring_func": "softmax"}),
    "dots1": ("Dots1", DENSE_FIRST | {"head_dim": 64, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
                                      "routed_scaling_factor": 1.0, "scoring_func": "sigmoid"}),
    "dbrx": ("Dbrx", {"d_model": 128, "n_layers": 3, "n_heads": 2, "max_seq_len": 2048,
                      "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 1, "rope_theta": 1e4},
                      "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 16, "moe_top_k": 4,
                                     "moe_normalize_expert_weights": 1.0}}),
}


def config_of(family):
    name, own = FAMILIES[family]
    common = COMMON
    if family == "dbrx":  # which has names of its own
        common = {key: COMMON[key] for key in ("vocab_size", "initializer_range", "tie_word_embeddings",
                                               "bos_token_id", "eos_token_id", "torch_dtype")}
    return common | {"model_type": family, "architectures": [f"{name}ForCausalLM"]} | own


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr.strip()[-400:]}")


def add_noise(path):
    """To every vector of a safetensors file in F32; the file says where each lies."""
    import numpy as np
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    random, values = np.random.default_rng(3), np.memmap(path, "<u1", "r+")
    for name, entry in header.items():
        if name != "__metadata__" and len(entry["shape"]) == 1:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            vector = values[begin:end].copy().view("<f4")
            values[begin:end] = (vector + random.normal(0, NOISE, vector.size).astype("<f4")).view("<u1")
    values.flush()


def write_model(binary, out, family):
    shape, model = out / "shapes" / family, out / "models" / family
    shape.mkdir(parents=True)
    (shape / "config.json").write_text(json.dumps(config_of(family)), encoding="utf-8")
    shutil.copy(out / "tokens" / "tokenizer.json", shape)
    run(binary, "train", out / "run.yaml", f"run.dir={out / 'runs' / family}", f"model.path={shape}")
    run(binary, "export", out / "runs" / family, "--to", model, "--dtype", "fp32")
    for path in model.glob("*.safetensors"):
        add_noise(path)
    print(f"{model}", flush=True)


def main():
    parser = ToolParser(prog="serving_models.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder that is made")
    parser.add_argument("--binary", type=Path, default=ROOT / "build" / "release" / "upmoe")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    args = parser.parse_args()
    try:
        import numpy  # noqa: F401
    except ImportError as e:
        end_without_package("serving_models", own_python(e))
    out = args.out.resolve()
    (out / "tokens").mkdir(parents=True)
    run(sys.executable, ROOT / "data" / "tokenize.py", "--train-vocab", VOCAB, "--tokenizer",
        out / "tokens" / "tokenizer.json", "--out", out / "tokens" / "train.h5", *sorted(ROOT.glob("docs/*.md")))
    (out / "run.yaml").write_text(
        "run: {dir: set, seed: 1}\nmodel: {path: set, init: random}\n"
        f"data: {{train: [{{path: {out / 'tokens' / 'train.h5'}, weight: 1.0}}], seq_len: {LENGTH}}}\n"
        "train: {steps: 1, global_batch: 2, micro_batch: 2, precision: fp32}\noptimizer: {lr: 1.0e-4}\n"
        "log: {tensorboard: false}\n", encoding="utf-8")
    for family in args.families:
        write_model(args.binary.resolve(), out, family)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("serving_models", main))
