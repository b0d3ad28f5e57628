"""launch/setup.sh with pretended tools: one list for what it installs and what the build asks for, missing packages
told before anything is built, no stale configuration, and a set-up killed at any step that ends well the next time."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TOOL = ROOT / "tests" / "support" / "pretended_tools" / "tool.py"
PRETENDED = ["apt-get", "apt-cache", "dpkg", "dpkg-query", "cmake", "ninja", "python3", "c++"]
REAL = ["bash", "sh", "env", "awk", "sed", "grep", "cat", "head", "tail", "mkdir", "mv", "rm", "cmp", "cksum", "tr",
        "dirname", "flock", "touch", "cut"]


def package_lines():
    lines = (ROOT / "launch" / "packages.txt").read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


def packages_for(use):
    return [fields[0] for fields in package_lines() if fields[2] == use]


class Machine(unittest.TestCase):
    """A folder of the project, tools that pretend, and nothing else on the path."""

    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)
        (self.project / "launch").mkdir(parents=True)
        for name in ["setup.sh", "packages.sh", "packages.txt", "requirements.txt", "requirements-cuda.txt"]:
            shutil.copy(ROOT / "launch" / name, self.project / "launch")
        shutil.copy(ROOT / "CMakePresets.json", self.project)
        self.tools = self.folder / "tools"
        self.tools.mkdir()
        for name in PRETENDED:
            self.script(name, f'export PRETENDED_AS="$0"; exec {sys.executable} -SE {TOOL} {name} "$@"')
        for name in REAL:
            (self.tools / name).symlink_to(shutil.which(name))
        self.script("sleep", "exit 0")
        self.script("id", "echo 0")
        (self.folder / "state").mkdir()

    @property
    def project(self):
        return self.folder / "project"

    def script(self, name, text):
        path = self.tools / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{text}\n", encoding="utf-8")
        path.chmod(0o755)

    def state(self, name, value=None):
        path = self.folder / "state" / name
        if value is not None:
            path.write_text(json.dumps(value), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def calls(self, tool=""):
        log = self.folder / "state" / "log"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return [line for line in lines if line.startswith(tool)]

    def setup(self, *arguments, **environment):
        """(status, words); its process group is its own, so that it can be killed with all that it started."""
        (self.folder / "state" / "log").unlink(missing_ok=True)
        own = {"PATH": str(self.tools), "HOME": str(self.folder), "PRETENDED": str(self.folder / "state"),
               "PACKAGES": str(self.project / "launch" / "packages.txt"),
               "UPMOE_SYSTEM_PYTHON": str(self.tools / "python3"), "CUDA_HOME": str(self.folder / "cuda")}
        done = subprocess.run([self.project / "launch" / "setup.sh", *arguments], env=own | environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, check=False,
                              timeout=60)
        return done.returncode, done.stdout

    def succeeds(self, *arguments, **environment):
        status, words = self.setup(*arguments, **environment)
        self.assertEqual(status, 0, words)
        return words

    def install_all(self):
        self.state("installed", {fields[0]: "installed" for fields in package_lines()})


class OneList(Machine):
    def test_program_only_installs_and_configures_no_tests(self):
        self.succeeds("--program-only")
        self.assertEqual(sorted(self.state("installed")), sorted(packages_for("program")))
        self.assertIn("-DUPMOE_TESTS=OFF", self.calls("cmake")[0])

    def test_no_build_stops_before_the_compiler(self):
        self.assertIn("ready to build", self.succeeds("--program-only", "--no-build"))
        self.assertEqual(sorted(self.state("installed")), sorted(packages_for("program")))
        self.assertEqual(len(self.calls("cmake")), 1)
        self.assertEqual(self.calls("ninja"), [])
        self.succeeds("--program-only")
        self.assertEqual(self.calls("cmake"), [], "configured already")
        self.assertTrue((self.project / "build" / "release" / "upmoe").exists())

    def test_program_only_then_whole_then_program_only(self):
        self.succeeds("--program-only")
        self.succeeds()
        self.assertIn("-DUPMOE_TESTS=ON", self.calls("cmake")[0])
        self.assertEqual(len(self.state("installed")), len(package_lines()))
        upmoe = self.project / "build" / "release" / "upmoe"
        built = upmoe.stat().st_ino
        self.succeeds("--program-only")
        self.assertEqual(self.calls("cmake"), [], "nothing to configure: the tests stay where they are")
        self.assertTrue(self.calls("ninja")[-1].endswith(" upmoe"))
        self.assertEqual(upmoe.stat().st_ino, built)

    def test_program_only_after_the_packages_of_the_tests_went(self):
        self.succeeds()
        self.state("installed", {name: "installed" for name in packages_for("program")})
        self.succeeds("--program-only")
        self.assertIn("-DUPMOE_TESTS=OFF", self.calls("cmake")[0])

    def test_every_library_of_the_build_is_in_the_list(self):
        names = {name: fields[2] for fields in reversed(package_lines()) for name in fields[4:]}
        listed = subprocess.run(["git", "-C", ROOT, "ls-files", "*CMakeLists.txt"], capture_output=True, text=True,
                                check=False).stdout.split() or [
            str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/CMakeLists.txt") if "build" not in path.parts]
        self.assertGreater(len(listed), 10)
        for path in listed:
            text = (ROOT / path).read_text(encoding="utf-8")
            self.assertNotIn("find_package(", text, f"{path}: upmoe_find, so that a missing one is named")
            for name in re.findall(r"upmoe_find\(([\w-]+)", text):
                self.assertIn(name, names, f"{path}: {name} is in no line of launch/packages.txt")
                self.assertTrue(path.startswith("tests/") or names[name] == "program",
                                f"{path}: the program needs {name}, which launch/packages.txt has for {names[name]}")


class Missing(Machine):
    COMMAND = "apt-get install --no-install-recommends libgtest-dev"

    def refused(self, *arguments):
        status, words = self.setup(*arguments)
        self.assertEqual(status, 1, words)
        self.assertIn(self.COMMAND, words)
        self.assertEqual(self.calls("cmake"), [], "told before anything is configured")

    def setUp(self):
        super().setUp()
        self.install_all()
        self.state("installed", {n: s for n, s in self.state("installed").items() if n != "libgtest-dev"})

    def test_named_where_nothing_may_be_installed(self):
        self.script("c++", f'[[ $* != *-E* ]] || exit 1; exec {sys.executable} -SE {TOOL} c++ "$@"')
        self.refused("--no-packages")

    def test_named_for_a_user_without_sudo(self):
        self.script("id", "echo 1000")
        self.refused()

    def test_named_where_sudo_wants_a_password_and_nobody_types(self):
        self.script("id", "echo 1000")
        self.script("sudo", "exit 1")
        self.refused()

    def test_libraries_of_ones_own_count(self):
        self.assertIn("ready", self.succeeds("--no-packages"))  # this c++ finds every header
        self.assertEqual(self.calls("apt-get"), [])

    def test_not_needed_for_the_program_alone(self):
        self.succeeds("--program-only", "--no-packages")


class NothingStale(Machine):
    def configured_again(self, *arguments, **environment):
        self.succeeds(*arguments, **environment)
        return bool(self.calls("cmake"))

    def setUp(self):
        super().setUp()
        self.install_all()
        self.succeeds()

    def test_nothing_to_do(self):
        self.assertFalse(self.configured_again())

    def test_another_processor_empties_the_build_folder(self):
        (self.project / "build" / "release" / "old.o").touch()
        self.assertTrue(self.configured_again(PROCESSOR="machine that came later"))
        self.assertFalse((self.project / "build" / "release" / "old.o").exists())

    def test_another_architecture(self):
        self.assertTrue(self.configured_again("--arch", "x86-64-v3", PROCESSOR="x86-64-v3"))
        self.assertIn("-DUPMOE_ARCH=x86-64-v3", self.calls("cmake")[0])

    def test_a_toolkit_that_came_and_went(self):
        nvcc = self.folder / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text("#!/bin/sh\necho release 13\n", encoding="utf-8")
        nvcc.chmod(0o755)
        self.assertTrue(self.configured_again())
        nvcc.unlink()
        self.assertTrue(self.configured_again())

    def test_a_compiler_cache_that_went(self):
        self.script("ccache", "exit 0")
        self.assertFalse(self.configured_again(), "one that came is no reason to build anew")
        (self.project / "build" / "release" / "configured.txt").unlink()
        self.assertTrue(self.configured_again())
        self.assertIn("ccache", self.calls("cmake")[0])
        (self.tools / "ccache").unlink()
        self.assertTrue(self.configured_again())
        self.assertNotIn("ccache", self.calls("cmake")[0])

    def test_other_presets(self):
        (self.project / "CMakePresets.json").write_text("{}", encoding="utf-8")
        self.assertTrue(self.configured_again())


class Interrupted(Machine):
    def test_killed_at_every_step_and_started_again(self):
        self.succeeds()
        steps = len(self.calls())
        self.assertGreater(steps, 7)
        for step in range(1, steps + 1):
            with self.subTest(step=step):
                shutil.rmtree(self.project / "build")
                shutil.rmtree(self.project / ".venv")
                shutil.rmtree(self.folder / "state")
                (self.folder / "state").mkdir()
                status, _ = self.setup(KILL_AT=str(step))
                self.assertEqual(status, -signal.SIGKILL)
                last = self.calls()[-1]
                words = self.succeeds()
                self.assertIn("ready", words, last)
                self.assertEqual(set(self.state("installed").values()), {"installed"}, last)
                packages = (self.project / ".venv" / "packages").read_text(encoding="utf-8")
                self.assertEqual(packages, "all packages", last)
                self.assertEqual((self.project / "build" / "release" / "upmoe").stat().st_mode & 0o111, 0o111, last)

    def test_ctrl_c_is_no_failure_that_a_step_forgives(self):
        self.script("dpkg", 'kill -INT $PPID; exit 1')  # as apt and ninja, which end in their own way
        status, words = self.setup()
        self.assertEqual(status, 130, words)
        self.assertEqual(self.calls("apt-get"), [])

    def test_a_half_removed_environment_is_made_anew(self):
        self.install_all()
        self.succeeds()
        (self.project / "launch" / "requirements.txt").write_text("other==1\n", encoding="utf-8")
        self.script("rm", f'{shutil.which("rm")} "$@"; [[ $* != *.venv ]] || kill -9 $PPID')
        (self.project / ".venv" / "kept").touch()
        status, _ = self.setup()
        self.assertEqual(status, -signal.SIGKILL)
        self.assertFalse((self.project / ".venv" / ".requirements").exists())

    def test_waits_for_another_apt(self):
        self.state("other_apt", {"turns": 2})
        self.assertIn("waiting", self.succeeds())

    def test_package_lists_older_than_the_index(self):
        self.state("lists", {"fresh": False})
        self.succeeds()
        self.assertTrue(any("update" in call for call in self.calls("apt-get")))

    def test_waits_for_what_a_killed_one_left_running(self):
        self.install_all()
        (self.project / "build").mkdir()
        lock = self.project / "build" / "setup.lock"
        with lock.open("w", encoding="utf-8") as left:
            fcntl.flock(left, fcntl.LOCK_EX)
            self.script("flock", f'[[ $1 == -n ]] || touch {self.folder}/waits; exec {shutil.which("flock")} "$@"')
            with ThreadPoolExecutor() as threads:
                setup = threads.submit(self.setup)
                while not (self.folder / "waits").exists() and not setup.done():
                    time.sleep(0.01)
                self.assertFalse(setup.done(), "went on without the lock")
                self.assertEqual(self.calls(), [])
                fcntl.flock(left, fcntl.LOCK_UN)
                status, words = setup.result()
        self.assertEqual(status, 0, words)
        self.assertIn("waiting for another set-up", words)


class TruncatedObjects(unittest.TestCase):
    """What set-up leaves to ninja: an object that a killed compiler left is made anew, though it is the newest file."""

    RULES = """rule compile
  command = printf half >$out; [ ! -e kill ] || kill -9 0; printf ' and half' >>$out
build object: compile source
default object
"""

    def build(self, folder, kill):
        if kill:
            (folder / "kill").touch()
        else:
            (folder / "kill").unlink(missing_ok=True)
        return subprocess.run(["ninja", "-C", folder], capture_output=True, start_new_session=True,
                              check=False).returncode

    def test_first_build_and_rebuild(self):
        for rebuild in (False, True):
            with self.subTest(rebuild=rebuild), tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                (folder / "build.ninja").write_text(self.RULES, encoding="utf-8")
                (folder / "source").touch()
                if rebuild:
                    self.assertEqual(self.build(folder, kill=False), 0)
                    later = (folder / "object").stat().st_mtime + 5
                    os.utime(folder / "source", (later, later))
                self.assertNotEqual(self.build(folder, kill=True), 0)
                if rebuild:
                    os.utime(folder / "object", (later + 5, later + 5))
                self.assertEqual(self.build(folder, kill=False), 0)
                self.assertEqual((folder / "object").read_text(encoding="utf-8"), "half and half")


if __name__ == "__main__":
    unittest.main()
