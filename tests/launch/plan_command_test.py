"""upmoe plan from outside: its JSON, what it refuses and in which words, every shipped run, any number of ranks; and
docs/plan.md says what the program says.

usage: tests/launch/plan_command_test.py [--write]   (--write makes its tables and the picture of growth anew)
Needs UPMOE_BINARY.
"""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "tests" / "bench"))
from bench_record import choices_of  # noqa: E402

BINARY = os.environ["UPMOE_BINARY"]
DOCUMENT, PICTURE = ROOT / "docs" / "plan.md", ROOT / "docs" / "plan_growth.png"
# A command, and between the marks below it the table that it prints.
GROWTH = re.compile(r"(    (launch/plan_growth\.py .*?)\n\n.*?<!-- its table -->\n\n)(.*?)(\n<!-- end -->)", re.DOTALL)
RECORDS = re.compile(r"(<!-- its records -->\n\n)(.*?)(\n<!-- end -->)", re.DOTALL)
FULL = ROOT / "configs" / "plan" / "qwen1.5-moe-a2.7b.yaml"
MODEL = f"model.path={ROOT / 'configs' / 'models' / 'qwen1.5-moe-a2.7b.json'}"
DENSE = ROOT / "configs" / "models" / "qwen1.5-1.8b.json"
TEACHER = f"train.teacher.model={DENSE}"

KEYS = {"run", "world", "machine", "parallel", "ranks_without_experts", "micro_batches_per_rank", "tokens_per_step",
        "model_flops_per_step", "teacher_flops_per_step", "fullest_rank", "memory_fullest", "memory_mean",
        "device_bytes", "fits", "ranks", "time", "published", "changes"}
PURPOSES = {"weights", "gradients", "optimizer", "activations", "communication", "workspace", "process", "checkpoint",
            "total"}
TIMES = {"seconds", "compute", "calls", "exchange", "reduction", "stages", "bubble", "imbalance", "tokens_per_s",
         "tokens_per_s_per_rank", "flops_per_s_per_rank", "mfu", "limit"}
RANK = {"rank", "alike", "stage", "experts", "memory", "ops", "verbs", "seconds"}
LAYOUT = {"tp", "pp", "cp", "ep", "etp", "ranks_without_experts", "dp", "pp_chunks", "node_ranks", "zero",
          "micro_batch", "recompute", "seconds", "tokens_per_s", "mfu", "bytes"}


def upmoe(*arguments):
    return subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def processor_seconds():
    """Of all programs that this one has waited for: on one thread what they last, beside whatever else goes on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def growth(command, picture=None):
    words = shlex.split(command.replace("\\\n", " "))
    at = words.index("--out")
    words[at:at + 2] = ["--out", picture] if picture else []
    done = subprocess.run([sys.executable, *words, "--binary", BINARY], capture_output=True, text=True, check=False,
                          timeout=240, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


def against_records():
    done = subprocess.run([sys.executable, ROOT / "tests" / "bench" / "plan_against_records.py", "--binary", BINARY],
                          capture_output=True, text=True, check=False, timeout=240)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return done.stdout


def shipped_runs():
    return [path for folder in ("configs", "configs/quickstart", "configs/distillation")
            for path in sorted((ROOT / folder).glob("*.yaml"))]


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
                             {"calls", "flops", "model_flops", "flops_again", "flops_teacher", "bytes", "seconds"})
            self.assertEqual(set(rank["verbs"]["all_to_all_rows"]),
                             {"transfers", "bytes_inside_node", "bytes_between_nodes", "seconds_waited"})

    def test_a_teacher_is_counted_apart(self):
        alone, taught = (self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm", *more)
                         for more in ((), (TEACHER,)))
        self.assertEqual(alone["teacher_flops_per_step"], 0)
        self.assertEqual(set(taught["memory_fullest"]), PURPOSES | {"teacher"})
        self.assertEqual(taught["model_flops_per_step"], alone["model_flops_per_step"])
        self.assertGreater(taught["time"]["seconds"], alone["time"]["seconds"])
        self.assertEqual(sum(rank["alike"] * sum(op["flops_teacher"] for op in rank["ops"].values())
                             for rank in taught["ranks"]), taught["teacher_flops_per_step"])
        # The forward of a dense model: each product's weights once for every token.
        model = json.loads(DENSE.read_text(encoding="utf-8"))
        width, layers, vocab = model["hidden_size"], model["num_hidden_layers"], model["vocab_size"]
        products = layers * width * (4 * width + 3 * model["intermediate_size"]) + vocab * width
        self.assertEqual(sum(rank["alike"] * rank["ops"]["gemm"]["flops_teacher"] for rank in taught["ranks"]),
                         2 * products * taught["tokens_per_step"])
        # On every rank in bf16: those, the embedding, three biases and two norms a layer, and the last norm.
        weights = products + vocab * width + (5 * layers + 1) * width
        self.assertEqual(taught["memory_mean"]["teacher"], 2 * weights)
        text = upmoe("plan", FULL, MODEL, TEACHER, "--world", 8, "--machine", "h100-sxm").stdout
        for words in ("the teacher's", "of its teacher's forward"):
            self.assertIn(words, text)
        self.refused(["train.teacher: parallel.pp is 2"], FULL, MODEL, TEACHER, "--world", 8, "parallel.pp=2",
                     "parallel.ep=4")
        self.refused(["has a vocabulary of 152064 tokens"], FULL, MODEL, "--world", 8,
                     f"train.teacher.model={DENSE.parent / 'qwen1.5-32b.json'}")

    # What plan_against_measured.py goes through.
    def test_the_ways_to_recompute_are_the_programs(self):
        ways = choices_of(BINARY, "train.recompute")
        self.assertEqual((ways[0], ways[-1]), ("none", "block"))
        for way in ways:
            self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm", f"train.recompute={way}")

    def test_any_number_of_ranks_within_ten_seconds(self):
        for world, ep in ((1, 1), (8, 8), (60, 60), (64, 32), (64, 64), (512, 16), (4096, 32), (4096, 64)):
            with self.subTest(world=world, ep=ep):
                begin = processor_seconds()
                plan = self.planned(FULL, MODEL, "--world", world, "--machine", "h100-sxm", f"parallel.ep={ep}",
                                    f"train.global_batch={max(64, 4 * world)}")
                self.assertLess(processor_seconds() - begin, 10)
                self.assertEqual(sum(rank["alike"] for rank in plan["ranks"]), world)
                self.assertGreater(plan["time"]["tokens_per_s"], 0)
                self.assertEqual({rank["experts"] for rank in plan["ranks"]}, {60 // ep, -(-60 // ep)})
                self.assertEqual(plan["ranks_without_experts"], max(0, ep - 60))

    # 60 experts on 64 ranks: four have none, which is said, and wait for the others.
    def test_ranks_without_experts_are_said(self):
        run = [FULL, MODEL, "--world", 64, "--machine", "h100-sxm", "train.global_batch=256"]
        plan = self.planned(*run, "parallel.ep=64")
        self.assertEqual({rank["experts"]: rank["alike"] for rank in plan["ranks"]}, {0: 4, 1: 60})
        self.assertGreater(plan["time"]["imbalance"], 0)
        words = "parallel.ep: 64 ranks share 60 experts, so 4 of the 64 hold no routed expert"
        self.assertIn(words, upmoe("plan", *run, "parallel.ep=64").stdout)
        self.assertNotIn("hold no routed expert", upmoe("plan", *run, "parallel.ep=32").stdout)
        self.assertEqual(self.planned(*run, "parallel.ep=32")["ranks_without_experts"], 0)

    def test_the_published_stand_beside_it(self):
        plan = self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm")
        rates = {p["who"]: (p["tflops_per_gpu"], round(p["tokens_per_s_per_gpu"], -2)) for p in plan["published"]}
        self.assertEqual(rates, {"NeMo AutoModel": (277, 17900), "Megatron-Bridge": (299, 19300)})
        text = upmoe("plan", FULL, MODEL, "--world", 8, "--machine", "h100-sxm").stdout
        for words in ("NeMo AutoModel prints 277", "Megatron-Bridge prints 299", "tokens/s", "limited by"):
            self.assertIn(words, text)

    def test_search_gives_the_ten_fastest(self):
        begin = processor_seconds()
        found = self.planned(FULL, MODEL, "--world", 8, "--machine", "h100-sxm", "--search")
        self.assertLess(processor_seconds() - begin, 60)
        self.assertEqual(len(found["layouts"]), 10)
        for layout in found["layouts"]:
            self.assertEqual(set(layout), LAYOUT)
            self.assertEqual((layout["pp_chunks"], layout["node_ranks"]), (1, 0))
            self.assertIn(layout["zero"], (1, 2))
        seconds = [layout["seconds"] for layout in found["layouts"]]
        self.assertEqual(seconds, sorted(seconds))
        self.assertEqual(len(found["excluded"]), 8)
        self.assertEqual({layout["ranks_without_experts"] for layout in found["layouts"]}, {0})
        self.assertEqual(found["advice"], "")

    def test_search_says_what_it_sets_and_what_to_do_where_nothing_fits(self):
        search = [FULL, MODEL, "--machine", "h100-sxm", "--search", "parallel.zero=2"]
        done = upmoe("plan", *search, "--world", 1)
        self.assertEqual(done.returncode, 0, done.stderr)
        for words in ("zero is 1 or 2, pp_chunks 1 and node_ranks 0 in all of them", "no layout fits", " GiB of ",
                      "--world", "optimizer.name=adamw8bit", "data.seq_len"):
            self.assertIn(words, done.stdout)
        self.assertNotIn("parallel.reduce=bf16", done.stdout, "it is so")
        found = self.planned(*search, "--world", 1)
        self.assertEqual(found["layouts"], [])
        self.assertIn("no layout fits", found["advice"])
        found = self.planned(*search, "--world", 31, "train.global_batch=1", "train.micro_batch=1")
        self.assertEqual((found["layouts"], found["plans"]), ([], 0))
        self.assertIn("without --search", found["advice"])

    def test_refusals_name_the_cause(self):
        self.refused(["parallel.ep: 7", "possible meshes of 8 ranks"], FULL, MODEL, "--world", 8, "parallel.ep=7")
        # Of the possible meshes those are named in which every rank has an expert.
        self.refused(["parallel.ep: 128 does not divide the 64 ranks", "ep 32, etp 1", "ep 32, etp 2"], FULL, MODEL,
                     "--world", 64, "parallel.ep=128", "train.global_batch=128")
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
        self.assertGreater(len(shipped_runs()), 5)
        for run in shipped_runs():
            for world in (1, 2):
                with self.subTest(run=run.name, world=world):
                    done = upmoe("plan", run, "--world", world)
                    if done.returncode == 0:
                        self.assertIn("together", done.stdout)
                    else:  # its model is not made yet, or the mesh is for other ranks
                        self.assertIn(done.returncode, (2, 3), done.stderr)
                        self.assertIn("upmoe: error:", done.stderr)

    # With the model described, it is the mesh alone: twice the ranks have half the experts and micro-batches each.
    def test_every_shipped_run_plans_for_its_ranks(self):
        for run in shipped_runs():
            with self.subTest(run=run.name):
                models = [MODEL, TEACHER] if run.parent.name == "distillation" else [MODEL]
                # Named, so that what doctor has written of this machine, which may know no links, is not asked.
                # Biases belong to routers of sigmoids, which this model has not.
                machine = ["--machine", "h100-sxm", "train.precision=bf16", "router.bias_rate=0"]
                one, two = (self.planned(run, *models, "--world", world, "data.seq_len=2048", f"parallel.ep={world}",
                                         "train.global_batch=48", *machine) for world in (1, 2))
                for world, plan in ((1, one), (2, two)):
                    self.assertEqual((plan["world"], plan["parallel"]["dp"], plan["parallel"]["ep"]), (world,) * 3)
                    self.assertEqual(sum(rank["alike"] for rank in plan["ranks"]), world)
                    self.assertEqual({rank["experts"] for rank in plan["ranks"]}, {60 // world})
                self.assertEqual(one["micro_batches_per_rank"], 2 * two["micro_batches_per_rank"])
                self.assertEqual(one["model_flops_per_step"], two["model_flops_per_step"])
                self.assertLess(two["memory_fullest"]["weights"], 0.6 * one["memory_fullest"]["weights"])


class Document(unittest.TestCase):
    def test_growth_is_what_the_program_foretells(self):
        _, command, stands, _ = GROWTH.search(DOCUMENT.read_text(encoding="utf-8")).groups()
        self.assertEqual(stands, growth(command), f"{command}: run {Path(__file__).name} --write")

    def test_records_stand_beside_what_is_foretold_now(self):
        stands = RECORDS.search(DOCUMENT.read_text(encoding="utf-8"))[2]
        self.assertEqual(stands, against_records(), f"run {Path(__file__).name} --write")
        self.assertGreaterEqual(stands.count("\n| H"), 11)


def write():
    text = DOCUMENT.read_text(encoding="utf-8")
    text = RECORDS.sub(lambda m: m[1] + against_records() + m[3], text)
    DOCUMENT.write_text(GROWTH.sub(lambda m: m[1] + growth(m[2], PICTURE) + m[4], text), encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        unittest.main(verbosity=2)
