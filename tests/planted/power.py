"""Power cuts: what is on a disk that stops at any moment of a save, an upcycling, an export or a tokenizing."""

import re
import time

from processes import Started
from recorded_disk import CannotRecord, RecordedDisk, after_cut, command, enter_own_namespace
from subjects import NotMeasured, Part, Training, Violation, checkpoints_in, outputs_of, require, step_of

CUTS_OF_A_RECORDING = 10
DISK_BYTES = 32 << 20
OPTIONS = ("data=ordered", "data=ordered,noauto_da_alloc", "data=writeback,noauto_da_alloc")  # of ext4
KEPT = (1.0, 0.9, 0.5, 0.0)  # shares of what the disk had not been told to make durable
SAVED = re.compile(r"checkpoint \S+/step_(\d{8})$", re.MULTILINE)


class Recording:
    """All that reached the disk while a command ran, and after how many requests it was known to have done what."""

    def __init__(self, folder, empty, options, words):
        self.empty, self.options, self.known = empty, options, []
        disk = RecordedDisk(folder, empty, options)
        try:
            started = Started(words(disk.mount_point / "out"), folder / "said")
            while started.process.poll() is None:
                self.note(disk, started)
                time.sleep(0.001)
            self.note(disk, started)
            require(started.process.returncode == 0, f"fails on the recorded disk: {started.said()}")
            self.done = len(disk.requests)
            disk.settle()
            self.requests = list(disk.requests)
        finally:
            disk.unmount()

    def note(self, disk, started):
        steps = [int(step) for step in SAVED.findall(started.said())]
        if steps and (not self.known or self.known[-1][1] != steps[-1]):
            self.known.append((len(disk.requests), steps[-1]))  # counted after it was said: never too early

    def newest_known(self, count):
        return max((step for requests, step in self.known if requests <= count), default=0)


class Power(Part):
    """A trial: a cut after one of the requests that a recorded command made of the disk; ten cuts of a recording. The
    disk had kept all that had reached it, or of what came after its last flush a part by chance."""

    name, count = "power", 60
    shows = ("every checkpoint under its final name verifies, none that was announced is lost, the run goes on to the "
             "same losses and tensors; an output is whole or not there, and there once its command has ended")

    def __init__(self, program, seed):
        super().__init__(program, seed)
        self.last = (None, None)
        self.image, self.mount_point = program.dir / "image", program.dir / "disk"
        try:
            enter_own_namespace()
            with open(self.image, "wb") as file:
                file.truncate(DISK_BYTES)
            command("mkfs.ext4", "-q", "-F", "-b", 4096, self.image)
            self.empty = self.image.read_bytes()
            RecordedDisk(program.dir, self.empty, OPTIONS[0]).unmount()  # tried before anything counts
        except CannotRecord as e:
            raise NotMeasured(str(e)) from None
        trainings = [Training(program, ranks) for ranks in (1, 2)]
        self.jobs = [job for pair in zip(trainings * 2, outputs_of(program)) for job in pair]

    def trial(self, number, draw):
        which = number // CUTS_OF_A_RECORDING
        job = self.jobs[which % len(self.jobs)]
        if self.last[0] != which:
            options = OPTIONS[which % len(OPTIONS)]
            self.last = (which, Recording(self.program.dir, self.empty, options, job.words))
        recording = self.last[1]
        count, kept = draw.randint(1, len(recording.requests)), draw.choice(KEPT)
        self.image.write_bytes(after_cut(recording.empty, recording.requests, count, draw, kept))
        try:
            command("mount", "-t", "ext4", "-o", f"loop,{recording.options}", self.image, self.mount_point)
        except CannotRecord as e:
            raise Violation(f"after {count} requests the file system cannot be mounted again: {e}") from e
        try:
            found = self.look(recording, count, job)
        except Violation as e:
            raise Violation(f"after {count} of {len(recording.requests)} requests, {kept} of the last kept, "
                            f"{recording.options}: {e}") from e
        finally:
            command("umount", self.mount_point)
        return found | {"cuts": 1}

    def look(self, recording, count, job):
        out = self.mount_point / "out"
        if not isinstance(job, Training):
            there = job.is_there(out)
            require(there or count < recording.done, "the output of a command that had ended is lost")
            job.finish(out)
            return {"outputs_whole": int(there), "outputs_absent": int(not there)}
        found = checkpoints_in(out)
        for checkpoint in found:
            self.program.verify(checkpoint)
        known, newest = recording.newest_known(count), max(map(step_of, found), default=0)
        require(newest >= known, f"step {known} was announced, the newest there is of step {newest}")
        job.finish(out)
        return {"checkpoints": len(found)}
