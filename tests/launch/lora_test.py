"""Low-rank adapters in whole runs: what trains and resumes, and what an export writes, read by hand from its bytes;
adapters of other models are refused in words. Needs UPMOE and MAKE_RUN.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from safetensors_file import read_safetensors  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]
EVERYTHING = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
LORA = ("lora.rank=4", "lora.alpha=8", f"lora.targets={EVERYTHING}")
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def tensors_of(path):
    """({name: array}, metadata), of fp32 alone"""
    found, metadata = read_safetensors(path)
    assert all(dtype == "F32" for dtype, _, _ in found.values()), path
    return {name: np.frombuffer(data, "<f4").reshape(shape) for name, (_, shape, data) in found.items()}, metadata


class Lora(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        subprocess.run([MAKE_RUN, cls.folder], check=True)
        cls.base = cls.model("base", 1)
        cls.train("tuned", "train.steps=20", *LORA)

    @classmethod
    def upmoe(cls, *arguments, status=0):
        done = subprocess.run([UPMOE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=250,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    @classmethod
    def model(cls, name, seed):
        """A directory with the weights of a run of one step, in fp32."""
        run = cls.folder / f"{name}_run"
        cls.upmoe("train", cls.folder / "run.yaml", f"run.dir={run}", f"run.seed={seed}", "parallel.ep=1",
                  "train.steps=1")
        cls.upmoe("export", run, "--to", cls.folder / name, "--dtype", "fp32")
        return cls.folder / name

    @classmethod
    def train(cls, name, *overrides, status=0):
        return cls.upmoe("train", cls.folder / "run.yaml", f"run.dir={cls.folder / name}", f"model.path={cls.base}",
                         "model.init=weights", "parallel.ep=1", "train.micro_batch=4", "optimizer.lr=0.01", *overrides,
                         status=status)

    def losses(self, name):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [(r["loss"], r["grad_norm"]) for r in map(json.loads, lines) if "loss" in r]

    def export(self, model, name, *options, status=0):
        return self.upmoe("export", self.folder / model, "--to", self.folder / name, *options, status=status)

    def evaluated(self, name):
        return json.loads(self.upmoe("eval", self.folder / name, "--data", self.folder / "tokens.h5", "--seq-len", "32",
                                     "--sequences", "8"))["loss"]

    def test_adapters_learn_and_merge(self):
        self.export("tuned", "adapter", "--adapter")
        self.export("tuned", "merged", "--merge", "--dtype", "fp32")
        adapter, metadata = tensors_of(self.folder / "adapter" / "adapter_model.safetensors")
        base, _ = tensors_of(self.base / "model.safetensors")
        merged, _ = tensors_of(self.folder / "merged" / "model.safetensors")
        self.assertEqual(metadata["format"], "pt")
        config = json.loads((self.folder / "adapter" / "adapter_config.json").read_text())
        self.assertEqual([config[key] for key in ("peft_type", "r", "lora_alpha", "bias")], ["LORA", 4, 8, "none"])
        self.assertEqual(config["base_model_name_or_path"], str(self.base))
        # As PEFT finds its modules: by the end of their names.
        wanted = {name[:-len(".weight")] for name in base
                  if name.endswith(".weight") and name.split(".")[-2] in config["target_modules"]}
        self.assertEqual({PREFIX + module + part for module in wanted for part in (A, B)}, set(adapter))
        self.assertEqual(len(wanted), 2 * (4 + 10 * 3 + 3))
        self.assertEqual(set(base), set(merged))
        for name, weight in base.items():
            module = name[:-len(".weight")]
            if module not in wanted:  # frozen: its bytes stay
                self.assertEqual(weight.tobytes(), merged[name].tobytes(), name)
                continue
            a, b = adapter[PREFIX + module + A], adapter[PREFIX + module + B]
            self.assertEqual((a.shape, b.shape), ((4, weight.shape[1]), (weight.shape[0], 4)), name)
            self.assertGreater(np.abs(b).max(), 0, name)
            expected = weight.astype("f8") + 8 / 4 * b.astype("f8") @ a.astype("f8")
            np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6, err_msg=name)
        # The run with its adapters and the merged model are one function, and not the base's.
        self.assertAlmostEqual(self.evaluated("tuned"), self.evaluated("merged"), places=5)
        self.assertLess(self.evaluated("merged"), self.evaluated("base") - 0.1)  # on the same sequences
        said = [self.upmoe("generate", self.folder / name, "--tokens", "1,2,3", "--max-new-tokens", "12", "--json")
                for name in ("tuned", "merged")]
        self.assertEqual(*(json.loads(words)["tokens"] for words in said))
        self.assertNotIn("upmoe_lora", (self.folder / "merged" / "config.json").read_text())
        # Read back, the adapter makes the same model.
        self.export("base", "again", "--merge-adapter", self.folder / "adapter", "--dtype", "fp32")
        self.assertEqual((self.folder / "again" / "model.safetensors").read_bytes(),
                         (self.folder / "merged" / "model.safetensors").read_bytes())

    def test_the_first_step_is_the_models_own(self):
        self.train("plain", "train.steps=1")
        self.assertEqual(self.losses("tuned")[0][0], self.losses("plain")[0][0])

    def test_a_run_goes_on_to_the_bit(self):
        for steps in (5, 20):
            self.train("parts", f"train.steps={steps}", *LORA)
        self.assertEqual(self.losses("parts"), self.losses("tuned"))
        for other in ((*LORA, "lora.rank=2"), ()):
            words = self.train("parts", "train.steps=21", *other, status=2)
            self.assertIn("holds others (rank 4, alpha 8", words)
        self.train("without", "train.steps=1")
        self.assertIn("trained without them so far", self.train("without", "train.steps=2", *LORA, status=2))

    def test_another_run_goes_on_from_adapters(self):
        self.train("on", f"model.path={self.folder / 'tuned'}", "train.steps=1", *LORA)
        self.assertLess(self.losses("on")[0][0], self.losses("tuned")[0][0])
        # Their base is the model beneath both, which takes them.
        self.export("on", "on_adapter", "--adapter")
        config = json.loads((self.folder / "on_adapter" / "adapter_config.json").read_text())
        self.assertEqual(config["base_model_name_or_path"], str(self.base))
        self.export("base", "on_merged", "--merge-adapter", self.folder / "on_adapter")
        words = self.train("off", f"model.path={self.folder / 'tuned'}", "train.steps=1", status=2)
        self.assertIn("merge them first", words)

    def test_exports_say_what_they_write(self):
        self.assertIn("--adapter writes them as PEFT does", self.export("tuned", "no", status=2))
        for option in ("--adapter", "--merge"):
            self.assertIn(f"{option}: {self.base} holds no adapters", self.export("base", "no", option, status=2))
        self.assertIn("--other-base requires --merge-adapter", self.export("base", "no", "--other-base", status=2))
        self.assertFalse((self.folder / "no").exists())

    def test_adapters_of_other_routers_are_not_exported(self):
        self.train("sigmoid", "train.steps=1", "router.score=sigmoid", "router.aux_loss=0", *LORA)
        for option in ("--adapter", "--merge"):
            self.assertIn("has no words for its routers", self.export("sigmoid", "no", option, status=2))
        self.assertFalse((self.folder / "no").exists())

    def test_other_models_adapters(self):
        self.export("tuned", "foreign", "--adapter")
        foreign = ("--merge-adapter", self.folder / "foreign")
        other = self.model("other", 2)  # of the same shape
        self.assertIn("is another model by its weights", self.export("other", "no", *foreign, status=3))
        self.export("other", "forced", *foreign, "--other-base")
        self.assertTrue((self.folder / "forced" / "config.json").exists())
        self.assertTrue(other.exists())
        config_path = self.folder / "foreign" / "adapter_config.json"
        config = json.loads(config_path.read_text())
        for change, words in (({"r": 8}, "is one of another model"), ({"use_dora": True}, "use_dora: found true"),
                              ({"target_modules": ["c_attn"]}, "no module of this qwen2_moe"),
                              ({"target_modules": config["target_modules"][1:]}, "not an adapter of this model")):
            config_path.write_text(json.dumps(config | change))
            self.assertIn(words, self.export("base", "no", *foreign, status=3))
        config_path.write_text("[]")
        self.export("base", "no", *foreign, status=3)
        config_path.unlink()
        self.assertIn("holds no adapter_config.json", self.export("base", "no", *foreign, status=3))
        self.assertFalse((self.folder / "no").exists())

    def test_what_cannot_be_together(self):
        self.assertIn("leave freeze out", self.train("bad", *LORA, "freeze=['@router']", status=2))
        self.assertIn("lora.targets", self.train("bad", "lora.rank=4", "lora.targets=[c_attn]", status=2))
        self.assertIn("lora.dropout: 0.1 is not built yet", self.train("bad", *LORA, "lora.dropout=0.1", status=2))


if __name__ == "__main__":
    unittest.main()
