"""Processes of a trial, whoever started them: what is killed, and what may not be left behind."""

import atexit
import os
import signal
import subprocess
import time
from pathlib import Path

from subjects import ENVIRONMENT, require

MARK = f"UPMOE_PLANTED={os.getpid()}."


def marked(mark):
    """Processes that have an environment variable which begins so."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"\0" + mark.encode() in b"\0" + (entry / "environ").read_bytes():
                yield int(entry.name)
        except OSError:  # another user's, or gone
            continue


def program_of(pid):
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return ""


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


atexit.register(lambda: kill(marked(MARK)))  # of a measurement that was broken off


class Started:
    """A command under way, its output in a file; every process of it bears a mark in its environment."""

    def __init__(self, words, log):
        self.log, self.mark = Path(log), f"{MARK}{time.monotonic_ns()}"
        with open(log, "w") as said:
            self.process = subprocess.Popen([*map(str, words)], stdout=said, stderr=said, start_new_session=True,
                                            env=ENVIRONMENT | dict([self.mark.split("=")]))

    def said(self):
        return self.log.read_text(errors="replace")

    def pids(self, program=None):
        """Of those that live, or of those that run one program."""
        return [pid for pid in marked(self.mark) if program is None or program_of(pid) == str(program.resolve())]

    def end(self, pids=None):
        """kill -9."""
        kill(self.pids() if pids is None else pids)

    def require_gone(self, within_s):
        """No process of it is left soon after the one that was started has ended."""
        self.process.wait(within_s)
        end = time.monotonic() + within_s
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            names = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                     for pid in left]
            self.end()
            require(False, f"left behind: {names}")
