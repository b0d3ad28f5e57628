"""What the program tells a user: near names, what differs at a resume, the start of a run, lines with a time, closed
pipes. Needs UPMOE_BINARY and, for token files, h5py.
"""

import json
import os
import re
import shutil
import subprocess
import unittest

import cli_test
import numpy as np
from cli_test import BINARY, COMMANDS, ROOT, safetensors_bytes, upmoe

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


def shell(command, **environment):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "UPMOE": BINARY} | environment)


class CommandLine(unittest.TestCase):
    def refused(self, words, *arguments):
        done = upmoe(*arguments)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertEqual(done.stderr.count("error:"), 1, done.stderr)
        for word in words:
            self.assertIn(word, done.stderr)

    def test_an_unknown_name_brings_the_nearest(self):
        self.refused(["unknown command 'trian'", "did you mean 'train'?"], "trian", "run.yaml")
        self.refused(["unknown command 'xyzzy'", *COMMANDS], "xyzzy")
        self.refused(["a command is missing", *COMMANDS])
        self.refused(["unknown option '--frsh'", "did you mean '--fresh'?"], "train", "run.yaml", "--frsh")
        self.refused(["unknown option '--seqlen'", "did you mean '--seq-len'?"], "eval", "m", "--seqlen", "4")
        self.refused(["unknown option '--form'"], "eval", "m", "--data", "d", "--form=x")
        self.refused(["without dashes", "train.steps=VALUE"], "train", "run.yaml", "--train.steps=5")
        self.refused(["options stand behind the command"], "--fresh", "train", "run.yaml")

    # One function declares them.
    def test_commands_that_compute_have_the_same_options_for_it(self):
        found = []
        for command in ("eval", "generate"):
            shown = " ".join(upmoe(command, "--help").stdout.split())
            found.append(re.search(r"--precision .*GPUs where every rank has one", shown)[0])
            self.assertIn("REQUIRED Hugging Face directory, checkpoint or run directory", shown)
            for option, wrong in (("--precision", "fp64"), ("--router-dtype", "bf16"), ("--device", "tpu")):
                self.assertIn(f"{option} TEXT", found[-1])
                self.refused([f"upmoe {command}", option, wrong], command, "m", option, wrong)
        self.assertEqual(*found)

    def test_help_leads_to_every_configuration_key(self):
        frozen = (ROOT / "tests" / "configs" / "frozen_keys.txt").read_text(encoding="utf-8")
        train, upcycle = frozen.split("# upmoe upcycle\n")
        for command, keys in (("train", train), ("upcycle", upcycle)):
            shown = upmoe(command, "--help").stdout
            for key in re.findall(r"^([\w.]+) : ", keys, re.MULTILINE):
                self.assertRegex(shown, rf"(?m)^  {re.escape(key)} = ")
            self.assertIn(f"upmoe {command} --help", upmoe("--help").stdout)


class Requests(cli_test.CliTest):
    def train(self, *overrides, status=0, run=None):
        done = upmoe("train", run or self.write_run(), *overrides)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stderr

    def other_model(self, name, change):
        other = self.folder / name
        shutil.copytree(self.model, other)
        tensors = dict(self.tensors)
        change(other, tensors)
        (other / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return other

    def test_a_resume_says_each_changed_key_and_what_jumps(self):
        self.assertNotIn(" -> ", self.train("train.steps=2"))
        said = self.train("train.steps=4", "optimizer.lr=1e-3", "optimizer.clip=0.5", "schedule.name=wsd",
                          "router.aux_loss=0.5", "data.mask_documents=true", "freeze=['*mlp.gate.weight']",
                          "checkpoint.keep=2", "log.tensorboard=false")
        for line in ("train.steps: 2 -> 4", "optimizer.lr: 0.0003 -> 0.001", "optimizer.clip: 1 -> 0.5",
                     "schedule.name: cosine -> wsd", "router.aux_loss: 0.001 -> 0.5",
                     "data.mask_documents: false -> true", "checkpoint.keep: 3 -> 2", "log.tensorboard: true -> false"):
            self.assertRegex(said, rf"(?m)^{STAMP}  {re.escape(line)}$")
        self.assertIn("freeze: [] -> ", said)
        self.assertRegex(said, r"the learning rate goes from 3e-05 at step 2 to 0.001 at step 3")
        self.assertEqual(len(re.findall(" -> ", said)), 9, said)
        kept = (self.folder / "run" / "config.yaml").read_text(encoding="utf-8")
        self.assertIn("# from step 3 on: optimizer.lr: 0.0003 -> 0.001\n", kept)
        self.assertIn("lr: 0.001\n", kept)
        again = self.train("train.steps=5", run=self.folder / "run" / "config.yaml")
        self.assertEqual(re.findall(r"(\S+): \S+ -> ", again), ["train.steps"], again)

    def test_another_data_order_names_its_keys(self):
        self.train()
        self.assertIn("data.seed: 1 -> 2", self.train("train.steps=3", "data.seed=2", status=3))

    def test_another_model_at_a_resume_is_refused(self):
        self.train()
        kept = (self.folder / "run" / "config.yaml").read_text(encoding="utf-8")

        def other_weights(_, tensors):
            name = "model.layers.1.mlp.experts.7.up_proj.weight"
            dtype, shape, data = tensors[name]
            tensors[name] = (dtype, shape, bytes(len(data)))

        def other_config(folder, _):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}), encoding="utf-8")

        def other_family(folder, tensors):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            own = {"model_type": "mixtral", "num_local_experts": config["num_experts"],
                   "intermediate_size": config["moe_intermediate_size"], "norm_topk_prob": True, "qkv_bias": False}
            (folder / "config.json").write_text(json.dumps(config | own), encoding="utf-8")
            for name in list(tensors):
                tensor = tensors.pop(name)
                if not name.endswith(".bias") and "shared_expert" not in name:
                    for ours, theirs in ((".mlp.", ".block_sparse_moe."), ("gate_proj", "w1"), ("down_proj", "w2"),
                                         ("up_proj", "w3")):
                        name = name.replace(ours, theirs)
                    tensors[name] = tensor

        for name, change, words in (("weights", other_weights, "the weights differ"),
                                    ("config", other_config, "rope_theta"),
                                    ("family", other_family, "a model of another family: mixtral, not qwen2_moe")):
            other = self.other_model(name, change)
            said = self.train("train.steps=3", f"model.path={other}", status=2)
            for word in (words, str(other), f"model.path={self.model}", "run.dir"):
                self.assertIn(word, said)
        said = self.train("train.steps=3", f"model.path={self.folder}/nowhere", status=2)
        self.assertIn("does not exist", said)
        self.assertIn("model.init", self.train("train.steps=3", "model.init=random", status=2))
        # The folder has other contents now.
        other_weights(None, self.tensors)
        good = (self.model / "model.safetensors").read_bytes()
        self.write_weights(safetensors_bytes(self.tensors))
        self.assertIn("the weights differ", self.train("train.steps=3", status=2))
        self.write_weights(good)
        self.assertEqual((self.folder / "run" / "config.yaml").read_text(encoding="utf-8"), kept)

    def test_the_same_model_elsewhere_or_gone_goes_on(self):
        self.train()
        moved = self.folder / "moved"
        self.model.rename(moved)
        self.assertIn("cannot be read any more", self.train("train.steps=3"))
        said = self.train("train.steps=4", f"model.path={self.folder}/./moved")
        self.assertIn("(the same model)", said)
        self.assertIn("moved", (self.folder / "run" / "config.yaml").read_text(encoding="utf-8"))

    def test_the_start_says_what_is_going_to_happen(self):
        valid = self.write_tokens("valid.h5", np.arange(200) % 101)
        said = self.train("freeze=['*mlp.gate.weight']", f"data.valid={valid}", "train.steps=3", "checkpoint.every=2")
        for pattern in (rf"model: {self.model} \(its weights\), qwen2_moe: .* parameters, .* activated",
                        r"frozen: \d+ of \d+ parameters \(.*\): layers\.\*\.moe\.router_ED",
                        r"data: 124 sequences of 16 tokens in 1 file; steps 1 to 3 take 12, 0\.0968 epochs",
                        r"held out: 12 of the 12 sequences", r"ranks: 1 ",
                        rf"output: {self.folder}/run: checkpoints every 2 steps"):
            self.assertRegex(said, pattern)
        self.assertIn("held-out loss", said)
        start = json.loads((self.folder / "run" / "starts.jsonl").read_text(encoding="utf-8"))
        self.assertEqual(start["command"][1], "train")
        self.assertEqual(start["command"][-1], "checkpoint.every=2")
        self.assertEqual(start["program"]["version"], upmoe("--version").stdout.split()[-1])
        self.assertRegex(start["machine"], r", \d+ GiB$")
        said = self.train("train.steps=4", "schedule.warmup=50", "schedule.decay_fraction=0.3", "train.steps=5")
        for words in ("going on after step 3", "the learning rate only rises", "schedule.decay_fraction: 0.3 has no",
                      "given twice", "steps 4 to 5 take 8"):
            self.assertIn(words, said)

    def test_paths_are_expanded_or_refused(self):
        home = self.folder / "home"
        home.mkdir()
        shutil.copy(self.tokens, home / "t.h5")
        run = self.write_run(run="{dir: ~/r}", data="{train: $HOME/t.h5, seq_len: 16}")
        done = shell(f"cd {home} && $UPMOE train {run} && $UPMOE inspect --json ~/t.h5 && $UPMOE export '~/r' --to=~/e",
                     HOME=str(home))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(sorted(p.name for p in home.iterdir()), ["e", "r", "t.h5"])
        # The scripts that start a run again must find its checkpoints at the same place.
        found = shell(f"cd {home} && . {ROOT}/launch/restart_rules.sh && newest_step $(run_dir_of upmoe train {run})",
                      HOME=str(home))
        self.assertEqual(found.stdout, "2\n", found.stderr)
        self.refused(2, ["NO_SUCH_PLACE", "unset"], "train", run, "run.dir=$NO_SUCH_PLACE/x")
        self.refused(2, ["NO_SUCH_PLACE"], "export", self.model, "--to", "${NO_SUCH_PLACE}/x")
        # As the shell names what is there, for */t$^*: no name of a variable, and not to be written otherwise.
        for name in ("t$^.h5", "t_$NO_SUCH_PLACE", "~no_such_user"):
            shutil.copy(self.tokens, home / name)
            done = shell(f"cd {home} && $UPMOE inspect --json '{name}'")
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_lines_in_a_file_carry_a_time(self):
        for line in self.train().splitlines():
            self.assertRegex(line, rf"^{STAMP}")
        self.assertRegex(upmoe("eval", self.folder / "no", "--data", "d", "--seq-len", 4).stderr, rf"^{STAMP}")
        if not shutil.which("script"):
            self.skipTest("no terminal can be made here")
        run = self.write_run(run=f"{{dir: {self.folder}/second}}")
        watched = shell(f"script -qec '{BINARY} train {run}' /dev/null").stdout
        self.assertIn("step 2/2", watched)
        self.assertNotRegex(watched, STAMP)

    def test_weights_that_are_not_finite(self):
        name = "model.layers.0.self_attn.q_proj.weight"
        dtype, shape, data = self.tensors[name]
        self.tensors[name] = (dtype, shape, b"\xff" * len(data))
        self.write_weights(safetensors_bytes(self.tensors))
        done = upmoe("eval", self.model, "--data", self.tokens, "--seq-len", 16, "--sequences", 2)
        self.assertEqual((done.returncode, done.stdout), (4, ""), done.stderr)
        self.assertIn("not finite", done.stderr)

    def test_near_model_folders_are_named(self):
        cache = self.folder / "hub" / "models--who--what"
        snapshot = cache / "snapshots" / "0123abcd"
        snapshot.parent.mkdir(parents=True)
        shutil.copytree(self.model, snapshot)
        data = ("--data", self.tokens, "--seq-len", 16)
        for given in (cache, f"{cache}/", cache.parent, snapshot.parent):
            self.refused(3, [snapshot], "eval", given, *data)
        self.refused(3, [snapshot, "snapshots/"], "train", self.write_run(), f"model.path={cache}")
        self.refused(3, [snapshot], "train", self.write_run(), f"model.path={cache}", "model.init=random")
        self.refused(3, [snapshot], "inspect", cache)
        weights = self.model / "model.safetensors"
        for words in (("eval", weights, *data), ("inspect", weights)):
            self.refused(3, [f"give its folder, {self.model}"], *words)

    def test_what_lies_beside_models_is_named(self):
        adapter, checkpoints = self.folder / "adapter", self.folder / "run" / "checkpoints"
        adapter.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (adapter / name).write_text("{}")
        data = ("--data", self.tokens, "--seq-len", 16)
        for given in (adapter, f"{adapter}/", adapter / "adapter_model.safetensors"):
            for words in (("eval", given, *data), ("inspect", given), ("export", given, "--to", self.folder / "x")):
                self.refused(3, [f"--merge-adapter {adapter}`"], *words)
        self.refused(3, ["--merge-adapter"], "train", self.write_run(), f"model.path={adapter}")
        (checkpoints / "step_00000002").mkdir(parents=True)
        self.refused(3, ["neither a model directory"], "inspect", checkpoints)
        (checkpoints / "step_00000002" / "manifest.json").write_text("{}")
        for words in (("eval", checkpoints, *data), ("inspect", checkpoints)):
            self.refused(3, [f"its run's folder, {checkpoints.parent},", checkpoints / "step_00000002"], *words)

    def test_an_option_without_effect_is_refused(self):
        recipe = ROOT / "configs" / "upcycle" / "qwen1.5-moe-a2.7b-tiny.yaml"
        self.refused(2, ["--max-shard-bytes", "one shard per rank"], "upcycle", recipe, "--from", self.model, "--to",
                     self.folder / "x", "--form", "checkpoint", "--max-shard-bytes", 1000)


class ClosedPipes(cli_test.CliTest):
    def test_a_reader_that_has_had_enough_is_no_error(self):
        for command in ("--help", "train --help", f"inspect {self.model}", f"inspect --json {self.model}",
                        f"eval {self.model} --data {self.tokens} --seq-len 16 --sequences 1"):
            done = shell(f"set -o pipefail; $UPMOE {command} | true")
            self.assertEqual((done.returncode, done.stderr), (0, ""), command)

    def test_other_failures_of_standard_output_are_errors(self):
        for command in ("--help", f"inspect {self.model}"):
            done = shell(f"$UPMOE {command} > /dev/full")
            self.assertEqual(done.returncode, 3, command)
            self.assertIn("standard output cannot be written", done.stderr)

    def test_training_goes_on_without_a_reader(self):
        run = self.write_run(train="{steps: 30, global_batch: 4, micro_batch: 1}")
        done = shell(f"$UPMOE train {run} 2>&1 | head -n 1; exit ${{PIPESTATUS[0]}}")
        self.assertEqual(done.returncode, 0, done.stderr)
        last = json.loads((self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        self.assertEqual(last["step"], 30)

    def test_closed_streams_are_no_files_of_ours(self):
        done = shell(f"$UPMOE train {self.write_run()} <&- >&- 2>&-")
        self.assertEqual(done.returncode, 0)
        verify = upmoe("inspect", "--verify", self.folder / "run")
        self.assertEqual(verify.returncode, 0, verify.stderr)
        for path in (self.folder / "run").rglob("*"):
            self.assertFalse(path.is_file() and b"loss" in path.read_bytes() and path.suffix == ".h5", path)


if __name__ == "__main__":
    unittest.main()
