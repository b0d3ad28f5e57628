"""Every family through the program: its configs/tiny_FAMILY.yaml trains what the file's first lines say, an export is
read again, and what a file or a recipe asks in vain ends in words. Needs UPMOE.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("support", "bench")]
from bench_record import write_tokens  # noqa: E402
from safetensors_file import read_safetensors  # noqa: E402
from tiny_run import ENVIRONMENT, ROOT  # noqa: E402

STEPS, SEQUENCES, LENGTH = 6, 8, 32
UPMOE = os.environ["UPMOE"]
CONFIGS = ROOT / "configs"
# 688: what the tiny recipes are for.
SIZES = {"hidden_act": "silu", "hidden_size": 32, "intermediate_size": 688, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
         "rms_norm_eps": 1e-6, "rope_theta": 1e4, "initializer_range": 0.1, "tie_word_embeddings": False,
         "torch_dtype": "float32"}
# What models need that are made of a config.json alone.
FROM_CONFIGS = {
    "qwen2": SIZES,
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 9},
    "gemma": SIZES | {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3": SIZES | {"head_dim": 16},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64,
             "initializer_range": 0.1, "torch_dtype": "float32", "tie_word_embeddings": False,
             "attn_config": {"clip_qkv": 1.5, "kv_n_heads": 2, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 8, "moe_top_k": 3}},
}
FILES = {"qwen2": "dense", "qwen2_moe": "moe"}  # whose files have other names
UPCYCLE = re.compile(r"^# +upmoe upcycle configs/upcycle/(\S+) --from models/(\S+) --to models/(\S+)$", re.MULTILINE)


def yaml_of(family):
    return CONFIGS / f"tiny_{FILES.get(family, family)}.yaml"


def tensors_of(folder):
    return {name for path in folder.glob("*.safetensors") for name in read_safetensors(path)[0]}


class Families(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp(prefix="upmoe-families-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        # No more than one batch, which every step sees again: its loss falls whatever the tokens.
        write_tokens(cls.folder / "tokens.h5", SIZES["vocab_size"], SEQUENCES * LENGTH + 1)

    def upmoe(self, *words, status=0):
        done = subprocess.run([UPMOE, *map(str, words)], capture_output=True, text=True, check=False, timeout=250,
                              env=ENVIRONMENT)
        self.assertEqual(done.returncode, status, f"{words}\n{done.stderr}")
        return done.stdout + done.stderr

    def known_families(self):
        """As the refusal of another one names them."""
        self.write_config("gpt2", SIZES)
        words = self.upmoe("inspect", self.folder / "models/tiny-gpt2", status=3)
        named = re.search(r"model_type: found 'gpt2', expected ([\w, ]+?)(?:\n|$)", words)
        self.assertTrue(named, words)
        return re.split(r", | or ", named[1])

    def write_config(self, family, keys):
        folder = self.folder / "models" / f"tiny-{FILES.get(family, family)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(keys | {"model_type": family}))
        return folder

    def train(self, family, *overrides, run=None, status=0):
        """Its file's run, with this test's tokens, short sequences and a few steps."""
        tokens = self.folder / "tokens.h5"
        return self.upmoe("train", yaml_of(family), f"run.dir={run or self.folder / 'runs' / family}",
                          f"data.train={tokens}", f"data.valid={tokens}", f"data.seq_len={LENGTH}",
                          f"train.global_batch={SEQUENCES}", f"train.steps={STEPS}", "schedule.warmup=1",
                          "train.eval_every=0", "parallel.ep=1", "log.tensorboard=false", *overrides, status=status)

    def trained(self, family, path):
        """Trains a model and exports it: what its tensors are called, and that nothing of it is lost."""
        run, exported = self.folder / "runs" / family, self.folder / "exports" / family
        self.train(family, f"model.path={path}")
        records = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
        losses = [r["loss"] for r in records if "loss" in r and "kind" not in r]
        self.assertEqual(len(losses), STEPS, family)
        self.assertLess(losses[-1], losses[0] - 0.02, family)
        self.upmoe("export", run, "--to", exported, "--dtype", "fp32")
        self.assertEqual(json.loads((exported / "config.json").read_text())["model_type"], family)
        self.assertFalse(json.loads(self.upmoe("inspect", run, "--diff", exported, "--json"))["difference"], family)
        return exported

    def test_every_family_trains_from_its_file(self):
        families = self.known_families()
        self.assertGreaterEqual(set(families), {"llama", "mistral", "gemma", "qwen2", "qwen3", "qwen2_moe",
                                                "qwen3_moe", "mixtral", "deepseek", "dots1", "dbrx"})
        exports = {}
        for family in sorted(families, key=lambda f: f not in FROM_CONFIGS):  # what others are made of first
            with self.subTest(family):
                text = yaml_of(family).read_text(encoding="utf-8")
                self.assertIn(f"run:        {{dir: runs/{yaml_of(family).stem}, seed: 1}}", text)
                path = self.folder / "models" / f"tiny-{FILES.get(family, family).replace('_', '-')}"
                if family in FROM_CONFIGS:
                    self.assertIn("init: random", text)
                    self.assertIn(f"(type {family})", text)
                    self.write_config(family, FROM_CONFIGS[family])
                else:
                    recipe, dense, made = UPCYCLE.search(text).groups()
                    self.assertEqual(made, path.name)
                    source = next(f for f in FROM_CONFIGS if f"tiny-{FILES.get(f, f)}" == dense)
                    self.upmoe("upcycle", CONFIGS / "upcycle" / recipe, "--from", exports[source], "--to", path)
                self.assertIn(f"path: models/{path.name},", text)
                exports[family] = self.trained(family, path)
        for family, name in {"mixtral": "model.layers.1.block_sparse_moe.experts.7.w3.weight",
                             "deepseek": "model.layers.1.mlp.shared_experts.up_proj.weight",
                             "dots1": "model.layers.1.mlp.gate.e_score_correction_bias",
                             "qwen3_moe": "model.layers.0.self_attn.q_norm.weight",
                             "dbrx": "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight",
                             "gemma": "model.embed_tokens.weight"}.items():
            self.assertIn(name, tensors_of(exports[family]), family)
        self.assertNotIn("lm_head.weight", tensors_of(exports["gemma"]))

    def test_a_run_goes_on_with_no_other_family(self):
        run = self.folder / "runs/other"
        paths = {family: self.write_config(family, FROM_CONFIGS[family]) for family in ("llama", "mistral", "qwen3")}
        self.train("llama", f"model.path={paths['llama']}", run=run)
        for other in ("mistral", "qwen3"):
            told = self.train("llama", f"model.path={paths[other]}", f"train.steps={STEPS + 1}", run=run, status=2)
            for words in ("is not the model that this run started from", "train this model in another run.dir",
                          f"a model of another family: {other}, not llama"):
                self.assertIn(words, told)

    # Of a recipe whose target family cannot carry it.
    def test_a_family_that_does_not_carry_a_recipe(self):
        dense = self.write_config("llama", FROM_CONFIGS["llama"])
        told = self.upmoe("upcycle", CONFIGS / "upcycle/deepseekmoe-tiny.yaml", "--from", dense / "config.json", "--to",
                          self.folder / "made", "target.family=mixtral", "--plan", status=2)
        for words in ("target.family mixtral does not carry:", "a shared expert", "dense layers in front",
                      "families that carry this recipe: qwen2_moe, deepseek"):
            self.assertIn(words, told)
        told = self.upmoe("upcycle", CONFIGS / "upcycle/mixtral-8x-tiny.yaml", "--from", dense / "config.json", "--to",
                          self.folder / "made", "target.family=gpt2", "--plan", status=2)
        for family in ("qwen2_moe", "qwen3_moe", "mixtral", "deepseek", "dots1", "dbrx"):
            self.assertIn(family, told)


if __name__ == "__main__":
    unittest.main(verbosity=2)
