"""upmoe cost from outside: counts and FLOPs beside those published, readings of the claim, runs, serving, refusals; and
docs/cost.md says what the program says.

usage: tests/launch/cost_command_test.py [--write]   (--write makes the tables of the document anew)
Needs UPMOE_BINARY.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = os.environ["UPMOE_BINARY"]
DOCUMENT = ROOT / "docs" / "cost.md"
# What stands between these is what the command in the first one prints.
README = ROOT / "README.md"
SHOWN = re.compile(r"<!-- from upmoe cost --published -->\n\n(.*?)\n<!-- end -->", re.DOTALL)
MADE = re.compile(r"<!-- upmoe (cost [^>]*?) -->\n\n(.*?)\n<!-- end -->", re.DOTALL)

# 10^9 total, activated, activated without embedding; GFLOP per token of training at 4096 (None: not pinned).
COMPUTED = {
    "mistral-7b": (7.2417, 7.2417, 6.9796, 45.88),
    "qwen1.5-7b": (7.7213, 7.7213, 6.4767, 45.81),
    "gemma-7b": (8.5377, 8.5377, 7.7512, 54.04),
    "deepseek-moe-16b": (16.3757, 2.8287, 2.4092, 17.12),
    "qwen1.5-moe-a2.7b": (14.3158, 2.6892, 2.0668, 15.47),
    "qwen1.5-1.8b": (1.8368, 1.8368, 1.2145, 10.36),
    "qwen1.5-32b": (32.5122, 32.5122, 30.9551, None),
    "mixtral-8x7b": (46.7028, 12.8799, 12.6178, 79.71),
    "mixtral-8x22b": (140.6301, 39.1615, 38.7588, 242.21),
    "dbrx": (131.5965, 36.4697, 35.2366, 221.16),
    "dots.llm1": (142.7744, 14.0166, 12.7709, 86.60),
    "qwen2-57b-a14b": (57.4087, 14.2493, 13.1602, 84.69),
    "qwen3-0.6b": (0.5960, 0.5960, 0.4405, 4.99),
    "qwen3-30b-a3b": (30.5321, 3.3530, 2.7307, 23.08),
    "marco-nano": (8.0015, 0.6027, 0.4471, 5.03),
}
# Shapes of our own, and what each stands for.
TINY = {"tiny-7b-shape": "qwen1.5-7b", "tiny-a2.7b-shape": "qwen1.5-moe-a2.7b", "tiny-1.8b-shape": "qwen1.5-1.8b"}
REMARKS = {
    "mistral-7b": "agrees",
    "qwen1.5-7b": "non-embedding cut, not rounded; the announcement's text says 6.5",
    "gemma-7b": "activated leaves out the embedding, which other rows count",
    "deepseek-moe-16b": "agrees",
    "qwen1.5-moe-a2.7b": "non-embedding cut, not rounded",
}


def upmoe(*arguments):
    return subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


class Cost(unittest.TestCase):
    def run_json(self, *arguments):
        done = upmoe("cost", *arguments, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def refused(self, status, words, *arguments):
        done = upmoe("cost", *arguments)
        self.assertEqual(done.returncode, status, (arguments, done.stderr))
        for word in words:
            self.assertIn(word, done.stderr)
        self.assertEqual(done.stdout, "")


class Models(Cost):
    def test_keys(self):
        a, b = self.run_json("qwen1.5-moe-a2.7b", ROOT / "configs" / "models" / "qwen1.5-7b.json", "--seq-len", 2048)
        self.assertEqual((a["name"], b["name"]), ("qwen1.5-moe-a2.7b", "qwen1.5-7b"))
        self.assertEqual((a["parameters"], a["activated"], a["activated_non_embedding"]),
                         (14315784192, 2689173504, 2066843648))
        self.assertAlmostEqual(a["train_flops_per_token"] * 1e-9, 14.87, delta=0.005)
        self.assertEqual(a["train_flops_per_token"], 3 * a["forward_flops_per_token"])
        self.assertEqual(a["kv_bytes_per_token"], 196608)
        self.assertEqual(b["kv_bytes_per_token"], 524288)
        self.assertEqual(a["seq_len"], 2048)
        self.assertAlmostEqual(sum(a["train_bytes"]["adamw"].values()) / a["parameters"], 16, delta=0.01)
        self.assertAlmostEqual(sum(a["train_bytes"]["adamw8bit"].values()) / a["parameters"], 6, delta=0.1)

    def test_a_directory_and_a_golden_model(self):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "mine"
            model.mkdir()
            (model / "config.json").write_text((ROOT / "tests/golden/dense/config.json").read_text())
            names = [m["name"] for m in self.run_json(model, f"{model}/", model / "config.json", "--seq-len", 16)]
            self.assertEqual(names, ["mine"] * 3)

    def test_recomputation_is_apart(self):
        none, block = (self.run_json("qwen1.5-1.8b", "--recompute", r)[0] for r in ("none", "block"))
        self.assertEqual(none["train_flops_per_token"], block["train_flops_per_token"])
        self.assertEqual(none["again_flops_per_token"], 0)
        head = 2 * 151936 * 2048
        self.assertEqual(block["again_flops_per_token"], block["forward_flops_per_token"] - head)

    def test_hours(self):
        one = self.run_json("qwen1.5-moe-a2.7b", "--tokens", "2.2T", "--machine", "h200-sxm", "--mfu", 0.48,
                            "--seq-len", 2048)[0]
        self.assertEqual(one["tokens"], 2.2e12)
        self.assertAlmostEqual(one["device_hours"], 19.1e3, delta=100)
        done = upmoe("cost", "qwen1.5-moe-a2.7b", "--tokens", "2.2e12", "--machine", "h200-sxm")
        self.assertIn("NVIDIA H200", done.stdout)

    def test_refusals(self):
        self.refused(2, ["no model 'qwen1.5-7'", "did you mean 'qwen1.5-7b'", "qwen2-57b-a14b"], "qwen1.5-7")
        self.refused(3, ["none/config.json"], "none/config.json")
        self.refused(2, ["--machine", "--tokens"], "qwen1.5-7b", "--machine", "h200-sxm")
        self.refused(2, ["no machine 'h200'", "h200-sxm"], "qwen1.5-7b", "--tokens", "1T", "--machine", "h200")
        self.refused(2, ["--mfu", "--machine"], "qwen1.5-7b", "--tokens", "1T", "--mfu", "0.5")
        self.refused(2, ["--tokens", "'2.2X'", "2.2T"], "qwen1.5-7b", "--tokens", "2.2X")
        self.refused(2, ["--tokens", "says nothing alone"], "--tokens", "1T")
        self.refused(2, ["--seq-len"], "qwen1.5-7b", "--seq-len", "0")
        self.refused(2, ["--published and --claim", "one of them"], "--published", "--claim")
        self.refused(2, ["MODEL does not go with --published", "--inference"], "qwen1.5-7b", "--published")
        self.refused(2, ["--source does not go with MODEL", "--run"], "qwen1.5-7b", "--source", "x")
        self.refused(2, ["compares two models, found 1"], "--inference", "qwen1.5-7b")
        with tempfile.TemporaryDirectory() as folder:
            machine = Path(folder) / "mine.yaml"
            machine.write_text("name: x\nsource: y\nbf16_tflops: 1\nmemory_gb: 1\nmemory_gbps: 1\n")
            self.refused(2, ["mine.yaml:5", "memory_gbps"], "qwen1.5-7b", "--tokens", "1T", "--machine", machine)

    def test_help_without_a_question(self):
        done = upmoe("cost")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("--published", done.stdout)


class Published(Cost):
    def test_table(self):
        rows = {row["name"]: row for row in self.run_json("--published")}
        shipped = {path.stem for path in (ROOT / "configs" / "models").glob("*.json")} - set(TINY)
        self.assertEqual(set(rows), shipped)
        for name, row in rows.items():
            total, activated, non_embedding, gflop = COMPUTED[name]
            for key, value in (("parameters", total), ("activated", activated),
                               ("activated_non_embedding", non_embedding)):
                self.assertEqual(f"{row[key] * 1e-9:.4f}", f"{value:.4f}", (name, key))
            if gflop:
                self.assertEqual(f"{row['train_flops_per_token'] * 1e-9:.2f}", f"{gflop:.2f}", name)
            if name in REMARKS:
                self.assertEqual(row["remark"], REMARKS[name])
                self.assertTrue(row["announced"])
            for key, printed in row["published"].items():
                computed = row["parameters" if key == "total" else key] * 1e-9
                if printed and (name, key) != ("gemma-7b", "activated"):  # the one cell that counts something else
                    cut = key + " cut" in row["remark"]  # 142 for 142.8
                    near = 0.1 if "." in printed else 1 if cut else 0.5
                    self.assertLessEqual(abs(float(printed) - computed), near, (name, key))


class Claim(Cost):
    def run_dir(self, folder, name, last):
        return Runs.run_dir(self, folder, name, last)

    def measured(self, *arguments):
        return [row for row in self.run_json("--claim", *arguments) if "measured" in row]

    # The readings that runs give are those of --run alone, beside all the others.
    def test_runs_stand_among_the_readings(self):
        with tempfile.TemporaryDirectory() as folder:
            mixture, dense, source = (self.run_dir(folder, name, last)
                                      for name, last in (("mixture", 3), ("dense", 4), ("source", 4.5)))
            plain = self.run_json("--claim")
            self.assertFalse([row for row in plain if "measured" in row])
            rows = self.run_json("--claim", "--run", mixture, dense, "--source", source)
            self.assertEqual([row for row in rows if "measured" not in row], plain)
            reaches = self.run_json("--run", mixture, dense, "--source", source)[0]["reaches"]
            found = [row["measured"] for row in rows if "measured" in row]
            self.assertEqual([(m["with_source"], m["quantity"]) for m in found],
                             [(charged, quantity) for charged in (False, True)
                              for quantity in ("tokens", "FLOPs", "seconds")])
            for row in rows:
                if (m := row.get("measured")) is None:
                    continue
                way = reaches[m["with_source"]]
                self.assertEqual(way["with_source"], m["with_source"])
                self.assertEqual(m["share"], way["share"][m["quantity"].lower()])
                self.assertEqual((m["loss"], m["dense"], m["mixture"]), (way["loss"], "dense", "mixture"))
                self.assertEqual(m["reached"], way["reached"])
                self.assertEqual(m.get("source"), "source" if m["with_source"] else None)
                self.assertAlmostEqual(row["saving"], 1 - m["share"])
                self.assertIn("charged" if m["with_source"] else "not charged (sunk)", row["reading"])
            self.assertAlmostEqual(found[0]["share"], 0.5)
            self.assertAlmostEqual(found[3]["share"], 1.5)
            text = upmoe("cost", "--claim", "--run", mixture, dense, "--source", source).stdout
            for words in ("| measured to a loss: tokens, source not charged (sunk)", "50.0 % saved: 50.0 % of dense's",
                          "nothing saved: 150.0 % of dense's", "with what source, its source, had cost",
                          "non-embedding parameters, as printed", "(training, smoothed)"):
                self.assertIn(words, text)

    # Below that loss from its first point on: what it or its source needed until there nobody wrote down.
    def test_a_loss_that_was_reached_before_the_first_point(self):
        with tempfile.TemporaryDirectory() as folder:
            mixture, dense, source = (self.run_dir(folder, name, last)
                                      for name, last in (("mixture", 3), ("dense", 4.99), ("source", 4.5)))
            self.assertTrue(all(row["measured"]["at_most"]
                                for row in self.measured("--run", mixture, dense, "--source", source)))
            text = upmoe("cost", "--claim", "--run", mixture, dense, "--source", source).stdout
            self.assertIn("at least 99.0 % saved: at most 1.0 % of dense's", text)
            self.assertIn("at least 0.0 % saved: at most 101.0 % of dense's", text)
            reaches = self.run_json("--run", mixture, dense)
            self.assertTrue(reaches[0]["reaches"][0]["at_most"])
            self.assertEqual(reaches[1]["reaches"], [{"loss": 3.0, "of": "mixture", "with_source": False,
                                                      "reached": False}])
            self.assertIn("at most 1.0 %", upmoe("cost", "--run", mixture, dense).stdout)

    def test_runs_without_a_source_and_in_vain(self):
        with tempfile.TemporaryDirectory() as folder:
            mixture, dense = self.run_dir(folder, "mixture", 4), self.run_dir(folder, "dense", 3)
            rows = self.measured("--run", mixture, dense)
            self.assertEqual(len(rows), 3)
            for row in rows:
                self.assertFalse(row["measured"]["reached"] or row["measured"]["with_source"])
                self.assertTrue("saving" not in row and "share" not in row["measured"])
                self.assertRegex(row["result"], r"not reached: mixture ends at [34]\.\d{4}")
            self.assertIn("--source RUN charges", upmoe("cost", "--claim", "--run", mixture, dense).stdout)
            self.assertIn("--claim --run MIXTURE DENSE [--source RUN]", upmoe("cost", "--claim").stdout)
            self.refused(2, ["takes two runs", "found 1"], "--claim", "--run", mixture)
            self.refused(2, ["takes two runs", "found 3"], "--claim", "--run", mixture, dense, dense)
            self.refused(2, ["--run MIXTURE DENSE"], "--claim", "--source", dense)
            self.refused(2, ["charges one --source, found 2"], "--claim", "--run", mixture, dense, "--source", dense,
                         mixture)
            self.refused(2, ["--claim and --fit", "one of them"], "--claim", "--fit", mixture)
            self.refused(2, ["--published and --run", "one of them"], "--published", "--run", mixture)
            self.refused(3, ["nowhere", "metrics.jsonl"], "--claim", "--run", mixture, Path(folder) / "nowhere")

    def test_runs_the_wrong_way_round(self):
        with tempfile.TemporaryDirectory() as folder:
            mixture, dense = self.run_dir(folder, "mixture", 3), self.run_dir(folder, "dense", 4)
            metrics = mixture / "metrics.jsonl"
            lines = [json.loads(line) | {"expert_load": [[0.5, 0.5]]} for line in metrics.read_text().splitlines()]
            metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            self.assertEqual(len(self.measured("--run", mixture, dense)), 3)
            self.refused(2, ["mixture is the run of a mixture", "--run MIXTURE DENSE"], "--claim", "--run", dense,
                         mixture)

    def test_readings(self):
        rows = self.run_json("--claim")
        savings = [round(row["saving"], 3) for row in rows if "saving" in row and "tokens" not in row]
        self.assertEqual(savings[:8], [0.692, 0.681, 0.649, 0.652, 0.664, 0.662, 0.660, 0.650])
        for row in rows:
            self.assertTrue(row["formula"] and row["result"], row)
        card = [row for row in rows if row.get("of") == "marco-nano"]
        self.assertEqual(len(card), 4)
        self.assertTrue(all("inferred" in row["reading"] for row in card if "105 %" in row["result"]))


class Runs(Cost):
    def run_dir(self, folder, name, last):
        path = Path(folder) / name
        path.mkdir()
        lines = [{"step": i, "tokens": 1000 * i, "loss": 5 - (5 - last) * i / 100, "flops": 1e9, "ranks": 4,
                  "seconds": 0.5} for i in range(1, 101)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def test_what_each_needs(self):
        with tempfile.TemporaryDirectory() as folder:
            fast, slow = self.run_dir(folder, "fast", 3), self.run_dir(folder, "slow", 4)
            one, two = self.run_json("--run", fast, slow, "--source", slow)
            alone, with_source = one["reaches"]
            self.assertAlmostEqual(alone["share"]["tokens"], 0.5)
            self.assertAlmostEqual(alone["spent"]["flops"], 200e9, delta=1)
            self.assertAlmostEqual(alone["spent"]["seconds"], 25)
            self.assertAlmostEqual(with_source["share"]["flops"], 1.5)
            self.assertFalse(two["reaches"][0]["reached"])
            text = upmoe("cost", "--run", fast, slow).stdout
            self.assertIn("not reached", text)
            self.assertIn("50.0 %", text)
            self.refused(3, ["nowhere", "metrics.jsonl"], "--run", Path(folder) / "nowhere")


class Fit(Cost):
    def run_dir(self, folder, tokens, flops, loss):
        path = Path(folder) / f"{tokens:g}_{flops:g}"
        path.mkdir(exist_ok=True)
        lines = [{"step": i, "tokens": tokens * i / 4, "loss": loss, "flops": flops * tokens / 4 / 2, "ranks": 2,
                  "seconds": 1} for i in range(1, 5)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def test_of_size_and_tokens(self):
        with tempfile.TemporaryDirectory() as folder:
            runs = [self.run_dir(folder, d, 6 * n, 1.7 + 400 * n ** -0.34 + 410 * d ** -0.28)
                    for n in (1e6, 4e6, 2e7) for d in (1e8, 1e9, 1e10)]
            fit = self.run_json("--fit", *runs)
            self.assertEqual(fit["law"], "L = E + A N^-a + B D^-b")
            for name, value in (("E", 1.7), ("a", 0.34), ("b", 0.28)):
                self.assertAlmostEqual(fit["numbers"][name]["value"], value, delta=2e-3)
            self.assertLess(fit["rms"], 1e-4)
            self.assertAlmostEqual(fit["runs"][0]["size"], 1e6, delta=1)
            shown = upmoe("cost", "--fit", *runs).stdout
            self.assertIn("smoothed training losses of 9 runs", shown)
            self.assertIn("the least loss for C FLOPs", shown)
            self.refused(2, ["has 5 numbers; found 5 runs"], "--fit", *runs[:3], runs[4], runs[8])
            self.refused(2, ["found 2 --source for 9 runs"], "--fit", *runs, "--source", *runs[:2])
            self.refused(2, ["--run charges one --source"], "--run", *runs[:2], "--source", *runs[:2])

    def test_of_upcycling(self):
        with tempfile.TemporaryDirectory() as folder:
            before, after = (1e8, 1e9, 1e10), (1e8, 4e8, 1.6e9)
            sources = {d: self.run_dir(folder, d, 6e5, 3) for d in before}
            runs, of = [], []
            for d1 in before:
                for d2 in after:
                    inner = Path(folder) / f"after_{d1:g}"
                    inner.mkdir(exist_ok=True)
                    loss = 1.5 + 90 * d1 ** -0.12 * d2 ** (-0.15 + 0.003 * math.log(d1))
                    runs.append(self.run_dir(inner, d2, 6e6, loss))
                    of.append(sources[d1])
            fit = self.run_json("--fit", *runs, "--source", *of)
            self.assertAlmostEqual(fit["numbers"]["r"]["value"], 0.003, delta=2e-4)
            self.assertEqual(fit["runs"][0]["source_tokens"], 1e8)
            self.assertEqual(len({run["name"] for run in fit["runs"]}), 9, "their folders are called the same")


class Inference(Cost):
    def test_times(self):
        report = self.run_json("--inference")
        self.assertEqual(report["models"], ["qwen1.5-moe-a2.7b", "qwen1.5-7b"])
        self.assertEqual([round(b["decode_ratio"], 2) for b in report["batches"]],
                         [2.97, 1.69, 1.09, 1.13, 1.39, 1.75, 2.08])
        self.assertAlmostEqual(report["requests_per_s"][0] / report["requests_per_s"][1], 2.13, delta=0.02)
        slower = self.run_json("--inference", "qwen1.5-moe-a2.7b", "qwen1.5-1.8b", "--machine", "h100-sxm")
        self.assertTrue(all(b["decode_ratio"] < 1 for b in slower["batches"]), "its own source is served faster")

    def test_times_of_another_request(self):
        usual, short = (self.run_json("--inference", *more) for more in ((), ("--in", 500, "--out", 100)))
        self.assertEqual((short["prompt"], short["output"]), (500, 100))
        for a, b in zip(usual["batches"], short["batches"], strict=True):
            self.assertLess(max(b["decode_seconds"]), max(a["decode_seconds"]))
            self.assertLess(max(b["prefill_seconds"]), max(a["prefill_seconds"]))
        self.refused(2, ["--in does not go with MODEL", "--inference"], "qwen1.5-7b", "--in", "5")


class TinyShapes(Cost):
    """What stands in for three models on a CPU has their ratios."""

    def test_flops_and_bytes(self):
        dense, mixture, source = self.run_json(*TINY, "--seq-len", 256)
        true_dense, true_mixture, true_source = self.run_json(*TINY.values(), "--seq-len", 4096)
        for key, measured, of_true, within in (
                ("forward_flops_per_token", mixture, true_mixture, 0.0005),
                ("forward_flops_per_token", source, true_source, 0.01),
                ("kv_bytes_per_token", mixture, true_mixture, 1e-9),
                ("kv_bytes_per_token", source, true_source, 1e-9),
                ("parameters", mixture, true_mixture, 0.04)):
            self.assertAlmostEqual(measured[key] / dense[key], of_true[key] / true_dense[key], delta=within, msg=key)
        self.assertAlmostEqual(mixture["forward_flops_per_token"] / dense["forward_flops_per_token"], 0.337, delta=5e-4)
        self.assertAlmostEqual(source["forward_flops_per_token"] / dense["forward_flops_per_token"], 0.22, delta=0.005)

    def test_times_to_serve(self):
        names = list(TINY)
        for a, b, within in ((1, 0, 0.01), (1, 2, 0.02)):
            tiny = self.run_json("--inference", names[a], names[b], "--in", 124, "--out", 124)
            true = self.run_json("--inference", TINY[names[a]], TINY[names[b]])
            for t, r in zip(tiny["batches"], true["batches"], strict=True):
                self.assertAlmostEqual(t["decode_ratio"] / r["decode_ratio"], 1, delta=within)


def announced():
    """The first table of `upmoe cost --published`: the announcement's models."""
    return upmoe("cost", "--published").stdout.split("\n\n")[0] + "\n"


class Document(Cost):
    def test_readme_shows_the_announced_models(self):
        self.assertEqual(SHOWN.search(README.read_text(encoding="utf-8"))[1], announced())

    def test_says_what_the_program_says(self):
        text = DOCUMENT.read_text(encoding="utf-8")
        self.assertGreaterEqual(len(MADE.findall(text)), 4)
        for command, stands in MADE.findall(text):
            self.assertEqual(stands, upmoe(*command.split()).stdout, f"{command}: run {Path(__file__).name} --write")


def write():
    readme = README.read_text(encoding="utf-8")
    README.write_text(SHOWN.sub(f"<!-- from upmoe cost --published -->\n\n{announced()}\n<!-- end -->", readme),
                      encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(MADE.sub(lambda m: f"<!-- upmoe {m[1]} -->\n\n{upmoe(*m[1].split()).stdout}\n<!-- end -->",
                                 text), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        unittest.main()
