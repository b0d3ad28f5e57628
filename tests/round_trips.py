#!/usr/bin/env python3
"""Every family and shipped recipe to transformers and back: what upmoe writes is what transformers reads and writes.

    tests/round_trips.py [--build build/release] [NAME ...]      NAME: a recipe, without its -tiny.yaml, or a family

For each family a small model of it is made and saved by transformers, trained for eight steps and exported; so what
transformers wrote is read as well. For each recipe a dense model of a family that it is for is made likewise, upcycled,
trained and exported. What `upmoe upcycle` and `upmoe export` wrote is read by transformers: no key may be
missing, unexpected or mismatched, and the logits must agree (tests/check_export_in_transformers.py). transformers then
saves it again, and that directory must hold for upmoe the same model, tensor for tensor. Needs torch and transformers
(tests/golden/README.md) and a build with the target make_run; not part of the test suite. Exit status 0 only if all
agree.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import check_export_in_transformers
from check_export_in_transformers import ROOT, require_packages, run_tool

try:  # what --help does without
    import torch
    import transformers
    import yaml
    MISSING = check_export_in_transformers.MISSING
except ImportError as missing:
    MISSING = missing

WIDTH = 688  # of the FFN, which the tiny recipes are for
SIZES = dict(hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, initializer_range=0.1,
             bos_token_id=1, eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
# The dense family that a mixture family's recipes start from, and what its configuration says beside the sizes.
DENSE = {"qwen2_moe": ("qwen2", {}), "mixtral": ("mistral", {"sliding_window": None}), "deepseek": ("llama", {}),
         "qwen3_moe": ("qwen3", {"head_dim": 24}), "dots1": ("qwen3", {"head_dim": 24})}
# Of each family a case of tests/golden, whose config.json is what transformers makes a model of.
FAMILIES = {name: name for name in ("llama", "mistral", "gemma", "qwen3", "mixtral", "qwen3_moe", "deepseek", "dots1",
                                    "dbrx")} | {"qwen2": "dense_tied_gqa", "qwen2_moe": "moe_mixed"}


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def save_random(folder, config, draw=False):
    """`draw`: every matrix, as Llama's class leaves those of a mixture that was put into it as memory was."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if draw and weight.dim() > 1:
                weight.normal_(std=config.initializer_range)
            if weight.dim() == 1:  # norms and biases begin alike everywhere, and a mixed-up one would not show
                weight.add_(0.1 * torch.randn_like(weight))
        for name, weight in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)


def make_dense(folder, kind):
    model_type, more = DENSE[kind]
    save_random(folder, transformers.AutoConfig.for_model(model_type, **SIZES, **more))


def there_and_back(upmoe, folder, tokens):
    """A directory that upmoe wrote, read by transformers, saved by it, and read by upmoe again."""
    logits, again = folder.with_suffix(".safetensors"), folder.with_suffix(".again")
    run(upmoe, "eval", folder, "--data", tokens, "--seq-len", 32, "--sequences", 4, "--logits", logits)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        same = check_export_in_transformers.agrees(folder, logits, tokens, save=again)
    if not same:
        raise SystemExit(f"{folder.parent.name}, {folder.name}: {said.getvalue()}")
    differs = json.loads(run(upmoe, "inspect", folder, "--diff", again, "--json"))["difference"]
    if differs:
        raise SystemExit(f"{folder.parent.name}, {folder.name}: saved by transformers it is another model: {differs}")
    return re.search(r"largest difference (\S+)", said.getvalue())[1]


def train_and_export(upmoe, work, model, folder):
    """Steps enough for every copy of an expert to have been chosen: until then copies have one score, and torch.topk
    takes others of equals than upmoe."""
    run(upmoe, "train", work / "run.yaml", f"run.dir={folder / 'run'}", f"model.path={model}", "model.init=weights",
        "train.steps=8", "parallel.ep=1", "optimizer.lr=1e-3")
    run(upmoe, "export", folder / "run", "--to", folder / "trained", "--dtype", "fp32")
    return folder / "trained"


def family_round_trip(family, upmoe, work, folder):
    """A model of a family's golden case: windows shorter than the sequences, dense layers among mixtures, groups of
    experts."""
    save_random(folder / "model", transformers.AutoConfig.from_pretrained(ROOT / "tests/golden" / FAMILIES[family]),
                draw=family == "deepseek")
    start = there_and_back(upmoe, folder / "model", work / "tokens.h5")
    trained = train_and_export(upmoe, work, folder / "model", folder)
    end = there_and_back(upmoe, trained, work / "tokens.h5")
    written = json.loads((trained / "config.json").read_text())["architectures"][0]
    print(f"{family:20} {written:34} largest difference of a logit {start}, after eight steps {end}", flush=True)


def round_trip(recipe, upmoe, work, folder):
    family = yaml.safe_load(recipe.read_text())["target"].get("family", "qwen2_moe")
    dense, moe = folder / "dense", folder / "moe"
    make_dense(dense, family)
    if "grow" in yaml.safe_load(recipe.read_text()):  # of a mixture
        run(upmoe, "upcycle", ROOT / "configs/upcycle/qwen1.5-moe-a2.7b-tiny.yaml", "--from", dense, "--to",
            folder / "smaller")
        dense = folder / "smaller"
    # A router of zeros gives all experts one score, and torch.topk takes others of equals than upmoe.
    router = yaml.safe_load(recipe.read_text()).get("router", {}).get("method")
    zero = router == "zero"
    tokens = ["--prompts", work / "tokens.h5", "--prompt-seq-len", 32] if router == "prompts" else []
    if router == "neurons":
        tokens = ["--calibrate", work / "tokens.h5", "--calibrate-seq-len", 32]
    run(upmoe, "upcycle", recipe, "--from", dense, "--to", moe, *(["router.method=normal"] if zero else []), *tokens)
    report = json.loads((moe / "upcycle_report.json").read_text())
    error = max(layer["relative_error"] for layer in report["layers"])
    start = there_and_back(upmoe, moe, work / "tokens.h5")
    trained = train_and_export(upmoe, work, moe, folder)
    end = there_and_back(upmoe, trained, work / "tokens.h5")
    written = json.loads((trained / "config.json").read_text())["architectures"][0]
    print(f"{recipe.stem.removesuffix('-tiny'):20} {DENSE[family][0]:8} -> {written:22} step-0 error {error:8.2e}; "
          f"largest difference of a logit {start}, after eight steps {end}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=ROOT / "build/release")
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    recipes = sorted((ROOT / "configs/upcycle").glob("*-tiny.yaml"))
    known = [r.stem.removesuffix("-tiny") for r in recipes]
    for name in args.names:
        if name not in known and name not in FAMILIES:
            parser.error(f"no recipe or family '{name}'; there are {', '.join([*FAMILIES, *known])}")
    require_packages(MISSING)
    with tempfile.TemporaryDirectory() as top:
        upmoe, work = args.build / "upmoe", Path(top) / "run"
        run(args.build / "bin/make_run", work)
        for name, way, what in [*((f, family_round_trip, f) for f in FAMILIES),
                                *((name, round_trip, recipe) for recipe, name in zip(recipes, known))]:
            if not args.names or name in args.names:
                folder = Path(top) / name
                folder.mkdir()
                way(what, upmoe, work, folder)


if __name__ == "__main__":
    sys.exit(run_tool("round_trips", main))
