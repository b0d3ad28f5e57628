"""A file that appears under its name complete or not at all, as in data/staged_directory.h.

While NAME is made, its parts lie in NAME.upmoe-partial/, in a folder of their own there. A lock tells two jobs with one
output apart, and a job that was killed from one that still works: what a killed one left is cleared by the next.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile

LOCK, PART = "upmoe.lock", "part-"


class Taken(Exception):
    """The output is another job's, or its place somebody else's: a usage error."""


class StagedFile:
    """with StagedFile(path, warn) as staged: write staged.part("a"); staged.commit("a"). warn(text) says what is not
    worth an error."""

    def __init__(self, path, warn):
        self.target, self.warn = path, warn
        self.folder, self.lock, self.own = f"{path}.upmoe-partial", None, None

    def __enter__(self):
        try:
            if self.take_lock():
                for name in os.listdir(self.folder):
                    if name.startswith(PART):
                        shutil.rmtree(os.path.join(self.folder, name))
            self.own = tempfile.mkdtemp(prefix=PART, dir=self.folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """No error of its own: either the output is complete, or another error is the one to tell."""
        with contextlib.suppress(OSError):  # even ignore_errors lets some through
            if self.own is not None:
                shutil.rmtree(self.own, ignore_errors=True)
        if self.lock is None:
            return
        with contextlib.suppress(OSError):
            # While it is held: nobody else's can stand there. A part that could not be removed is ours by it alone.
            if not any(name.startswith(PART) for name in os.listdir(self.folder)):
                os.unlink(os.path.join(self.folder, LOCK))
            os.rmdir(self.folder)  # stays where there is something of somebody else in it
        with contextlib.suppress(OSError):
            os.close(self.lock)

    def take_lock(self):
        """Whether the lock is held: not where the file system has none."""
        name = os.path.join(self.folder, LOCK)
        while True:
            self.refuse_foreign()
            os.makedirs(self.folder, exist_ok=True)
            try:
                lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                continue  # its holder has just ended and removed the folder
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                os.close(lock)
                raise Taken(f"output {self.target} is being written by another job; wait for it or write "
                            "elsewhere") from None
            except OSError:
                held = False
                self.warn(f"{self.target}: this file system has no locks; do not start two jobs with one output")
            if not held or (os.path.exists(name) and os.path.samestat(os.fstat(lock), os.stat(name))):
                self.lock = lock
                return held
            os.close(lock)  # removed by its holder meanwhile

    def refuse_foreign(self):
        """The folder may be somebody else's: one without our lock file must be empty."""
        if not os.path.lexists(self.folder) or (os.path.isdir(self.folder) and not os.path.islink(self.folder) and (
                os.path.lexists(os.path.join(self.folder, LOCK)) or not os.listdir(self.folder))):
            return
        raise Taken(f"{self.folder}: found where the output is prepared, but no run of this program left it; move it "
                    "away")

    def part(self, name):
        return os.path.join(self.own, name)

    def commit(self, name):
        with open(self.part(name), "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.part(name), self.target)
        try:
            sync_folder(self.target)
        except OSError as e:
            self.warn(f"{self.target} is complete, but the disk did not confirm its name, and a power cut may still "
                      f"lose it: {e.strerror}")


def sync_folder(path):
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
