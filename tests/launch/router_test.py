"""Routers and balance terms in whole runs: experts stay alive, a run goes on to the bit and refuses other routers, and
an export refuses what its readers would not notice. Needs UPMOE and MAKE_RUN.
"""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from safetensors_file import read_safetensors  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]
SIGMOID = ("router.score=sigmoid", "router.groups=2", "router.group_topk=1", "router.scale=2.5",
           "router.bias_rate=0.01")


class Routers(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)
        subprocess.run([MAKE_RUN, self.folder], check=True)

    def upmoe(self, *arguments, status=0):
        done = subprocess.run([UPMOE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=250,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stdout + done.stderr

    def train(self, name, *overrides, status=0):
        return self.upmoe("train", self.folder / "run.yaml", f"run.dir={self.folder / name}", "parallel.ep=1",
                          "train.micro_batch=4", *overrides, status=status)

    def metrics(self, name):
        return list(map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines()))

    def model(self, name, **changes):
        """MAKE_RUN's with other keys, as an override."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        config = json.loads((self.folder / "model" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return f"model.path={folder}"

    def every_kind(self):
        """{name: keys} with each term, in forms that go together, and each kind of router but those of groups of
        tokens, which know no term (test_groups_of_tokens)."""
        one = self.model("one_expert", num_experts_per_tok=1)
        two = self.model("two_experts", norm_topk_prob=True)
        return {
            "topk, hf": ("router.aux_kind=hf", "router.aux_loss=0.01", "router.z_loss=0.001"),
            "topk, none": ("router.aux_loss=0",),
            "sigmoid, bias": (*SIGMOID, "router.aux_loss=0"),
            "sigmoid, sequence": ("router.score=sigmoid", "router.aux_kind=sequence", "router.aux_loss=0.01"),
            "group, gshard": ("router.aux_kind=[group, gshard]", "router.aux_groups=5", "router.aux_loss=[0.01, 0.1]"),
            "global": ("router.aux_kind=global", "router.aux_loss=0.01"),
            "importance": ("router.aux_kind=importance", "router.aux_loss=0.1"),
            "noisy": ("router.kind=noisy", "router.aux_kind=[importance, load]", "router.aux_loss=[0.1, 0.1]"),
            "switch": (one, "router.kind=switch", "router.jitter=0.01", "router.capacity_factor=1.25",
                       "router.aux_kind=switch", "router.aux_loss=0.01"),
            "gshard": (two, "router.kind=gshard", "router.capacity_factor=1", "router.capacity_pool=micro_batch",
                       "router.drop=probability", "router.aux_kind=gshard", "router.aux_loss=10"),  # 0.1 of switch
            "capacity by sequence": ("router.capacity_factor=1", "router.drop=order", "router.aux_loss=0.01"),
        }

    def test_no_expert_dies(self):
        for name, keys in self.every_kind().items():
            if name == "topk, none":  # which keeps nobody alive
                continue
            with self.subTest(name):
                self.train(name, "train.steps=40", *keys)
                steps = self.metrics(name)
                # In a step of 256 tokens an expert may get none; over the last ten all of them get some.
                for layer in zip(*(s["expert_load"] for s in steps[-10:])):
                    self.assertGreater(min(map(sum, zip(*layer))), 0)
                self.assertLess(steps[-1]["expert_load_max"], 3)
                self.assertLess(steps[-1]["loss"], steps[0]["loss"])
        self.assertEqual(set(self.metrics("group, gshard")[3]["aux_losses"]), {"group", "gshard"})
        self.assertNotIn("aux_losses", self.metrics("sigmoid, sequence")[3])
        self.assertEqual(self.metrics("global")[0]["aux_loss"], 0)
        self.assertGreater(self.metrics("global")[1]["aux_loss"], 1.9)  # 2 mixtures, balanced 1 each

    def test_every_kind_goes_on_to_the_bit(self):
        for name, keys in self.every_kind().items():
            with self.subTest(name):
                self.train(f"{name} whole", "train.steps=6", *keys)
                self.train(f"{name} parts", "train.steps=3", *keys)
                self.train(f"{name} parts", "train.steps=6", *keys)
                whole, parts = ([{key: s.get(key) for key in ("loss", "grad_norm", "aux_loss", "aux_losses", "z_loss",
                                                              "dropped_share", "expert_load")}
                                 for s in self.metrics(f"{name} {way}")] for way in ("whole", "parts"))
                self.assertEqual(len(whole), 6)
                self.assertEqual(whole, parts)

    def test_the_share_that_is_dropped(self):
        keys = ("train.steps=30", "router.aux_kind=switch", "router.aux_loss=0.1")
        self.train("all", *keys)
        self.assertEqual({s["dropped_share"] for s in self.metrics("all")}, {0})
        experts, choices = 10, 2  # MAKE_RUN's model
        for pool, tokens in {"sequence": 32, "micro_batch": 4 * 32}.items():
            # Of a pool an expert takes this many: all together no more, and the K experts of one token no fewer.
            takes = math.ceil(0.5 * tokens * choices / experts)
            least, most = 1 - experts * takes / (tokens * choices), 1 - takes / tokens
            for drop in ("order", "probability"):
                with self.subTest(pool=pool, drop=drop):
                    name = f"{pool}_{drop}"
                    self.train(name, *keys, "router.capacity_factor=0.5", f"router.capacity_pool={pool}",
                               f"router.drop={drop}")
                    steps = self.metrics(name)
                    for s in steps:
                        self.assertGreaterEqual(s["dropped_share"], least - 1e-9)
                        self.assertLessEqual(s["dropped_share"], most + 1e-9)
                    self.assertLess(steps[-1]["loss"], steps[0]["loss"])
        # What was trained with a limit is served without one.
        self.upmoe("export", self.folder / "sequence_order", "--to", self.folder / "hf")
        self.assertNotIn("upmoe_router", (self.folder / "hf" / "config.json").read_text())

    def test_draws_go_on_to_the_bit(self):
        keys = ("router.jitter=0.1", "router.capacity_factor=1.0", "router.capacity_pool=micro_batch")
        self.train("whole", "train.steps=8", *keys)
        self.train("parts", "train.steps=4", *keys)
        self.train("parts", "train.steps=8")  # what is not said stays
        whole, parts = ([(s["loss"], s["dropped_share"], s["grad_norm"]) for s in self.metrics(name)]
                        for name in ("whole", "parts"))
        self.assertEqual(whole, parts)
        self.train("other", "train.steps=2", *keys, "run.seed=2")
        self.assertNotEqual(self.metrics("other")[0]["grad_norm"], self.metrics("whole")[0]["grad_norm"])
        words = self.train("parts", "train.steps=9", "router.jitter=0.2", status=2)
        self.assertIn("kind topk, jitter 0.1, capacity_factor 1", words)

    def test_noise(self):
        keys = ("router.kind=noisy", "router.aux_kind=[importance, load]", "router.aux_loss=[0.1, 0.1]")
        self.train("whole", "train.steps=30", *keys)
        self.train("parts", "train.steps=15", *keys)
        self.train("parts", "train.steps=30", *keys[1:])
        whole, parts = ([(s["loss"], s["aux_losses"], s["grad_norm"]) for s in self.metrics(name)]
                        for name in ("whole", "parts"))
        self.assertEqual(whole, parts)
        steps = self.metrics("whole")
        for layer in zip(*(s["expert_load"] for s in steps[-10:])):
            self.assertGreater(min(map(sum, zip(*layer))), 0)
        self.assertLess(steps[-1]["loss"], steps[0]["loss"])
        # Evaluation and export know nothing of the noise, whose weights stay behind.
        self.upmoe("export", self.folder / "whole", "--to", self.folder / "hf", "--dtype", "fp32")
        self.assertNotIn("upmoe_router", (self.folder / "hf" / "config.json").read_text())
        data = ("--data", self.folder / "tokens.h5", "--seq-len", "32", "--sequences", "4")
        whole, exported = (json.loads(self.upmoe("eval", self.folder / name, *data))["loss"]
                           for name in ("whole", "hf"))
        self.assertAlmostEqual(whole, exported, places=6)

    def test_kinds_that_do_not_fit(self):
        words = self.train("run", "router.kind=switch", "router.score=sigmoid", status=2)
        self.assertIn("router.kind: switch with router.score sigmoid", words)
        self.assertIn("router.kind: switch gives a token 1 of the experts", words)
        self.assertIn("router.kind: gshard", self.train("run", "router.kind=gshard", status=2))
        words = self.train("run", "router.kind=expert_choice", "router.group_size=3", status=2)
        self.assertIn("router.aux_loss: of router.kind expert_choice", words)
        self.assertIn("router.group_size: 3 sequences are routed together, and train.micro_batch is 4", words)
        self.assertIn("load is of the noise of router.kind noisy", self.train("run", "router.aux_kind=load", status=2))

    def test_groups_of_tokens(self):
        for kind in ("expert_choice", "mixture_of_tokens"):
            with self.subTest(kind):
                keys = (f"router.kind={kind}", "router.group_size=4", "router.aux_loss=0")
                self.train(kind, "train.steps=30", *keys)
                parts = f"{kind}_parts"
                self.train(parts, "train.steps=15", *keys)
                self.train(parts, "train.steps=30", "router.aux_loss=0")  # what is not said stays
                one, other = ([(s["loss"], s["grad_norm"]) for s in self.metrics(name)] for name in (kind, parts))
                self.assertEqual(one, other)
                steps = self.metrics(kind)
                self.assertLess(steps[-1]["loss"], steps[0]["loss"])
                for s in steps:  # every expert computes as many rows
                    self.assertAlmostEqual(s["expert_load_max"], 1)
                    self.assertAlmostEqual(s["expert_load_min"], 1)
                    self.assertEqual((s["dead_experts"], s["dropped_share"]), (0, 0))
                words = self.train(parts, "train.steps=31", *keys, "router.group_size=2", status=2)
                self.assertIn(f"kind {kind}, group_size 4", words)
                self.upmoe("eval", self.folder / kind, "--data", self.folder / "tokens.h5", "--seq-len", "32",
                           "--sequences", "6")  # the last group is smaller
                words = self.upmoe("export", self.folder / kind, "--to", self.folder / "hf", status=2)
                self.assertIn("choose for each token by itself", words)
                self.assertFalse((self.folder / "hf").exists())

    def test_a_run_goes_on_to_the_bit(self):
        keys = (*SIGMOID, "router.aux_kind=[sequence, global]", "router.aux_loss=[0.01, 0.01]")
        self.train("whole", "train.steps=10", *keys)
        self.train("parts", "train.steps=5", *keys)
        self.train("parts", "train.steps=10", *keys)
        whole, parts = ([(s["loss"], s["aux_losses"], s["grad_norm"]) for s in self.metrics(name)]
                        for name in ("whole", "parts"))
        self.assertEqual(whole, parts)

    def test_another_router_is_refused(self):
        self.train("run", "train.steps=2", *SIGMOID)
        said = self.train("run", "train.steps=4", *SIGMOID[:2], status=0)  # what is not said stays
        self.assertNotIn("error", said)
        for other in ("router.score=softmax", "router.groups=5", "router.scale=1"):
            words = self.train("run", "train.steps=6", *SIGMOID, other, status=2)
            for word in ("router: the run asks for", "score sigmoid, groups 2, group_topk 1, scale 2.5", "run.dir"):
                self.assertIn(word, words)

    def test_contradictions_are_told_together(self):
        words = self.train("run", "router.bias_rate=0.1", "router.groups=3", "router.group_topk=4",
                           "router.aux_kind=[hf, group]", "router.aux_loss=[0.1, 0.1]", status=2)
        for word in ("router.bias_rate: 0.1 with router.score softmax", "router.groups: 3 with",
                     "router.groups: 3 does not divide the model's 10 experts", "router.aux_groups: 1"):
            self.assertIn(word, words)
        self.assertIn("router.aux_loss: 1 coefficients for the 2 kinds",
                      self.train("run", "router.aux_kind=[hf, gshard]", status=2))
        self.assertIn("given twice", self.train("run", "router.aux_kind=[hf, hf]", status=2))

    def test_an_export_refuses_what_would_be_lost(self):
        self.train("run", "train.steps=2", "router.score=sigmoid")
        self.assertIn("choose other experts", self.upmoe("export", self.folder / "run", "--to", self.folder / "hf",
                                                         status=2))
        self.assertFalse((self.folder / "hf").exists())
        self.train("plain", "train.steps=2", "router.aux_kind=global")  # its buffer is of no use to readers
        self.upmoe("export", self.folder / "plain", "--to", self.folder / "hf")
        self.assertNotIn("upmoe_router", (self.folder / "hf" / "config.json").read_text())
        self.upmoe("eval", self.folder / "run", "--data", self.folder / "tokens.h5", "--seq-len", "32", "--sequences",
                   "4")

    def biases(self, folder):
        for name, (dtype, _, data) in read_safetensors(folder / "model.safetensors")[0].items():
            if name.endswith("e_score_correction_bias"):
                self.assertEqual(dtype, "F32")
                yield struct.unpack(f"<{len(data) // 4}f", data)

    def test_biases_are_exported_where_the_family_has_a_tensor(self):
        config = json.loads((self.folder / "model" / "config.json").read_text())
        experts = config.pop("num_experts")
        for key in ("shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"):
            del config[key]
        config |= {"model_type": "dots1", "n_routed_experts": experts, "n_shared_experts": 2, "n_group": 2,
                   "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "sliding_window": None}
        (self.folder / "dots1").mkdir()
        (self.folder / "dots1" / "config.json").write_text(json.dumps(config))
        self.train("run", f"model.path={self.folder / 'dots1'}", "train.steps=5", "router.bias_rate=0.01",
                   "router.aux_loss=0")
        self.upmoe("export", self.folder / "run", "--to", self.folder / "hf")
        self.assertNotIn("upmoe_router", (self.folder / "hf" / "config.json").read_text())
        layers = list(self.biases(self.folder / "hf"))
        self.assertEqual([len(layer) for layer in layers], [experts, experts])
        for bias in (b for layer in layers for b in layer):  # five steps up or down
            self.assertAlmostEqual(bias, 0.01 * round(bias * 100), delta=1e-6)
            self.assertLess(abs(bias), 0.051)
        self.assertTrue(all(any(layer) for layer in layers))
        self.train("other", f"model.path={self.folder / 'dots1'}", "train.steps=2", "router.score=softmax",
                   "router.groups=1")
        self.assertIn("scores of a softmax", self.upmoe("export", self.folder / "other", "--to", self.folder / "lost",
                                                        status=2))


if __name__ == "__main__":
    unittest.main()
