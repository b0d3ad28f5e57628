#!/usr/bin/env python3
"""Both forms of an upcycled model through the program: made by several ranks, trained from, exported, inspected.

Needs UPMOE (the program) and MAKE_RUN (writes the token file and a run configuration) in the environment.
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
from tiny_run import ENVIRONMENT, RECIPE, losses_of, mpirun, write_dense  # noqa: E402

UPMOE, MAKE_RUN = os.environ["UPMOE"], os.environ["MAKE_RUN"]


def tensors_in(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= read_safetensors(path)[0]
    return found


class Forms(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = Path(tempfile.mkdtemp(prefix="upmoe-forms-"))
        subprocess.run([MAKE_RUN, str(cls.dir)], check=True)
        write_dense(cls.dir / "dense")
        (cls.dir / "recipe.yaml").write_text(RECIPE)
        cls.hf, cls.store = cls.dir / "hf", cls.dir / "store"
        cls.upcycle("hf", ranks=1)
        cls.upcycle("store", "--form", "checkpoint", ranks=2)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.dir, ignore_errors=True)

    @classmethod
    def upmoe(cls, *words, ranks=1, status=0):
        done = subprocess.run([*mpirun(ranks), UPMOE, *map(str, words)], capture_output=True, text=True,
                              env=ENVIRONMENT, timeout=120, check=False)
        if done.returncode != status:
            raise AssertionError(f"status {done.returncode}, expected {status}: {done.stderr}")
        return done

    @classmethod
    def upcycle(cls, to, *words, **how):
        return cls.upmoe("upcycle", cls.dir / "recipe.yaml", "--from", cls.dir / "dense", "--to", cls.dir / to, *words,
                         **how)

    def losses(self, run, *overrides, ranks=1):
        self.upmoe("train", self.dir / "run.yaml", f"run.dir={self.dir}/{run}", "train.steps=4", "checkpoint.every=0",
                   f"parallel.ep={ranks}", *overrides, ranks=ranks)
        return losses_of(self.dir / run)

    def test_training_starts_from_either_with_the_same_losses(self):
        for ranks, more in ((1, ()), (2, ()), (2, ("parallel.ep=1", "parallel.tp=2")), (2, ("train.precision=bf16",))):
            both = [self.losses(f"run_{form}_{ranks}_{len(more)}_{'_'.join(more)}", "model.init=weights",
                                f"model.path={self.dir}/{form}", *more, ranks=ranks) for form in ("hf", "store")]
            self.assertEqual(both[0], both[1], (ranks, more))
            self.assertEqual(sorted(both[0]), [1, 2, 3, 4])

    def test_as_the_first_checkpoint_of_a_run(self):
        place = self.dir / "placed/checkpoints/step_00000000"
        shutil.copytree(self.store, place)
        placed = self.losses("placed", "model.init=weights", f"model.path={self.store}", ranks=2)
        self.assertEqual(placed, self.losses("unplaced", "model.init=weights", f"model.path={self.hf}", ranks=2))

    def test_configuration_alone(self):
        self.assertEqual(self.losses("random_hf", f"model.path={self.hf}"),
                         self.losses("random_store", f"model.path={self.store}"))

    def test_export_gives_the_directory(self):
        to = self.dir / "exported"
        self.upmoe("export", self.store, "--to", to, "--dtype", "fp32")
        self.assertEqual(tensors_in(to), tensors_in(self.hf))
        for name in ("config.json", "tokenizer.json"):
            self.assertEqual(json.loads((to / name).read_text()), json.loads((self.hf / name).read_text()))

    def test_export_of_a_run_that_started_from_it(self):
        self.losses("trained", "model.init=weights", f"model.path={self.store}")
        done = self.upmoe("export", self.dir / "trained", "--to", self.dir / "trained_hf")
        self.assertNotIn("tokenizer", done.stderr)
        self.assertTrue((self.dir / "trained_hf/tokenizer.json").exists())

    def test_inspect(self):
        found = json.loads(self.upmoe("inspect", "--verify", "--json", "--diff", self.hf, self.store).stdout)
        self.assertEqual(found["difference"], [])
        self.assertEqual((found["first"], found["second"]), (str(self.store), str(self.hf)))
        self.assertTrue(found["verified"])
        self.assertEqual(found["step"], 0)
        self.assertEqual({t["kind"] for t in found["tensors"]}, {"weight"})
        damaged = self.dir / "damaged"
        shutil.copytree(self.store, damaged)
        shard = bytearray((damaged / "shard_00001.h5").read_bytes())
        shard[-1] ^= 1
        (damaged / "shard_00001.h5").write_bytes(shard)
        self.assertIn("checksum", self.upmoe("inspect", "--verify", damaged, status=3).stderr)

    def test_eval(self):
        both = [json.loads(self.upmoe("eval", self.dir / form, "--data", self.dir / "tokens.h5", "--seq-len", 32,
                                      "--sequences", 8, ranks=2).stdout) for form in ("hf", "store")]
        self.assertEqual(both[0]["loss"], both[1]["loss"])

    def logits(self, model):
        """Of the first 4 sequences of 32: a list for each token."""
        out = self.dir / "logits.safetensors"
        out.unlink(missing_ok=True)
        loss = json.loads(self.upmoe("eval", model, "--data", self.dir / "tokens.h5", "--seq-len", 32, "--sequences", 4,
                                     "--logits", out).stdout)["loss"]
        _, (*_, vocab), data = read_safetensors(out)[0]["logits"]
        values = struct.unpack(f"<{len(data) // 4}f", data)
        return loss, [values[i:i + vocab] for i in range(0, len(values), vocab)]

    def test_step_zero(self):
        check = ("--check", self.dir / "tokens.h5", "--check-seq-len", 32, "--check-sequences", 4)
        said = self.upcycle("checked", *check, ranks=2).stderr
        self.assertIn("step 0 on 128 tokens: loss", said)
        report = json.loads((self.dir / "checked" / "upcycle_report.json").read_text())
        found = report.pop("step_zero")
        self.assertEqual(report, json.loads((self.hf / "upcycle_report.json").read_text()))
        (dense_loss, dense), (loss, mixture) = self.logits(self.dir / "dense"), self.logits(self.hf)
        self.assertAlmostEqual(found["source_loss"], dense_loss, delta=1e-5)
        self.assertAlmostEqual(found["loss"], loss, delta=1e-5)
        divergence = 0.0
        for p, q in zip(dense, mixture):
            log_p, log_q = (math.log(sum(math.exp(v) for v in logits)) for logits in (p, q))
            divergence += sum(math.exp(a - log_p) * ((a - log_p) - (b - log_q)) for a, b in zip(p, q))
        self.assertAlmostEqual(found["kl_source_mixture"], divergence / len(dense),
                               delta=1e-5 + 1e-3 * divergence / len(dense))
        self.assertEqual((found["tokens"], found["seq_len"]), (128, 32))
        refused = self.upcycle("refused", *check, "--form", "checkpoint", status=2).stderr
        self.assertIn("upmoe eval", refused)

    def test_tokens_of_step_zero_are_looked_at_before_the_work(self):
        for words, told in ((("nowhere.h5",), "nowhere.h5"),
                            (("tokens.h5", "--check-seq-len", 10**9), "one sequence of 1000000000")):
            said = self.upcycle("unmade", "--check", self.dir / words[0], *words[1:], ranks=2, status=3).stderr
            self.assertIn(told, said)
            self.assertNotIn("upcycling", said)

    # By the random inputs alone, which are always looked at.
    def test_an_error_above_1_is_told(self):
        words = "this recipe counts on training"
        for to, scale, above in (("near", 2, False), ("far", 5, True)):  # 2 keeps the function
            self.assertEqual(words in self.upcycle(to, f"shared.scale={scale}").stderr, above)
            report = json.loads((self.dir / to / "upcycle_report.json").read_text())
            self.assertEqual("remark" in report, above)
            self.assertEqual(max(layer["relative_error"] for layer in report["layers"]) > 1, above)

    def test_prompts(self):
        prompts = [word for _ in range(2) for word in ("--prompts", self.dir / "tokens.h5")]
        words = ("router.method=prompts", "router.std=0", *prompts, "--prompt-seq-len", 32)
        self.upcycle("prompted", *words)
        self.upcycle("prompted_by_two", *words, ranks=2)
        one, two = (tensors_in(self.dir / name) for name in ("prompted", "prompted_by_two"))
        self.assertEqual(one, two)
        routers = [values for name, values in one.items() if name.endswith("mlp.gate.weight")]
        self.assertTrue(routers)
        for dtype, (experts, hidden), data in routers:
            self.assertEqual((dtype, experts), ("F32", 10))
            values = struct.unpack(f"<{experts * hidden}f", data)
            rows = [values[i:i + hidden] for i in range(0, len(values), hidden)]
            self.assertEqual(rows, [rows[0]] * experts)  # of one text in both files
            self.assertAlmostEqual(sum(v * v for v in rows[0]), 1.0, delta=1e-5)
        self.assertIn("--prompts", self.upcycle("unprompted", "router.method=prompts", status=2).stderr)
        thrice = [*prompts, "--prompts", self.dir / "tokens.h5"]
        self.assertIn("no equal parts of 10", self.upcycle("thrice", "router.method=prompts", *thrice, status=2).stderr)

    def test_calibrate(self):
        width = json.loads((self.dir / "dense" / "config.json").read_text())["intermediate_size"]
        words = ["target.num_experts=4", "target.num_experts_per_tok=2", f"target.moe_intermediate_size={width // 8}",
                 f"target.shared_expert_intermediate_size={width - 4 * (width // 8)}", "experts.method=cluster",
                 "experts.reinit=0", "shared.method=active", "router.method=neurons", "router.std=0"]
        tokens = ("--calibrate", self.dir / "tokens.h5", "--calibrate-seq-len", 32)
        self.upcycle("clustered", *words, *tokens)
        self.upcycle("clustered_by_two", *words, *tokens, ranks=2)
        one = tensors_in(self.dir / "clustered")
        self.assertEqual(one, tensors_in(self.dir / "clustered_by_two"))
        dense = tensors_in(self.dir / "dense")

        def rows(tensor):
            return sorted(tensor[2][i:i + len(tensor[2]) // tensor[1][0]]
                          for i in range(0, len(tensor[2]), len(tensor[2]) // tensor[1][0]))

        name = "model.layers.0.mlp.{}gate_proj.weight"
        made = [rows(one[name.format(part)]) for part in ("shared_expert.", *(f"experts.{e}." for e in range(4)))]
        self.assertEqual(sorted(sum(made, [])), rows(dense[name.format("")]))  # every neuron once
        self.assertIn("--calibrate", self.upcycle("untold", *words, status=2).stderr)

    def test_report_and_refusals(self):
        self.assertEqual((self.store / "upcycle_report.json").read_bytes(),
                         (self.hf / "upcycle_report.json").read_bytes())
        self.assertEqual(sorted(p.name for p in self.store.glob("shard_*")), ["shard_00000.h5", "shard_00001.h5"])
        errors = self.upcycle("store", "--form", "checkpoint", ranks=2, status=2).stderr
        self.assertEqual(errors.count("error:"), 1, errors)
        self.assertIn("exists", errors)
        self.upcycle("other", "--form", "both", status=2)
        plan = self.upcycle("planned", "--form", "checkpoint", "--plan").stdout
        self.assertIn("one shard per rank", plan)
        self.assertFalse((self.dir / "planned").exists())

    # Of a shape whose weights are not there; the configuration is that of what is made.
    def test_a_configuration_is_enough_for_a_plan(self):
        words = ("upcycle", self.dir / "recipe.yaml", "--from", self.dir / "dense/config.json", "--to",
                 self.dir / "planned")
        plan = json.loads(self.upmoe(*words, "--plan", "--json").stdout)
        self.assertEqual(plan["config"], json.loads((self.hf / "config.json").read_text(encoding="utf-8")))
        self.assertEqual(plan["bytes"], sum(path.stat().st_size for path in self.hf.glob("*.safetensors")))
        self.assertFalse((self.dir / "planned").exists())
        self.assertIn("did you mean", self.upmoe(*words, "--plan", "--json", "experts.reinitt=0.5", status=2).stderr)
        self.assertIn("config.json", self.upmoe(*words, status=3).stderr)
        self.upmoe(*words, "--json", status=2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
