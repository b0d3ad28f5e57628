"""Held-out loss on several named sets: a run logs each and all together, `eval` takes several token files, and one set
is as it was. Needs UPMOE_BINARY.
"""

import json
import shutil
import unittest

import cli_test
import h5py
import numpy as np
from cli_test import upmoe


class HeldOut(cli_test.CliTest):
    def setUp(self):
        super().setUp()
        self.code = self.write_tokens("code.h5", np.arange(5 * 16 + 1) * 3 % 101)
        self.prose = self.write_tokens("prose.h5", np.arange(2 * 16 + 1) * 5 % 101)

    def evaluations(self, name, *overrides):
        done = upmoe("train", self.write_run(run=f"{{dir: {self.folder / name}, seed: 1}}"), "log.tensorboard=false",
                     *overrides)
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line.get("kind") == "eval"], done.stderr

    def evaluate(self, *arguments):
        done = upmoe("eval", self.model, "--seq-len", 16, *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_a_run_logs_each_set_and_all_together(self):
        both, said = self.evaluations("both", f"data.valid={{code: {self.code}, prose: {self.prose}}}")
        self.assertIn("held out (prose): 2 of the 2 sequences", said)
        self.assertRegex(said, r"held-out loss [\d.]+ over 112 tokens: code [\d.]+, prose [\d.]+")
        code, _ = self.evaluations("code", f"data.valid={self.code}")
        prose, _ = self.evaluations("prose", f"data.valid={self.prose}")
        self.assertEqual(len(both), 2)
        for together, one, other in zip(both, code, prose, strict=True):
            self.assertEqual(together["valid_loss"], {"code": one["eval_loss"], "prose": other["eval_loss"]})
            self.assertEqual(together["valid_tokens"], {"code": 80, "prose": 32})
            self.assertEqual(together["eval_tokens"], 112)
            self.assertAlmostEqual(together["eval_loss"], (80 * one["eval_loss"] + 32 * other["eval_loss"]) / 112)
            self.assertEqual(set(one), {"kind", "step", "tokens", "eval_loss", "eval_tokens", "seconds"})
        start = json.loads((self.folder / "both/starts.jsonl").read_text(encoding="utf-8"))
        self.assertEqual([(s["name"], s["sequences"]) for s in start["data"]["held_out"]], [("code", 5), ("prose", 2)])
        named, _ = self.evaluations("named", f"data.valid={{code: {self.code}}}")
        self.assertEqual(named[-1]["valid_loss"], {"code": code[-1]["eval_loss"]})
        self.assertEqual(named[-1]["eval_loss"], code[-1]["eval_loss"])

    def test_eval_takes_several(self):
        code, prose = self.evaluate("--data", self.code), self.evaluate("--data", self.prose)
        self.assertEqual(set(code), {"loss", "perplexity", "tokens", "sequences", "seconds"})
        both = self.evaluate("--data", self.code, "--data", self.prose)
        self.assertEqual({name: one["loss"] for name, one in both["sets"].items()},
                         {"code": code["loss"], "prose": prose["loss"]})
        self.assertEqual((both["tokens"], both["sequences"]), (112, 7))
        self.assertAlmostEqual(both["loss"], (80 * code["loss"] + 32 * prose["loss"]) / 112)
        named = self.evaluate("--data", self.code, "--name", "a", "--data", self.code, "--name", "b", "--sequences", 2)
        self.assertEqual({name: one["sequences"] for name, one in named["sets"].items()}, {"a": 2, "b": 2})

    def test_what_is_trained_on_is_told(self):
        _, said = self.evaluations("apart", f"data.valid={{code: {self.code}}}")
        self.assertNotIn("is held out, but", said)
        sources = f"data.train=[{{path: {self.tokens}}}, {{path: {self.code}}}, {{path: {self.tokens}}}]"
        _, said = self.evaluations("same", f"data.valid={{code: {self.code}, prose: {self.prose}}}", sources)
        self.assertEqual(said.count("is held out, but"), 1)
        self.assertIn(f"{self.code} is held out, but has the tokens of data.train[1] ({self.code})", said)
        self.assertIn(f"data.train[2] ({self.tokens}) has the tokens of data.train[0]", said)

    def test_a_mask_that_only_training_uses_is_told(self):
        masked = []
        for name in ("a.h5", "b.h5"):
            masked.append(self.write_tokens(name, np.arange(65) % 101))
            with h5py.File(masked[-1], "r+") as file:
                file["loss_mask"] = np.arange(65, dtype=np.uint8) % 2
        _, said = self.evaluations("masked", f"data.valid={masked[1]}",
                                   f"data.train=[{{path: {masked[0]}, loss_mask: true}}]")
        self.assertIn(f"{masked[1]} has a loss mask, but every held-out target counts", said)
        _, said = self.evaluations("both", f"data.valid={masked[1]}", "data.valid_loss_mask=true",
                                   f"data.train=[{{path: {masked[0]}, loss_mask: true}}]")
        self.assertNotIn("has a loss mask, but", said)
        for option, told in (([], 1), (["--loss-mask"], 0)):
            done = upmoe("eval", self.model, "--seq-len", 16, "--data", masked[1], *option)
            self.assertEqual((done.returncode, done.stderr.count("--loss-mask is not given")), (0, told), done.stderr)

    def test_what_cannot_be(self):
        two = ("eval", self.model, "--seq-len", 16, "--data", self.code, "--data", self.code)
        self.refused(2, ["two token files have the name 'code'"], *two)
        self.refused(2, ["1 names for 2"], *two, "--name", "a")
        self.refused(2, ["--logits: of one"], *two, "--logits", self.folder / "l.safetensors")

    def test_ranks_evaluate_one_model_on_the_same_tokens(self):
        hosts = [self.folder / name for name in ("host0", "host1")]
        for host, tokens in zip(hosts, (self.code, self.prose), strict=True):
            shutil.copytree(self.model, host / "model")
            shutil.copy(tokens, host / "tokens.h5")
        arguments = ("eval", "model", "--data", "tokens.h5", "--seq-len", 16)
        self.refused_apart("different token files: rank 0 differs from rank 1 (rank 0 has", *arguments)
        config = hosts[1] / "model/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))
        self.refused_apart("different copies of model: rank 0 differs from rank 1 (rank 0 has", *arguments)


if __name__ == "__main__":
    unittest.main()
