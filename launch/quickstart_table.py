#!/usr/bin/env python3
"""The closing table of launch/quickstart.sh, from what its stages left in runs/quickstart or runs/quickstart_brief."""

import argparse
import json
import struct
import sys
from math import prod
from pathlib import Path
from statistics import median

EXPORT_TOLERANCE = 1e-5

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


def records(run):
    with (run / "metrics.jsonl").open(encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if "kind" not in record]


def stages_are_whole(folder, losses):
    """Each run trained to its last step, each evaluation is a number that even an untrained model reaches, and there
    are pictures."""
    complete = all(records(folder / run)[-1]["step"] == len(records(folder / run)) for _, _, _, run in ROWS if run)
    return complete and all(0 < loss < 20 for loss in losses.values()) and (folder / "report/report.html").is_file()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="fail unless the MoE beats both dense models, or, of a "
                        "brief run, unless every stage left its result")
    parser.add_argument("--brief", action="store_true", help="a run too short for its losses to mean anything")
    args = parser.parse_args()
    folder, results = args.folder, {}
    losses = {path.stem: json.loads(path.read_text(encoding="utf-8"))["loss"]
              for path in (folder / "eval").glob("*.json")}
    print(f"\n{'':24}{'held-out loss':>14}{'trained on':>14}{'tokens/s':>10}{'parameters':>13}{'active':>12}")
    for title, name, model, run in ROWS:
        total, active = parameters(folder / "models" / model)
        steps = records(folder / run) if run else []
        speed = median(r["tokens_per_s"] for r in steps[len(steps) // 10:]) if steps else None
        tokens = steps[-1]["tokens"] if steps else 0
        results[name] = {"heldout_loss": losses[name], "tokens": tokens, "tokens_per_s": speed, "parameters": total,
                         "active_parameters": active}
        print(f"{title:24}{losses[name]:14.4f}{f'{tokens / 1e6:.2f} M' if tokens else '-':>14}"
              f"{f'{speed:,.0f}' if speed else '-':>10}{total:13,}{active:12,}")
    print("(the continued dense model and the MoE start from the dense one; their tokens come on top of its)\n")
    checkpoint, exported = losses["moe"], losses["moe_exported"]
    same = abs(checkpoint - exported) < EXPORT_TOLERANCE
    print(f"exported directory: held-out loss {exported:.6f}, checkpoint {checkpoint:.6f}: "
          f"{'the same' if same else 'NOT THE SAME'}")
    if args.brief:
        whole = stages_are_whole(folder, losses)
        print(f"a brief run: every stage {'left its result' if whole else 'DID NOT LEAVE ITS RESULT'}; the losses "
              "above mean nothing (launch/quickstart.sh without --brief compares)")
        return 0 if same and (whole or not args.check) else 1
    better = losses["moe"] < min(losses["dense"], losses["dense_continued"])
    print(f"MoE against dense {losses['moe'] - losses['dense']:+.4f}, against dense continued for as many tokens "
          f"{losses['moe'] - losses['dense_continued']:+.4f} nats per token: "
          f"{'the MoE is better' if better else 'the MoE is not better'}")
    results["exported_heldout_loss"] = exported
    (folder / "result.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0 if same and (better or not args.check) else 1


if __name__ == "__main__":
    sys.exit(main())
