"""Processes of a trial, whoever started them: what is killed, and what may not be left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

from subjects import ENVIRONMENT, require

MARK = "UPMOE_PLANTED"


class Started:
    """A command under way, its output in a file; every process of it bears a mark in its environment."""

    def __init__(self, words, log):
        self.log, self.mark = Path(log), f"{MARK}={os.getpid()}.{time.monotonic_ns()}"
        with open(log, "w") as said:
            self.process = subprocess.Popen([*map(str, words)], stdout=said, stderr=said, start_new_session=True,
                                            env=ENVIRONMENT | dict([self.mark.split("=")]))

    def said(self):
        return self.log.read_text(errors="replace")

    def pids(self, program=None):
        """Of those that live, or of those that run one program."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0") and \
                        (program is None or os.readlink(entry / "exe") == str(program.resolve())):
                    found.append(int(entry.name))
            except OSError:  # another user's, or gone
                continue
        return found

    def end(self, pids=None):
        """kill -9."""
        for pid in self.pids() if pids is None else pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

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
