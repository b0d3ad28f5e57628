#!/usr/bin/env python3
"""Restarts: the rules as functions, and run_hosts.sh around them with a false mpirun."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# Stands for mpirun and srun: the n-th start runs the n-th of the scripts that the test wrote. `save N` makes the
# checkpoint of step N, `on_usr2 COMMAND` waits for the signal by which the ranks are asked to save and stop.
LAUNCHER = """#!/usr/bin/env bash
state={state}
n=$(($(cat "$state/count" 2>/dev/null || echo 0) + 1))
echo $n >"$state/count"
echo "$OMP_NUM_THREADS | $*" >>"$state/calls"
save() {{ mkdir -p "$state/run/checkpoints/$(printf 'step_%08d' "$1")"; }}
on_usr2() {{ trap "$1" USR2; : >"$state/ready"; for i in {{1..300}}; do sleep 0.05; done; exit 99; }}
[[ -e $state/start_$n ]] || exit 98
source "$state/start_$n"
"""
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d "


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(prefix="upmoe-restart-"))
        self.addCleanup(shutil.rmtree, self.dir, True)
        (self.dir / "bin").mkdir()
        for name in ("mpirun", "srun"):
            self.program(name, LAUNCHER.format(state=self.dir))
        self.program("upmoe", "#!/bin/sh\nexit 1\n")  # mpirun and srun do not start it
        self.program("scontrol", f'#!/bin/sh\n[ "$*" != "show job 42" ] || exec cat {self.dir}/job\n'
                     f'echo "$*" >>{self.dir}/scontrol\n')
        (self.dir / "hosts").write_text("# two hosts\nnode1 slots=2\nnode2 slots=2  # the second\n")
        (self.dir / "run.yaml").write_text(f"run: {{dir: {self.dir}/run, seed: 1}}\n")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMP_", "UPMOE"))}
        self.environment["PATH"] = f"{self.dir}/bin:{os.environ['PATH']}"
        self.training = ["upmoe", "train", str(self.dir / "run.yaml")]

    def program(self, name, text):
        path = self.dir / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def starts(self, *scripts):
        for n, script in enumerate(scripts, 1):
            (self.dir / f"start_{n}").write_text(script + "\n")

    def save(self, step, suffix=""):
        (self.dir / f"run/checkpoints/step_{step:08}{suffix}").mkdir(parents=True)

    def calls(self):
        path = self.dir / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, command):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=self.environment, cwd=self.dir)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def finish(self, process, status):
        _, errors = process.communicate(timeout=60)
        self.assertEqual(process.returncode, status, errors)
        return errors

    def wait_until_ready(self, process):
        end = time.monotonic() + 20
        while not (self.dir / "ready").exists():
            self.assertIsNone(process.poll())
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)


class Rules(Case):
    def ask(self, *words):
        run = subprocess.run(["bash", "-euc", 'source "$0"; "$@"', str(LAUNCH / "restart_rules.sh"), *map(str, words)],
                             capture_output=True, text=True, cwd=self.dir, env=self.environment)
        self.assertEqual(run.stderr, "")
        return run.returncode, run.stdout.strip()

    def test_newest_step_counts_complete_checkpoints_only(self):
        run = self.dir / "run"
        self.assertEqual(self.ask("newest_step", run), (0, "-1"))
        for step in (8, 9, 100):
            self.save(step)
        self.save(200, ".tmp")
        (run / "checkpoints/step_00000300").write_text("a file")
        for name in ("latest", "step_400", "step_000000500", "step_00000600.aside"):
            (run / "checkpoints" / name).mkdir()
        self.assertEqual(self.ask("newest_step", run), (0, "100"))

    def test_run_directory_of_a_command(self):
        self.assertEqual(self.ask("run_dir_of", *self.training), (0, f"{self.dir}/run"))
        self.assertEqual(self.ask("run_dir_of", *self.training, "run.dir=a", "run.dir=b c"), (0, "b c"))
        self.assertEqual(self.ask("run_dir_of", "upmoe", "train", "missing.yaml"), (1, ""))
        self.assertEqual(self.ask("run_dir_of", "upmoe", "train"), (1, ""))

    def test_run_directory_in_yaml(self):
        path = self.dir / "some.yaml"
        for text, expected in {
            "run:        {dir: runs/tiny, seed: 1}": "runs/tiny",
            "run: {seed: 1, dir: runs/tiny}  # the place": "runs/tiny",
            "run: {dir: 'a, b', seed: 1}": "a, b",
            "model: {dir: no}\nrun:\n  seed: 1\n  dir: runs/block  # the place\nlog: {dir: no}": "runs/block",
            'run:\n  dir: "runs/a b"': "runs/a b",
            "run: {seed: 1}\nmodel:\n  dir: no": "",
            "# run: {dir: no}": "",
        }.items():
            path.write_text(text + "\n")
            self.assertEqual(self.ask("dir_in_yaml", path), (0, expected), text)

    def test_run_directory_with_variables(self):
        self.environment |= {"HOME": "/home/me", "PLACE": "/scratch/a b", "EMPTY": ""}
        for text, expected in {
            "~": "/home/me", "~/r": "/home/me/r", "r~": "r~", "$PLACE/r": "/scratch/a b/r",
            "${PLACE}_1/${PLACE}": "/scratch/a b_1//scratch/a b", "a$$b": "a$b", "$$PLACE": "$PLACE",
            "~you/r": None, "$EMPTY/r": None, "$NO_SUCH_PLACE": None, "a$": None, "${PLACE": None, "$5": None,
        }.items():
            (self.dir / "run.yaml").write_text(f"run: {{dir: '{text}', seed: 1}}\n")
            told = (1, "") if expected is None else (0, expected)
            self.assertEqual(self.ask("run_dir_of", *self.training), told, text)
            self.assertEqual(self.ask("run_dir_of", *self.training, f"run.dir={text}"), told, text)

    def test_restarts(self):
        for status in (0, 2, 3, 4, 71, 75, 126, 127):
            self.assertEqual(self.ask("should_restart", status, 10, 20, 1)[0], 1, status)
        for status in (70, 72, 134, 137, 139, 143, 205):
            self.assertEqual(self.ask("should_restart", status, 10, 20, 3), (0, "step 20 is saved"), status)
            self.assertEqual(self.ask("should_restart", status, -1, -1, 1)[0], 0, status)
            self.assertEqual(self.ask("should_restart", status, 10, 10, 2)[0], 1, status)
        self.assertEqual(self.ask("should_restart", 1, 10, 20, 2)[0], 0)
        self.assertEqual(self.ask("should_restart", 1, -1, -1, 1)[0], 1)

    def test_requeues(self):
        for status in (75, 70, 137, 1):
            self.assertEqual(self.ask("should_requeue", status, 10, 20)[0], 0, status)
            self.assertEqual(self.ask("should_requeue", status, 10, 10)[0], 1, status)
        for status in (0, 2, 3, 4, 71, 127):
            self.assertEqual(self.ask("should_requeue", status, 10, 20)[0], 1, status)

    def test_every_status_has_words(self):
        for status in (0, 1, 2, 3, 4, 70, 71, 72, 75, 127, 205):
            self.assertNotIn("signal", self.ask("describe_status", status)[1])
        for number in (1, 6, 11, 15, 31):
            self.assertEqual(self.ask("describe_status", 128 + number)[1], f"killed by signal {number}")
        self.assertEqual(self.ask("describe_status", 137)[1], "killed by signal 9: out of memory?")


class Hosts(Case):
    def hosts(self, *options, command=None):
        options = ["--hostfile", str(self.dir / "hosts"), "--delay", "0", *options]
        return self.start([str(LAUNCH / "run_hosts.sh"), *options, *(self.training if command is None else command)])

    def refused(self, *command):
        before = self.calls()
        process = self.start([str(LAUNCH / "run_hosts.sh"), *command])
        errors = self.finish(process, 2)
        self.assertIn("run_hosts: error:", errors)
        self.assertEqual(self.calls(), before)
        return errors

    def test_wrong_command_lines(self):
        file = ["--hostfile", str(self.dir / "hosts")]
        self.refused(*self.training)
        self.refused(*file)
        self.refused(*file, "--restarts")
        self.assertIn("'two'", self.refused(*file, "--ranks-per-host", "two", *self.training))
        self.assertIn("--ranks-per-host '0'", self.refused(*file, "--ranks-per-host", "0", *self.training))
        self.assertIn("--fast", self.refused(*file, "--fast", "1", *self.training))
        self.assertIn("--run-dir", self.refused(*file, "upmoe", "train", "missing.yaml"))
        self.assertIn("twice", self.refused(*file, "--deadline", "9", *self.training, "--deadline", "8"))
        self.assertIn("upmoe train", self.refused(*file, "--deadline", "9", "upmoe", "doctor"))
        self.assertIn("no such program", self.refused(*file, "no_such_program", "train", "run.yaml"))
        self.assertIn("no_such_file", self.refused("--hostfile", "no_such_file", *self.training))

    def test_host_files(self):
        (self.dir / "hosts").write_text("# nothing\n\n")
        self.assertIn("no host", self.refused("--hostfile", "hosts", *self.training))
        (self.dir / "hosts").write_text("node1 slots=2\nnode2\n")
        self.assertIn("--ranks-per-host", self.refused("--hostfile", "hosts", *self.training))
        (self.dir / "hosts").write_text("node1\nnode2\nnode1\n")
        self.assertIn("--ranks-per-host", self.refused("--hostfile", "hosts", *self.training))
        for text, words in (("node1 slots=1\n" * 2, "node1 stands there twice"), ("node1:8\n", "'node1 slots=8'")):
            (self.dir / "hosts").write_text(text)
            self.assertIn(words, self.refused("--hostfile", "hosts", *self.training))

    def test_a_host_with_several_lines_has_as_many_slots(self):
        (self.dir / "hosts").write_text("node1\nnode2\nnode1\nnode2\nfe80::1\nfe80::1\n")
        self.starts("exit 0")
        self.assertIn("3 hosts with 2 ranks", self.finish(self.hosts("--cores-per-host", "8"), 0))
        self.assertIn("-np 6 --oversubscribe --map-by ppr:2:node:PE=4", self.calls()[0])

    def test_what_mpirun_is_asked_for(self):
        self.starts("exit 0")
        self.finish(self.hosts("--cores-per-host", "8", "--deadline", "60", "--interface", "10.0.0.0/24", "--rsh",
                               "/bin/agent"), 0)
        call = self.calls()[0]
        self.assertTrue(call.startswith("4 | "), call)
        for part in ("-np 4 ", "--map-by ppr:2:node:PE=4 --bind-to core", "-x OMP_NUM_THREADS",
                     "--mca btl_tcp_if_include 10.0.0.0/24", "--mca oob_tcp_if_include 10.0.0.0/24",
                     "--mca plm_rsh_agent /bin/agent", f"upmoe train --deadline 60 {self.dir}/run.yaml"):
            self.assertIn(part, call)

    def test_cores_of_a_login_node_are_not_those_of_the_hosts(self):
        self.starts("exit 0", "exit 0")
        self.finish(self.hosts(), 0)
        (self.dir / "hosts").write_text("localhost slots=1\n")
        self.finish(self.hosts(), 0)
        elsewhere, here = self.calls()
        self.assertTrue(elsewhere.startswith(" | "), elsewhere)
        self.assertIn("--map-by ppr:2:node --bind-to none", elsewhere)
        self.assertRegex(here, r"^[1-9]\d* \| .*--map-by ppr:1:node:PE=\d+ --bind-to core")

    def test_what_all_hosts_get_of_the_environment(self):
        self.environment |= {"NCCL_DEBUG": "INFO", "PLACE": "/p", "MINE": "1", "OTHER": "2", "IN_FILE": "3"}
        (self.dir / "run.yaml").write_text(f"run: {{dir: {self.dir}/run}}\nmodel: {{path: '${{IN_FILE}}/m'}}\n")
        self.starts("exit 0")
        command = [*self.training, "data.train=$PLACE/t.h5", "x=$UNSET"]
        self.finish(self.hosts("--env", "MINE", "--cores-per-host", "8", command=command), 0)
        words = self.calls()[0].split()
        given = [name for option, name in zip(words, words[1:], strict=False) if option == "-x"]
        self.assertEqual(sorted(given), ["IN_FILE", "MINE", "NCCL_DEBUG", "OMP_NUM_THREADS", "PLACE"])
        self.assertEqual(words[words.index("-wdir") + 1], os.path.realpath(self.dir))
        self.assertIn("--env 'UNSET'", self.refused("--hostfile", "hosts", "--env", "UNSET", *self.training))

    def test_a_program_that_is_not_on_all_hosts(self):
        # Open MPI's words and status, which otherwise would be that of signal 4 and worth another try.
        self.starts("echo 'mpirun was unable to launch the specified application as it could not access' >&2; exit 132")
        errors = self.finish(self.hosts(), 127)
        self.assertIn("cannot be started, on one host at least", errors)
        self.assertEqual(len(self.calls()), 1)

    def test_more_ranks_than_cores_are_not_bound(self):
        self.starts("exit 0")
        self.finish(self.hosts("--cores-per-host", "8", "--ranks-per-host", "9"), 0)
        self.assertIn("1 | ", self.calls()[0])
        self.assertIn("-np 18 --oversubscribe --map-by ppr:9:node --bind-to none", self.calls()[0])

    def test_faults_with_progress_are_started_again(self):
        self.starts("save 10; exit 137", "save 20; exit 1", "save 30; exit 205", "exit 0")
        errors = self.finish(self.hosts(), 0)
        self.assertEqual(len(self.calls()), 4)
        self.assertIn("status 137 (killed by signal 9: out of memory?); step 10 is saved: restart 1 of 3", errors)
        for line in errors.splitlines():  # days later somebody asks when
            self.assertRegex(line, rf"^{STAMP}run_hosts: ")

    def test_no_progress_ends_the_restarts(self):
        self.starts("save 10; exit 70", "exit 70")
        errors = self.finish(self.hosts(), 70)
        self.assertEqual(len(self.calls()), 2)
        self.assertIn("no newer checkpoint", errors)
        self.assertIn("take it out of the file", errors)

    def test_restarts_are_used_up(self):
        self.starts("save 10; exit 72", "save 20; exit 72", "save 30; exit 72")
        self.assertIn("used up", self.finish(self.hosts("--restarts", "1"), 72))
        self.assertEqual(len(self.calls()), 2)

    def test_statuses_that_are_final(self):
        for status in (2, 3, 4, 71, 75, 1):
            with self.subTest(status):
                for name in ("count", "calls"):
                    (self.dir / name).unlink(missing_ok=True)
                self.starts(f"exit {status}", "exit 0")
                self.finish(self.hosts(), status)
                self.assertEqual(len(self.calls()), 1)

    def test_another_command_is_started_once(self):
        self.starts("exit 137", "exit 0")
        self.finish(self.hosts(command=["upmoe", "upcycle"]), 137)
        self.assertEqual(len(self.calls()), 1)

    def test_the_host_file_is_read_again(self):
        self.starts(f"save 10; echo 'node1 slots=2' >{self.dir}/hosts; exit 70", "exit 0")
        self.finish(self.hosts(), 0)
        self.assertIn("-np 4 ", self.calls()[0])
        self.assertIn("-np 2 ", self.calls()[1])

    def test_a_launcher_that_outlives_its_ranks_is_killed(self):
        stuck = "trap '' TERM; save 10; echo 'upmoe: error: rank 1: no progress for 6.0 s' >&2; sleep 60"
        self.starts(stuck, "exit 0")
        began = time.monotonic()
        errors = self.finish(self.hosts("--grace", "1"), 0)
        self.assertLess(time.monotonic() - began, 20)
        self.assertIn("upmoe: error: rank 1", errors)
        self.assertIn("status 72", errors)

    def test_signals(self):
        for sent, words in ((signal.SIGTERM, "asked to stop"), (signal.SIGINT, "asked to stop"),
                            (signal.SIGUSR2, "asked to stop")):
            with self.subTest(sent):
                for name in ("count", "calls", "ready"):
                    (self.dir / name).unlink(missing_ok=True)
                self.starts("on_usr2 'save 10; exit 75'", "exit 0")
                process = self.hosts()
                self.wait_until_ready(process)
                process.send_signal(sent)
                self.assertIn(words, self.finish(process, 75))
                self.assertEqual(len(self.calls()), 1)

    def test_a_second_signal_ends_at_once(self):
        self.starts("on_usr2 :")
        process = self.hosts()
        self.wait_until_ready(process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGTERM)
        self.finish(process, 143)


if __name__ == "__main__":
    unittest.main()
