"""The upmoe program from outside: help, exit status and the one message for what a user can get wrong.

Needs UPMOE_BINARY and, for token files, h5py.
"""

import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
from megatron_set import write_megatron_set  # noqa: E402
from safetensors_file import read_safetensors  # noqa: E402

BINARY = os.environ["UPMOE_BINARY"]
GOLDEN = "moe_odd"  # 13 experts, vocabulary 101, 64 positions
COMMANDS = ("upcycle", "train", "eval", "generate", "export", "inspect", "cost", "plan", "doctor", "report", "study")


def upmoe(*arguments, ranks=0, cwd=None):
    words = [BINARY, *map(str, arguments)]
    if ranks:
        words = [ROOT / "launch" / "run_local.sh", str(ranks), *words]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120, cwd=cwd,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def safetensors_bytes(tensors):
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


class CliTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.model = self.folder / "model"
        self.model.mkdir()
        shutil.copy(ROOT / "tests" / "golden" / GOLDEN / "config.json", self.model)
        self.tensors = {name: tensor for name, tensor in
                        read_safetensors(ROOT / "tests" / "golden" / f"{GOLDEN}.safetensors")[0].items()
                        if name.startswith(("model.", "lm_head."))}
        self.write_weights(safetensors_bytes(self.tensors))
        self.tokens = self.write_tokens("tokens.h5", np.arange(2000) % 101)

    def write_weights(self, data):
        (self.model / "model.safetensors").write_bytes(data)

    def write_tokens(self, name, tokens):
        with h5py.File(self.folder / name, "w") as file:
            file["tokens"] = np.asarray(tokens, dtype=np.uint32)
            file["document_ends"] = np.array([len(tokens)], dtype=np.int64)
            file.attrs["vocab_size"] = 101
            file.attrs["eos_id"] = 0
            file.attrs["tokenizer_sha256"] = "0" * 64
            file.attrs["format"] = "upmoe-tokens-1"
        return self.folder / name

    def write_run(self, **changes):
        run = {"run": f"{{dir: {self.folder / 'run'}, seed: 1}}", "model": f"{{path: {self.model}, init: weights}}",
               "data": f"{{train: [{{path: {self.tokens}, weight: 1.0}}], seq_len: 16}}",
               "train": "{steps: 2, global_batch: 4, micro_batch: 1, precision: fp32}"} | changes
        path = self.folder / "run.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in run.items()), encoding="utf-8")
        return path

    def refused_apart(self, words, *arguments):
        """Of two ranks that stand in a folder each, host0 and host1, where relative paths lead to other files."""
        script = self.folder / "apart.sh"
        script.write_text(f'#!/bin/sh\ncd {shlex.quote(str(self.folder))}/host"$OMPI_COMM_WORLD_RANK" || exit 1\n'
                          f'exec {shlex.quote(BINARY)} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        done = subprocess.run([ROOT / "launch" / "run_local.sh", "2", script, *map(str, arguments)],
                              capture_output=True, text=True, check=False, timeout=120,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertIn(words, done.stderr)
        self.assertEqual(done.stderr.count("error:"), 1, done.stderr)

    def refused(self, status, words, *arguments, ranks=0):
        done = upmoe(*arguments, ranks=ranks)
        self.assertEqual(done.returncode, status, done.stderr)
        for word in words:
            self.assertIn(str(word), done.stderr)
        self.assertEqual(done.stderr.count("error:"), 1, done.stderr)
        self.assertFalse((self.folder / "run" / "metrics.jsonl").exists(), "something was trained")
        return done


class Help(unittest.TestCase):
    def test_help_and_version(self):
        done = upmoe("--help")
        self.assertEqual(done.returncode, 0, done.stderr)
        for command in COMMANDS:
            self.assertIn(command, done.stdout)
            one = upmoe(command, "--help")
            self.assertEqual(one.returncode, 0, one.stderr)
            self.assertIn("Usage" if "Usage" in one.stdout else "usage", one.stdout)
        self.assertEqual(upmoe("--version").returncode, 0)

    def test_wrong_command_lines(self):
        for arguments in ((), ("no-such-command",), ("train",), ("eval", "somewhere"), ("train", "--no-such-option")):
            done = upmoe(*arguments)
            self.assertEqual(done.returncode, 2, (arguments, done.stderr))
            self.assertTrue(done.stderr, arguments)


class Configuration(CliTest):
    def test_runs_at_all(self):
        done = upmoe("train", self.write_run())
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = (self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.assertEqual([json.loads(line)["step"] for line in lines], [1, 2])

    def test_unknown_key(self):
        run = self.write_run(train="{steps: 2, global_batch: 4, micro_bach: 1}")
        self.refused(2, [f"{run}:4", "micro_bach", "micro_batch"], "train", run)
        self.refused(2, ["micro_bach"], "train", run, ranks=2)

    def test_all_problems_at_once(self):
        run = self.write_run(train="{steps: many, global_batch: 4, micro_batch: 1}", modle="{path: x}")
        self.refused(2, ["steps", "many", "modle"], "train", run)

    def test_wrong_override(self):
        self.refused(2, ["train.stepz"], "train", self.write_run(), "train.stepz=3")

    def test_missing_files(self):
        self.refused(2, [self.folder / "no.yaml"], "train", self.folder / "no.yaml")
        self.refused(3, [self.folder / "no"], "train", self.write_run(), f"model.path={self.folder / 'no'}")
        self.refused(3, [self.folder / "no.h5"], "eval", self.model, "--data", self.folder / "no.h5", "--seq-len", 16)

    def test_impossible_layouts(self):
        run = self.write_run()
        for axis in ("tp", "pp", "cp", "etp"):
            self.refused(2, [axis], "train", run, f"parallel.{axis}=2")
        self.refused(2, ["ep"], "train", run, "parallel.ep=3", ranks=2)
        self.refused(2, ["global_batch"], "train", run, "train.micro_batch=3")

    def test_sequence_longer_than_positions(self):
        self.refused(2, ["seq_len", 64], "train", self.write_run(), "data.seq_len=128")


class BadFiles(CliTest):
    def eval_refused(self, *words):
        self.refused(3, words, "eval", self.model, "--data", self.tokens, "--seq-len", 16)

    def test_model_is_good_as_it_is(self):
        done = upmoe("eval", self.model, "--data", self.tokens, "--seq-len", 16, "--sequences", 4)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertGreater(json.loads(done.stdout)["loss"], 0)

    def test_truncated(self):
        self.write_weights(safetensors_bytes(self.tensors)[:-100])
        self.eval_refused("model.safetensors")

    def test_huge_header(self):
        self.write_weights(struct.pack("<Q", 1 << 62) + b"{}")
        self.eval_refused("model.safetensors")

    def test_overlapping_tensors(self):
        data = bytearray(safetensors_bytes(self.tensors))
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:8 + length])
        second = list(header)[1]
        header[second]["data_offsets"][0] -= 4
        text = json.dumps(header).encode().ljust(length)
        data[8:8 + length] = text
        self.write_weights(bytes(data))
        self.eval_refused("model.safetensors")

    def test_missing_extra_and_misshapen_tensors(self):
        lost = "model.layers.1.mlp.experts.12.up_proj.weight"
        self.tensors.pop(lost)
        dtype, shape, data = self.tensors["model.norm.weight"]
        self.tensors["model.norm.weight"] = (dtype, [1, *shape], data)
        self.tensors["model.extra.weight"] = (dtype, shape, data)
        self.write_weights(safetensors_bytes(self.tensors))
        self.eval_refused(lost, "model.norm.weight", "model.extra.weight")

    def test_index_outside_the_folder(self):
        (self.model / "model.safetensors").rename(self.folder / "stolen.safetensors")
        index = {"metadata": {}, "weight_map": {name: "../stolen.safetensors" for name in self.tensors}}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        self.eval_refused("../stolen.safetensors")

    def test_wrong_config(self):
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        for key, value in (("num_experts_per_tok", 14), ("num_attention_heads", 0), ("model_type", "gpt2"),
                           ("hidden_size", "wide"), ("vocab_size", -1)):
            (self.model / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
            self.eval_refused("config.json", key)

    def test_tokens_beyond_the_vocabulary(self):
        self.tokens = self.write_tokens("wild.h5", [101] * 200)
        self.eval_refused("wild.h5", "101")

    # A warning: the same tokenizer written anew has another digest, too.
    def test_another_tokenizer_than_the_models_is_told(self):
        (self.model / "tokenizer.json").write_text("{}", encoding="utf-8")
        with h5py.File(self.tokens, "r+") as file:
            file.attrs["tokenizer_sha256"] = "ab" * 32
        for arguments in (("eval", self.model, "--data", self.tokens, "--seq-len", 16, "--sequences", 4),
                          ("train", self.write_run())):
            done = upmoe(*arguments)
            self.assertEqual(done.returncode, 0, done.stderr)
            for words in (self.tokens, "was made with another tokenizer", self.model / "tokenizer.json"):
                self.assertIn(str(words), done.stderr)

    def test_not_a_token_file(self):
        self.tokens.write_bytes(b"no HDF5 at all")
        self.eval_refused("tokens.h5")

    def test_one_message_from_two_ranks(self):
        self.write_weights(safetensors_bytes(self.tensors)[:-100])
        self.refused(3, ["model.safetensors"], "train", self.write_run(), ranks=2)


class IndexedDataSets(CliTest):
    """PREFIX.bin and PREFIX.idx of Megatron-LM where a token file is asked for."""

    def setUp(self):
        super().setUp()
        self.set = write_megatron_set(self.folder / "set", [[[int(t) for t in np.arange(2000) % 101]]], "int32")

    def test_every_command_reads_them_as_hdf5(self):
        told = []
        for tokens in (self.tokens, self.set, self.set.with_suffix(".idx")):
            self.tokens = tokens
            done = upmoe("eval", self.model, "--data", tokens, "--seq-len", 16, "--sequences", 8)
            self.assertEqual(done.returncode, 0, done.stderr)
            trained = upmoe("train", self.write_run(run=f"{{dir: {self.folder / ('run' + tokens.suffix)}, seed: 1}}"))
            self.assertEqual(trained.returncode, 0, trained.stderr)
            lines = (self.folder / f"run{tokens.suffix}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            told.append((json.loads(done.stdout)["loss"], [json.loads(line)["loss"] for line in lines]))
        self.assertEqual(told, told[:1] * 3)

    def test_inspect_says_what_it_is(self):
        done = upmoe("inspect", self.set.with_suffix(".idx"), "--verify", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        told = json.loads(done.stdout)
        self.assertEqual((told["tokens"], told["documents"], told["vocab_size"], told["checksums"]),
                         (2000, 1, None, False))
        self.assertIn("Megatron-LM", told["format"])

    def test_what_is_wrong_is_told(self):
        index = self.set.with_suffix(".idx")
        whole = index.read_bytes()
        index.write_bytes(whole[:-3])
        self.refused(3, ["set.idx", "document boundaries"], "inspect", self.set)
        index.unlink()
        self.refused(3, ["set.idx is missing"], "eval", self.model, "--data", self.set, "--seq-len", 16)
        index.write_bytes(whole)
        write_megatron_set(self.folder / "set", [[[5] * 16 + [101]]], "int32")
        self.refused(3, ["token 16 is 101"], "eval", self.model, "--data", self.set, "--seq-len", 16)


class Srun(unittest.TestCase):
    # As Slurm's default plugin of MPI starts a step: each rank for itself.
    def test_without_pmix(self):
        for rank in range(2):
            step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank)}
            done = subprocess.run([BINARY, "train", "run.yaml"], capture_output=True, text=True, check=False,
                                  timeout=60, env=os.environ | step)
            self.assertEqual(done.returncode, 2, done.stderr)
            for words in ("by 'none', and Open MPI wants PMIx", "start it with srun --mpi=pmix"):
                self.assertEqual(words in done.stderr, rank == 0, done.stderr)


class Report(CliTest):
    def test_exit_status_of_the_pictures(self):
        self.assertEqual(upmoe("report", self.folder / "nowhere").returncode, 3)
        self.assertEqual(upmoe("report", self.folder, "--against", "moon").returncode, 2)
        self.assertIn("randomness", upmoe("study", "--list").stdout)
        self.assertEqual(upmoe("study").returncode, 2)
        self.assertEqual(upmoe("study", "no-such-study").returncode, 2)
        self.refused(2, ["start it alone"], "study", "randomness", ranks=2)


if __name__ == "__main__":
    unittest.main()
