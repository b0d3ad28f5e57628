"""configs/finetune as they are shipped, on a mixture as the quickstart leaves one: what trains moves, what is frozen
keeps its bytes, and of what a mask leaves nothing the run ends in words. Needs UPMOE, tokenizers and h5py.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
from safetensors_file import read_safetensors  # noqa: E402
from tiny_run import DENSE, ENVIRONMENT, RECIPE, mpirun  # noqa: E402

UPMOE = os.environ["UPMOE"]
STEPS = 3
ADAPTED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight",
           "down_proj.weight")
TRAINS = {"full": lambda name: True, "experts_frozen": lambda name: ".mlp.experts." not in name,
          "non_experts_frozen": lambda name: ".mlp.experts." in name,
          "router_only": lambda name: name.endswith(".mlp.gate.weight"),
          "lora": lambda name: name.endswith(ADAPTED)}


def tensors_of(model):
    """name -> bytes"""
    return {name: data for name, (_, _, data) in read_safetensors(model / "model.safetensors")[0].items()}


class Finetune(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.quickstart = cls.folder / "runs" / "quickstart"  # where the configurations look for it
        for folder in ("tokens", "models"):
            (cls.quickstart / folder).mkdir(parents=True)
        tokenizer = cls.quickstart / "tokens" / "tokenizer.json"
        for name, talks, seed in (("talks", 200, 1), ("talks_valid", 40, 2)):
            source = cls.quickstart / f"{name}.jsonl"
            cls.python("launch/make_talks.py", "--talks", talks, "--seed", seed, "--out", source)
            if not tokenizer.exists():
                text = source.with_suffix(".txt")
                text.write_text("".join(turn["content"] + "\n" for line in source.read_text().splitlines()
                                        for turn in json.loads(line)["messages"]))
                cls.python("data/tokenize.py", "--train-vocab", 300, "--tokenizer", tokenizer, text)
            cls.python("data/tokenize.py", "--chat", "--template", "alpaca", "--tokenizer", tokenizer, "--out",
                       cls.quickstart / "tokens" / f"{name}.h5", source)
        cls.base = cls.quickstart / "models" / "moe_trained"
        with h5py.File(cls.quickstart / "tokens" / "talks.h5") as file:
            config = DENSE | {"vocab_size": int(file.attrs["vocab_size"]), "max_position_embeddings": 256}
        (cls.folder / "dense.json").write_text(json.dumps(config))
        (cls.folder / "recipe.yaml").write_text(RECIPE)
        cls.python("launch/make_random_dense.py", cls.folder / "dense", "--config", cls.folder / "dense.json",
                   "--dtype", "fp32", "--std", "0.1")
        shutil.copy(tokenizer, cls.folder / "dense" / "tokenizer.json")
        cls.upmoe("upcycle", cls.folder / "recipe.yaml", "--from", cls.folder / "dense", "--to", cls.base)

    @classmethod
    def python(cls, script, *words):
        subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True, capture_output=True, timeout=120)

    @classmethod
    def upmoe(cls, *words, ranks=1, status=0):
        done = subprocess.run([*mpirun(ranks), UPMOE, *map(str, words)], capture_output=True, text=True, check=False,
                              timeout=250, env=ENVIRONMENT, cwd=cls.folder)
        assert done.returncode == status, done.stderr
        return done.stderr

    def train(self, name, *overrides, status=0):
        return self.upmoe("train", ROOT / "configs" / "finetune" / f"{name}.yaml", f"train.steps={STEPS}",
                          f"train.eval_every={STEPS}", *overrides, ranks=2, status=status)

    def records(self, name):
        path = self.quickstart / "finetune" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_every_shipped_configuration(self):
        files = {path.stem for path in (ROOT / "configs" / "finetune").glob("*.yaml")}
        self.assertEqual(files, set(TRAINS))
        before = tensors_of(self.base)
        targets = []
        for name, trains in TRAINS.items():
            self.train(name)
            steps = [r for r in self.records(name) if "grad_norm" in r]
            self.assertEqual([r["step"] for r in steps], list(range(1, STEPS + 1)), name)
            targets.append([r["targets"] for r in steps])
            self.assertTrue(all(0 < count < 8 * 256 for count in targets[-1]), targets)
            self.assertEqual([r["step"] for r in self.records(name) if "eval_loss" in r], [0, STEPS], name)
            to = self.quickstart / "finetune" / f"{name}_model"
            self.upmoe("export", self.quickstart / "finetune" / name, "--to", to, "--dtype", "fp32",
                       *(("--merge",) if name == "lora" else ()))
            after = tensors_of(to)
            self.assertEqual(set(after), set(before))
            moved = {tensor for tensor in before if before[tensor] != after[tensor]}
            self.assertEqual(moved, set(filter(trains, before)), name)
        self.assertEqual(targets, [targets[0]] * len(targets))  # the same answers, whatever trains

    def test_a_mask_without_any_target(self):
        masked = self.quickstart / "tokens" / "nothing.h5"
        with h5py.File(self.quickstart / "tokens" / "talks.h5") as file, h5py.File(masked, "w") as out:
            for key in ("tokens", "document_ends"):
                out[key] = file[key][:]
            out["loss_mask"] = 0 * file["loss_mask"][:]
            for key in ("format", "vocab_size", "tokenizer_sha256", "eos_id"):  # without its checksums
                out.attrs[key] = file.attrs[key]
        words = self.train("full", f"data.train=[{{path: {masked}, loss_mask: true}}]", "run.dir=runs/nothing",
                           status=3)
        self.assertIn("step 1: loss masks leave none", words)


if __name__ == "__main__":
    unittest.main()
