"""upmoe plan from outside: its JSON, what it refuses and in which words, every shipped run, any number of ranks.

Needs UPMOE_BINARY.
"""

import json
import os
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = os.environ["UPMOE_BINARY"]
FULL = ROOT / "configs" / "plan" / "qwen1.5-moe-a2.7b.yaml"
MODEL = f"model.path={ROOT / 'configs' / 'models' / 'qwen1.5-moe-a2.7b.json'}"

KEYS = {"run", "world", "machine", "parallel", "micro_batches_per_rank", "tokens_per_step",
        "model_flops_per_step", "fullest_rank", "memory_fullest", "memory_mean", "device_bytes", "fits", "ranks",
        "time", "published", "changes"}
PURPOSES = {"weights", "gradients", "optimizer", "activations", "communication", "workspace", "process", "checkpoint",
            "total"}
TIMES = {"seconds", "compute", "calls", "exchange", "reduction", "stages", "bubble", "imbalance", "tokens_per_s",
         "tokens_per_s_per_rank", "flops_per_s_per_rank", "mfu", "limit"}
RANK = {"rank", "alike", "stage", "experts", "memory", "ops", "verbs", "seconds"}
LAYOUT = {"tp", "pp", "cp", "ep", "etp", "dp", "zero", "micro_batch", "recompute", "seconds", "tokens_per_s", "mfu",
          "bytes"}


def upmoe(*arguments):
    return subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


class Plan(unittest.TestCase):
    def planned(self, *arguments):
        done = upmoe("plan", *arguments, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def refused(self, words, *arguments):
        done = upmoe("plan", *arguments)
        self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def test_keys_of_json(self):
        plan = self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm")
        self.assertEqual(set(plan), KEYS)
        self.assertEqual(set(plan["memory_fullest"]), PURPOSES)
        self.assertEqual(set(plan["memory_mean"]), PURPOSES)
        self.assertEqual(set(plan["time"]), TIMES)
        self.assertEqual({rank["experts"] for rank in plan["ranks"]}, {7, 8})
        self.assertEqual(sum(rank["alike"] for rank in plan["ranks"]), 8)
        for rank in plan["ranks"]:
            self.assertEqual(set(rank), RANK)
            self.assertEqual(set(rank["ops"]["gemm"]),
                             {"calls", "flops", "model_flops", "flops_again", "bytes", "seconds"})
            self.assertEqual(set(rank["verbs"]["all_to_all_rows"]),
                             {"transfers", "bytes_inside_node", "bytes_between_nodes", "seconds_waited"})

    def test_any_number_of_ranks_within_ten_seconds(self):
        for world, ep in ((1, 1), (8, 8), (64, 32), (512, 16), (4096, 32)):
            with self.subTest(world=world):
                begin = time.monotonic()
                plan = self.planned(FULL, MODEL, "--world", world, "--machine", "h100-sxm", f"parallel.ep={ep}",
                                    f"train.global_batch={max(64, 4 * world)}")
                self.assertLess(time.monotonic() - begin, 10)
                self.assertEqual(sum(rank["alike"] for rank in plan["ranks"]), world)
                self.assertGreater(plan["time"]["tokens_per_s"], 0)

    def test_the_published_stand_beside_it(self):
        plan = self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm")
        rates = {p["who"]: (p["tflops_per_gpu"], round(p["tokens_per_s_per_gpu"], -2)) for p in plan["published"]}
        self.assertEqual(rates, {"NeMo AutoModel": (277, 17900), "Megatron-Bridge": (299, 19300)})
        text = upmoe("plan", FULL, MODEL, "--world", 8, "--machine", "h100-sxm").stdout
        for words in ("NeMo AutoModel prints 277", "Megatron-Bridge prints 299", "tokens/s", "limited by"):
            self.assertIn(words, text)

    def test_search_gives_the_ten_fastest(self):
        begin = time.monotonic()
        found = self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm", "--search")
        self.assertLess(time.monotonic() - begin, 60)
        self.assertEqual(len(found["layouts"]), 10)
        for layout in found["layouts"]:
            self.assertEqual(set(layout), LAYOUT)
        seconds = [layout["seconds"] for layout in found["layouts"]]
        self.assertEqual(seconds, sorted(seconds))
        self.assertEqual(len(found["excluded"]), 7)

    def test_refusals_name_the_cause(self):
        self.refused(["parallel.ep: 7", "possible meshes of 8 ranks"], FULL, MODEL, "--world", 8, "parallel.ep=7")
        self.refused(["--world"], FULL, MODEL)
        self.refused(["--world"], FULL, MODEL, "--world", 0)
        self.refused(["no machine 'h100'", "h100-sxm"], FULL, MODEL, "--world", 8, "--machine", "h100")
        self.refused(["rates.gemm_fp32"], FULL, MODEL, "--world", 8, "--machine", "h100-sxm", "train.precision=fp32",
                     "parallel.reduce=fp32")
        self.refused(["rates.edges"], FULL, MODEL, "--world", 8, "--machine", "a100-80")
        with tempfile.TemporaryDirectory() as folder:
            machine = Path(folder) / "machine.yaml"
            machine.write_text((ROOT / "configs/machines/h100-sxm.yaml").read_text(encoding="utf-8") + "speed: 3\n",
                               encoding="utf-8")
            self.refused(["unknown key 'speed'", str(machine)], FULL, MODEL, "--world", 8, "--machine", machine)

    @unittest.skipIf((ROOT / "configs/machines/this.yaml").exists(), "doctor has described this machine")
    def test_without_a_machine_there_is_memory_and_no_time(self):
        plan = self.planned(FULL, MODEL, "--world", 8)
        self.assertIsNone(plan["time"])
        self.assertEqual(plan["device_bytes"], 0)
        self.assertGreater(plan["memory_fullest"]["activations"], 0)
        self.refused(["--search", "--machine"], FULL, MODEL, "--world", 8, "--search")

    def test_every_shipped_run_plans_or_says_why_not(self):
        runs = sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs" / "quickstart").glob("*.yaml"))
        self.assertGreater(len(runs), 5)
        for run in runs:
            for world in (1, 2):
                with self.subTest(run=run.name, world=world):
                    done = upmoe("plan", run, "--world", world)
                    if done.returncode == 0:
                        self.assertIn("together", done.stdout)
                    else:  # its model is not made yet, or the mesh is for other ranks
                        self.assertIn(done.returncode, (2, 3), done.stderr)
                        self.assertIn("upmoe: error:", done.stderr)
                    # With the model described, it is the mesh alone.
                    done = upmoe("plan", run, "--world", 2, MODEL, "data.seq_len=2048", "parallel.ep=1",
                                 "train.global_batch=64")
                    self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
