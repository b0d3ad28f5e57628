#!/usr/bin/env python3
"""The closing table of launch/quickstart.sh, from what its stages left in runs/quickstart or runs/quickstart_brief."""

import json
import struct
import sys
from math import prod
from pathlib import Path
from statistics import median

from command_line import BadInput, ToolParser, end_without_package, own_python, run_tool

try:
    import numpy as np
    from run_metrics import read_run
    from study_statistics import Curve, loss_difference
except ImportError as missing:
    end_without_package("quickstart_table", own_python(missing))

EXPORT_TOLERANCE = 1e-5
# Between what a run measured at its end and what `upmoe eval` measures of its checkpoint, relative: other sums.
LAYOUT_TOLERANCE = 1e-4
# An expert with less of a fair share than this, over the last tenth of the steps, has died.
UNUSED = 0.05

# title, file in eval/, model directory, run whose throughput belongs to it
ROWS = [("dense", "dense", "dense", "dense"),
        ("dense, continued", "dense_continued", "dense_continued", "dense_continued"),
        ("MoE, upcycled, step 0", "moe_step0", "moe", None),
        ("MoE, trained", "moe", "moe_trained", "moe")]


def shapes(model):
    """Name -> shape of every tensor of a Hugging Face directory, from the headers of its files."""
    found = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found


def parameters(model):
    """Total, and those one token passes through: of the routed experts only the chosen ones."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    sizes = {name: prod(shape) for name, shape in shapes(model).items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    experts, chosen = config.get("num_experts", 0), config.get("num_experts_per_tok", 0)
    return total, total - routed + (routed * chosen // experts if experts else 0)


def require_same_set(run, evaluated):
    """The pictures show a run's own held-out loss, the table that of `upmoe eval`: of the same sequences."""
    if not run.evals:
        raise BadInput(f"{run.path}/metrics.jsonl: holds no held-out loss")
    own = run.evals[-1]
    if own["eval_tokens"] != evaluated["tokens"]:
        raise BadInput(f"{run.path}: its held-out loss is over {own['eval_tokens']} tokens, the table's over "
                       f"{evaluated['tokens']}; train.eval_sequences and --sequences differ")
    if not abs(own["eval_loss"] - evaluated["loss"]) <= LAYOUT_TOLERANCE * abs(evaluated["loss"]):
        raise BadInput(f"{run.path}: its held-out loss at the end is {own['eval_loss']}, `upmoe eval` finds "
                       f"{evaluated['loss']} over the same tokens")


def stages_are_whole(folder, losses, runs):
    """Each run trained to its last step, each evaluation is a number that even an untrained model reaches, and there
    are pictures."""
    complete = all(run.steps and run.steps[-1]["step"] == len(run.steps) for run in runs.values())
    return complete and all(0 < loss < 20 for loss in losses.values()) and (folder / "report/report.html").is_file()


def read_losses(folder):
    """Of each evaluation its tokens and loss, all over the same number of tokens."""
    evaluated = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "eval").glob("*.json")}
    tokens_of_set = {e["tokens"] for e in evaluated.values()}
    if len(tokens_of_set) > 1:
        raise BadInput(f"{folder}/eval: losses over different numbers of tokens: {sorted(tokens_of_set)}")
    return evaluated


def print_rows(folder, evaluated, runs):
    """The table; returns what it shows."""
    rows = {}
    print(f"\n{'':24}{'held-out loss':>14}{'trained on':>14}{'tokens/s':>10}{'parameters':>13}{'active':>12}")
    for title, name, model, run in ROWS:
        total, active = parameters(folder / "models" / model)
        steps = runs[run].steps if run else []
        if run:
            require_same_set(runs[run], evaluated[name])
        speed = median(r["tokens_per_s"] for r in steps[len(steps) // 10:]) if steps else None
        tokens, loss = steps[-1]["tokens"] if steps else 0, evaluated[name]["loss"]
        rows[name] = {"heldout_loss": loss, "tokens": tokens, "tokens_per_s": speed, "parameters": total,
                      "active_parameters": active}
        print(f"{title:24}{loss:14.4f}{f'{tokens / 1e6:.2f} M' if tokens else '-':>14}"
              f"{f'{speed:,.0f}' if speed else '-':>10}{total:13,}{active:12,}")
    print("(the continued dense model and the MoE start from the dense one; their tokens come on top of its)\n")
    return rows


def curve(run):
    return Curve(np.array([r["eval_loss"] for r in run.evals]), {"flops": run.x(run.evals, "flops")})


def compare(losses, runs):
    """The mixture beside the dense model that goes on: for as many tokens, and for as many FLOPs. Whether it is better
    than both dense models, all of its experts in use; and what result.json says of it."""
    by_tokens = losses["moe"] - losses["dense_continued"]
    better = losses["moe"] < min(losses["dense"], losses["dense_continued"])
    print(f"MoE against dense {losses['moe'] - losses['dense']:+.4f}, against dense continued for as many tokens "
          f"{by_tokens:+.4f} nats per token: {'the MoE is better' if better else 'the MoE is not better'}")
    mixture, dense = curve(runs["moe"]), curve(runs["dense_continued"])
    by_flops, _ = loss_difference(mixture, dense, "flops")
    share = min(1.0, dense.end("flops") / mixture.end("flops"))
    print(f"for as many FLOPs ({dense.end('flops'):.2e}: the MoE after {share:.0%} of its tokens, its learning rate "
          f"still falling) {by_flops:+.4f}")
    load = runs["moe"].load_at_end()
    unused = int((load < UNUSED).sum())
    print(f"experts in the last tenth of its steps: of a fair share the least chosen has {load.min():.2f}, the most "
          f"chosen {load.max():.2f}; below {UNUSED}: {unused} of {load.size}")
    return better and not unused, {"difference_at_equal_tokens": by_tokens, "difference_at_equal_flops": by_flops,
                                   "least_expert_load": float(load.min()), "unused_experts": unused}


def table(folder, check, brief):
    evaluated = read_losses(folder)
    losses = {name: e["loss"] for name, e in evaluated.items()}
    runs = {run: read_run(folder / run, title, "") for title, _, _, run in ROWS if run}
    results = print_rows(folder, evaluated, runs)
    checkpoint, exported = losses["moe"], losses["moe_exported"]
    same = abs(checkpoint - exported) < EXPORT_TOLERANCE
    print(f"exported directory: held-out loss {exported:.6f}, checkpoint {checkpoint:.6f}: "
          f"{'the same' if same else 'NOT THE SAME'}")
    if brief:
        whole = stages_are_whole(folder, losses, runs)
        print(f"a brief run: every stage {'left its result' if whole else 'DID NOT LEAVE ITS RESULT'}; the losses "
              "above mean nothing (launch/quickstart.sh without --brief compares)")
        return 0 if same and (whole or not check) else 1
    convincing, comparison = compare(losses, runs)
    results |= comparison | {"exported_heldout_loss": exported}
    (folder / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if same and (convincing or not check) else 1


def main():
    parser = ToolParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="fail unless the MoE beats both dense models and "
                        "none of its experts has died, or, of a brief run, unless every stage left its result")
    parser.add_argument("--brief", action="store_true", help="a run too short for its losses to mean anything")
    args = parser.parse_args()
    try:
        return table(args.folder, args.check, args.brief)
    except KeyError as missing:
        raise BadInput(f"{args.folder}: {missing} is missing in what its stages left; use --fresh") from None
    except (ValueError, TypeError, AttributeError, struct.error) as problem:
        raise BadInput(f"{args.folder}: what its stages left cannot be read ({problem}); use --fresh") from None


if __name__ == "__main__":
    sys.exit(run_tool("quickstart", main))
