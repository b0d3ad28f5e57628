"""upmoe doctor from outside: one report for all ranks, what it warns of and refuses, in words and by its status; and
what it measures is a machine's file. Needs UPMOE_BINARY.
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

for shared in ("support", "bench"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / shared))
from bench_record import write_tokens  # noqa: E402
from tiny_run import mount_tmpfs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = os.environ["UPMOE_BINARY"]


def start(*words, before="", **environment):
    """By a shell, behind the commands `before`."""
    line = f"{before} exec {shlex.join(map(str, words))}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=250,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def doctor(*arguments, **how):
    return start(BINARY, "doctor", *arguments, **how)


class Doctor(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def change_a_byte(self, file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    def findings(self, folder=None, status=0, run=None, **how):
        done = doctor("--json", *([run] if run else ["--dir", folder or self.folder]), **how)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(report["can_start"], status == 0)
        return {f["words"]: f for f in report["findings"]}

    def run_file(self):
        run, model, tokens = (self.folder / name for name in ("run.yaml", "m", "t.h5"))
        model.mkdir(exist_ok=True)
        config = (ROOT / "tests" / "golden" / "dense" / "config.json").read_text(encoding="utf-8")
        (model / "config.json").write_text(config, encoding="utf-8")
        write_tokens(tokens, json.loads(config)["vocab_size"], 100)
        run.write_text(f"run: {{dir: {self.folder / 'out'}, seed: 1}}\nmodel: {{path: {model}, init: random}}\n"
                       f"data: {{train: [{{path: {tokens}, weight: 1.0}}], seq_len: 16}}\n"
                       "train: {steps: 1, global_batch: 1, micro_batch: 1}\ndevice: cpu\n")
        return run

    def one(self, found, *words):
        fitting = [f for text, f in found.items() if all(word in text for word in words)]
        self.assertEqual(len(fitting), 1, found)
        return fitting[0]

    def tmpfs(self, size):
        return mount_tmpfs(self, self.folder / "disk", size)


class Alone(Doctor):
    def test_report(self):
        done = doctor("--dir", self.folder / "runs" / "new")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        for word in ("rank", "threads", "GB of memory left", "open files", "locked memory", "/dev/shm", "MPI: ",
                     "oneDNN", "HDF5: ", "NCCL: ", "written at", "fsync", "rename", str(self.folder / "runs")):
            self.assertIn(word, done.stdout)
        self.assertEqual(list(self.folder.iterdir()), [], "nothing is left behind")

    def test_what_computes_bf16_is_told(self):
        pairs = r"in pairs (\(AVX512-BF16\)( for experts)?|for dense layers)"
        kinds = rf"in matrix registers \(AMX\)|{pairs}|widened to fp32"
        self.assertRegex(doctor("--dir", self.folder).stdout, rf"oneDNN [0-9.]+, bf16 ({kinds})\n")
        hidden = doctor("--dir", self.folder, ONEDNN_MAX_CPU_ISA="AVX512_CORE_BF16").stdout
        self.assertIn(", bf16 ", hidden)
        self.assertNotIn("AMX", hidden)
        widened = doctor("--dir", self.folder, ONEDNN_MAX_CPU_ISA="AVX2").stdout
        self.assertRegex(widened, r", bf16 (in pairs \(AVX512-BF16\) for experts|widened to fp32)\n")

    def test_json(self):
        done = doctor("--json", "--dir", self.folder)
        report = json.loads(done.stdout)
        self.assertEqual([r["rank"] for r in report["ranks"]], [0])
        self.assertEqual(report["ranks"][0]["threads"], 1)
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        self.assertEqual(report["ranks"][0]["cores"], status.split("Cpus_allowed_list:")[1].split()[0])
        self.assertGreater(report["hosts"][0]["memory"], 1e8)
        self.assertIn("HDF5", report["libraries"])

    def test_threads_beyond_the_cores(self):
        found = self.findings(OMP_NUM_THREADS="4095")
        self.assertEqual(self.one(found, "4095 threads", "OMP_NUM_THREADS")["severity"], "warning")

    def test_open_files(self):
        found = self.findings(before="ulimit -S -n 100;")
        self.assertEqual(self.one(found, "100 files open", "ulimit -n")["severity"], "warning")
        found = self.findings(before="ulimit -S -n 40;", status=3)
        self.assertEqual(self.one(found, "40 files open", "ulimit -n")["code"], 3)
        found = self.findings(before="ulimit -n 40;", status=3)
        self.one(found, "hard limit is 40", "limits.conf")

    def test_a_full_disk(self):
        disk = self.tmpfs("4m")
        found = self.findings(disk, status=3)
        self.one(found, "No space left", "remove something")
        self.one(found, "is in memory (tmpfs)")
        self.assertEqual(list(disk.iterdir()), [])

    def test_a_folder_that_cannot_be_written_to(self):
        done = doctor("--dir", "/proc/here/runs")
        self.assertEqual(done.returncode, 3, done.stdout)
        self.assertIn("failure: /proc/.upmoe-doctor", done.stdout)
        self.assertIn("A run would not start here.", done.stdout)

    def test_a_gpu_that_is_not_there(self):
        done = doctor("--device", "cuda", "--dir", self.folder, CUDA_VISIBLE_DEVICES="")
        self.assertEqual(done.returncode, 71, done.stdout)
        self.assertIn("failure: device: cuda was asked for", done.stdout)

    def test_of_a_run(self):
        run = self.run_file()
        done = doctor(run)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn(str(self.folder / "out"), done.stdout)
        self.assertFalse((self.folder / "out").exists())
        (self.folder / "config.json").write_text("{}")
        done = doctor(run, f"run.dir={self.folder}")
        self.assertEqual(done.returncode, 2, done.stdout)
        self.assertIn("is no place for a run", done.stdout)
        self.assertEqual(doctor(run, "train.stepz=1").returncode, 2)
        self.assertEqual(doctor(run, "--device", "cpu").returncode, 2)
        self.assertEqual(doctor("--measure", "--json").returncode, 2)

    # Each in the words, and with the status, that the run itself ends with.
    def test_what_a_run_would_read(self):
        run = self.run_file()
        for status, override in ((3, f"model.path={self.folder / 'none'}"),
                                 (3, "model.init=weights"),
                                 (3, f"data.train={self.folder / 'none.h5'}"),
                                 (3, f"data.valid={self.folder / 'none.h5'}"),
                                 (3, f"train.teacher.model={self.folder / 'none'}"),
                                 (2, "parallel.tp=2"),
                                 (2, "freeze=['nothing*']"),
                                 (2, "freeze=['*']"),
                                 (2, "optimizer.groups=[{match: ['nothing*'], lr: 0.1}]"),
                                 (2, "data.seq_len=1000000")):
            with self.subTest(override=override):
                examined = doctor(run, override)
                self.assertEqual(examined.returncode, status, examined.stdout + examined.stderr)
                trained = start(BINARY, "train", run, override)
                self.assertEqual(trained.returncode, status, trained.stderr)
                words = trained.stderr.split("upmoe: error: ", 1)[1].strip().splitlines()[0]
                self.assertIn("failure: " + words, examined.stdout)
                self.assertIn("A run would not start here.", examined.stdout)
        self.assertEqual(doctor(run).returncode, 0)

    # Its model lies in its checkpoints then.
    def test_what_a_run_that_goes_on_would_read(self):
        run = self.run_file()
        self.assertEqual(start(BINARY, "train", run).returncode, 0)
        adapted = doctor(run, "lora.rank=2", "lora.targets=[q_proj]")
        trained = start(BINARY, "train", run, "lora.rank=2", "lora.targets=[q_proj]")
        self.assertNotEqual(trained.returncode, 0)
        self.assertEqual(adapted.returncode, trained.returncode, adapted.stdout + adapted.stderr)
        words = trained.stderr.split("upmoe: error: ", 1)[1].strip().splitlines()[0]
        self.assertIn("failure: " + words, adapted.stdout)
        (self.folder / "m" / "config.json").unlink()
        done = doctor(run)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    # A damaged checkpoint is passed over by both; what is compared with the one that is left is refused by both.
    def test_the_checkpoint_is_the_one_that_the_run_goes_on_from(self):
        run = self.run_file()
        started = start(BINARY, "train", run, "train.steps=2", "checkpoint.every=1")
        self.assertEqual(started.returncode, 0, started.stderr)
        checkpoints = self.folder / "out" / "checkpoints"
        older, newest = sorted(checkpoints.iterdir())
        shard = newest / "shard_00000.h5"
        whole = shard.read_bytes()
        self.change_a_byte(shard)
        found = self.findings(run=run)
        warning = self.one(found, f"checkpoint {newest} is not usable and is passed over")
        self.assertEqual(warning["severity"], "warning")
        self.assertEqual(sorted(checkpoints.iterdir()), [older, newest], "nothing is set aside")
        overrides = ("data.seed=5", "train.global_batch=2", "model.init=weights")
        examined = [doctor(run, override) for override in overrides]
        for override, saw in zip(overrides, examined, strict=True):
            with self.subTest(override=override):
                trained = start(BINARY, "train", run, override)
                self.assertIn(trained.returncode, (2, 3), trained.stderr)
                self.assertEqual(saw.returncode, trained.returncode, saw.stdout + saw.stderr)
                words = trained.stderr.split("upmoe: error: ", 1)[1].strip()
                self.assertIn("failure: " + words, saw.stdout)
                if override == overrides[0]:
                    self.assertIn(str(older), words)
                    self.assertIn(warning["words"].rsplit(";", 1)[0], trained.stderr)
        for checkpoint in (older, newest):  # the run has set the second one aside
            self.assertEqual(checkpoint.exists(), checkpoint == older)
        self.assertEqual(doctor(run, "train.global_batch=1").returncode, 0)
        self.change_a_byte(older / "shard_00000.h5")
        saw, trained = doctor(run), start(BINARY, "train", run)
        self.assertEqual((saw.returncode, trained.returncode), (3, 3), saw.stdout + trained.stderr)
        self.assertIn("none can be used", trained.stderr)
        self.assertIn("failure: " + trained.stderr.split("upmoe: error: ", 1)[1].strip(), saw.stdout)
        # What a person mends is used again.
        (checkpoints / f"{newest.name}.aside").rename(newest)
        shard.write_bytes(whole)
        self.assertEqual(doctor(run).returncode, 0)

    def test_a_folder_that_another_job_trains_in(self):
        run = self.run_file()
        self.assertEqual(start(BINARY, "train", run).returncode, 0)
        lock = self.folder / "out" / "lock"
        with open(lock, "r+", encoding="utf-8") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            saw, trained = doctor(run), start(BINARY, "train", run)
            self.assertEqual((saw.returncode, trained.returncode), (2, 2), saw.stdout + trained.stderr)
            words = trained.stderr.split("upmoe: error: ", 1)[1].strip()
            self.assertIn("another job is training in this directory", words)
            self.assertIn("failure: " + words, saw.stdout)
        self.assertEqual(doctor(run).returncode, 0)
        lock.unlink()
        self.assertEqual(doctor(run).returncode, 0)
        self.assertFalse(lock.exists(), "nothing is left behind")

    def test_a_run_warns_in_the_same_words(self):
        run = self.run_file()
        words = next(text for text in self.findings(before="ulimit -S -n 100;") if "files open" in text)
        said = start(BINARY, "train", run, before="ulimit -S -n 100;").stderr
        self.assertEqual(said.count(words), 1, said)


class Ranks(Doctor):
    def under_mpirun(self, *arguments, **how):
        return start(ROOT / "launch" / "run_local.sh", 2, BINARY, "doctor", *arguments, **how)

    def test_two_ranks_print_once(self):
        done = self.under_mpirun("--dir", self.folder)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(done.stdout.count("| rank"), 1, done.stdout)
        self.assertEqual(done.stdout.count("HDF5: "), 1)
        self.assertEqual(done.stdout.count("GB of memory left"), 1, "one host")
        done = self.under_mpirun("--json", "--dir", self.folder)
        self.assertEqual([r["rank"] for r in json.loads(done.stdout)["ranks"]], [0, 1])
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_two_ranks_fail_once(self):
        done = self.under_mpirun("--dir", "/proc/here")
        self.assertEqual(done.returncode, 3, done.stdout + done.stderr)
        self.assertEqual(done.stdout.count("failure: "), 1, done.stdout)
        self.assertIn("[rank 0]", done.stdout)

    def test_cores_that_ranks_share_are_one_warning(self):
        done = self.under_mpirun("--dir", self.folder, OMP_NUM_THREADS="4095")
        self.assertEqual(done.stdout.count("4095 threads"), 1, done.stdout)
        self.assertIn("2 ranks x 4095 threads", done.stdout)

    def test_other_programs_are_refused_in_the_same_words(self):
        other, either = self.folder / "other", self.folder / "either.sh"
        other.write_bytes(Path(BINARY).read_bytes() + b"another build")
        either.write_text(f'#!/bin/sh\n[ "$OMPI_COMM_WORLD_RANK" = 1 ] && exec {shlex.quote(str(other))} "$@"\n'
                          f'exec {shlex.quote(BINARY)} "$@"\n', encoding="utf-8")
        for program in (other, either):
            program.chmod(0o755)
        said = []
        for arguments in (("doctor", "--dir", self.folder), ("train", self.run_file())):
            done = start(ROOT / "launch" / "run_local.sh", 2, either, *arguments)
            self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
            said += [line for line in (done.stdout + done.stderr).splitlines() if "programs" in line]
        self.assertEqual(len(said), 2, said)
        self.assertEqual(*(line[line.index("programs"):].removesuffix(" [rank 0]") for line in said))

    def test_other_files_under_one_name_are_refused_in_the_same_words(self):
        """Each rank stands in a folder of its own, as on hosts that do not share what a run reads."""
        run = self.run_file()
        run.write_text(run.read_text().replace(f"path: {self.folder}/", "path: ").replace("batch: 1,", "batch: 2,"))
        apart = self.folder / "apart.sh"
        apart.write_text(f'#!/bin/sh\ncd {shlex.quote(str(self.folder))}/"$OMPI_COMM_WORLD_RANK" && exec '
                         f'{shlex.quote(BINARY)} "$@"\n', encoding="utf-8")
        apart.chmod(0o755)
        for rank in ("0", "1"):
            shutil.copytree(self.folder / "m", self.folder / rank / "m")
            shutil.copy(self.folder / "t.h5", self.folder / rank)

        def said(word):
            lines = []
            for command in ("doctor", "train"):
                done = start(ROOT / "launch" / "run_local.sh", 2, apart, command, run)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                lines += [line for line in (done.stdout + done.stderr).splitlines() if word in line]
            self.assertEqual(len(lines), 2, done.stdout + done.stderr)
            self.assertEqual(*(line[line.index(word):].removesuffix(" [rank 0]") for line in lines))
            return lines[0]
        vocabulary = json.loads((self.folder / "m" / "config.json").read_text())["vocab_size"]
        write_tokens(self.folder / "1" / "t.h5", vocabulary, 90)
        self.assertRegex(said("training data"), "tokens 100,.*tokens 90,")
        config = self.folder / "1" / "m" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-4}))
        self.assertIn("rms_norm_eps", said("copies of model.path"))

    # The disk is that of the folder on every rank: of ranks that do not speak for their host too, wherever they stand.
    def test_measured(self):
        done = self.under_mpirun("--measure", "--dir", self.folder, before="cd /proc;")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("| rank", done.stderr)
        self.assertIn("all_to_all", done.stderr)
        machine = self.folder / "m.yaml"
        machine.write_text(done.stdout)
        for key in ("name: ", "shared_by_ranks: true", "rates:\n", "  gemm_fp32: [", "inside_node:\n", "disk:\n"):
            self.assertIn(key, done.stdout)
        cost = start(BINARY, "cost", "qwen1.5-7b", "--tokens", "1T", "--machine", machine, "--json")
        self.assertEqual(cost.returncode, 0, cost.stderr)
        self.assertGreater(json.loads(cost.stdout)[0]["device_hours"], 0)


if __name__ == "__main__":
    unittest.main()
