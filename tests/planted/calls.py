"""System calls refused one at a time, in training, upcycling, exporting, tokenizing."""

import hashlib
import re
import shutil
from collections import Counter, defaultdict

from subjects import NotMeasured, Part, Training, Violation, checkpoints_in, content_of, outputs_of, require
from tiny_run import strace, why_no_strace

# What may be refused, and with what. A call is ours when it names a path, or a descriptor, in the folder of the trials.
ERRORS = {
    "openat": ("EACCES", "EIO", "ENOSPC", "EMFILE"), "close": ("EIO",), "mmap": ("ENOMEM",),
    "read": ("EIO",), "pread64": ("EIO",), "readv": ("EIO",), "getdents64": ("EIO",), "readlink": ("EIO",),
    "write": ("ENOSPC", "EIO"), "pwrite64": ("ENOSPC", "EIO"), "writev": ("ENOSPC",), "pwritev": ("ENOSPC",),
    "fsync": ("EIO", "ENOSPC"), "fdatasync": ("EIO",), "fallocate": ("ENOSPC",), "ftruncate": ("ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EACCES"), "mkdirat": ("ENOSPC", "EACCES"), "rename": ("EIO", "EACCES", "ENOSPC"),
    "renameat": ("EIO", "ENOSPC"), "renameat2": ("EIO", "EINVAL", "ENOSPC"), "unlink": ("EIO", "EACCES"),
    "unlinkat": ("EIO", "EACCES"), "rmdir": ("EIO",), "flock": ("ENOLCK",), "newfstatat": ("EIO", "EACCES"),
    "fstat": ("EIO",), "statx": ("EIO", "EACCES"), "access": ("EACCES",), "statfs": ("EIO",), "fstatfs": ("EIO",),
    "copy_file_range": ("EIO", "ENOSPC"), "sendfile": ("EIO", "ENOSPC")}
CALL = re.compile(r"^(\w+)\(")
# What a removal calls: refused, it may leave what it should remove. Nor does a save retire another checkpoint when its
# own name is not confirmed or it cannot be read.
REMOVAL = ("unlink", "unlinkat", "rmdir", "getdents64", "openat", "newfstatat", "fstat", "renameat2", "rename", "close")
UNSURE = ("fsync", "read", "pread64")


class TrainingCase:
    """A run of its own, or one that goes on from older checkpoints and removes them."""

    def __init__(self, name, training, run_dir, begun=None):
        self.name, self.training, self.run_dir, self.begun = name, training, run_dir, begun
        self.words = training.words(run_dir, "checkpoint.async=false")
        self.old = {p.name: content_of(p) for p in checkpoints_in(begun)} if begun else {}

    def begin(self):
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if self.begun:
            shutil.copytree(self.begun, self.run_dir)

    def check(self, done, call):
        program = self.training.program
        if done.returncode != 0:
            program.require_refusal(done)
        aside = {p.name.partition(".")[0]: p for p in self.run_dir.glob("checkpoints/*.aside*")}
        for name, path in aside.items():  # could not be read, and was in the way of its step's next save
            require(content_of(path) == self.old.get(name), f"{path} was changed")
        found = checkpoints_in(self.run_dir)
        for checkpoint in found:
            if checkpoint.name in self.old and checkpoint.name not in aside:
                require(content_of(checkpoint) == self.old[checkpoint.name], f"{checkpoint} was changed")
            else:
                program.verify(checkpoint)
        require(len(found) + len(aside) >= len(self.old), f"left: {found}, {aside}")
        if done.returncode == 0:
            self.training.require_finished(self.run_dir, every_loss=False, tidy=call not in (*REMOVAL, *UNSURE))
        else:
            self.training.finish(self.run_dir, every_loss=False)


class OutputCase:
    def __init__(self, output, to):
        self.name, self.output, self.to, self.words = output.name, output, to, output.words(to)

    def begin(self):
        self.output.clear(self.to)

    def check(self, done, call):
        there = self.output.is_there(self.to)
        if done.returncode == 0:
            require(there, f"ended with 0 and made nothing: {done.stderr}")
        else:
            self.output.program.require_refusal(done)
            require(not there, f"ended with {done.returncode}, and the output is there: {done.stderr}")
        left = self.output.leftovers(self.to)
        require(not left or call in REMOVAL, f"left: {left}")
        self.output.finish(self.to)


class Calls(Part):
    """A trial: one call of one command is refused, with an error by chance. All calls of an undisturbed run are listed:
    those that do the same to the same file often (reads of tensors) come later, the rest by chance."""

    name = "calls"
    shows = ("a refused call ends with 0 and the whole result, or with 2 or 3 and one line; older checkpoints are as "
             "they were, nothing half done has a final name, nothing is left, and the same command then succeeds")

    def __init__(self, program, seed):
        if reason := why_no_strace():
            raise NotMeasured(reason)
        super().__init__(program, seed)
        self.logs = program.dir / "traces"
        self.named = re.compile(re.escape(str(program.dir)) + r'[^>"]*')
        training, begun = Training(program, steps=3), program.dir / "begun"
        done = program.run(*training.words(begun, "train.steps=2"))
        require(done.returncode == 0, done.stderr)
        cases = [TrainingCase("begin", training, program.dir / "run"),
                 TrainingCase("save", training, program.dir / "run", begun),
                 *(OutputCase(output, program.dir / "out") for output in outputs_of(program))]
        planned = [(depth, case, *fault) for case in cases for depth, *fault in self.faults_of(case)]
        planned.sort(key=lambda p: (p[0], hashlib.sha256(f"{seed} {p[1].name} {p[2:]}".encode()).digest()))
        self.planned = [p[1:] for p in planned]
        self.count = self.most = len(self.planned)

    def traced(self, case, *filters):
        """The command from its beginning, and its calls: a list for each thread."""
        case.begin()
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        done = self.program.run(*case.words, before=strace("-ff", "-y", "-s", 0, *filters, log=self.logs / "of"))
        return done, [log.read_text(errors="replace").splitlines() for log in sorted(self.logs.iterdir())]

    def is_ours(self, line):
        return self.named.search(line) is not None

    def faults_of(self, case):
        """(depth, call, n) for each call on our files in an undisturbed run: the n-th of its kind in its thread. The
        depth is 1 for the first and the last that a thread does to a file, 2 for the next two at either end, 3 for the
        next four."""
        done, threads = self.traced(case)
        require(done.returncode == 0, f"{case.name} under strace: {done.stderr}")
        depths = {}
        for lines in threads:
            counts, alike = Counter(), defaultdict(list)
            for line in lines:
                call = match[1] if (match := CALL.match(line)) else ""
                counts[call] += 1
                if call in ERRORS and self.is_ours(line):
                    alike[call, *self.named.findall(line)].append(counts[call])
            for (call, *_), numbers in alike.items():
                for i, n in enumerate(numbers):
                    depth = min(i + 1, len(numbers) - i).bit_length()
                    depths[call, n] = min(depth, depths.get((call, n), depth))
        return [(depth, *fault) for fault, depth in depths.items()]

    def trial(self, number, draw):
        case, call, n = self.planned[number]
        error = draw.choice(ERRORS[call])
        done, threads = self.traced(case, "--seccomp-bpf", "-e", f"trace={call}", "-e",
                                    f"inject={call}:error={error}:when={n}")
        refused = [line for lines in threads for line in lines if "INJECTED" in line]
        if not any(map(self.is_ours, refused)):
            return {"missed": 1}  # its calls came in another order this time
        try:
            case.check(done, call)
        except Violation as e:
            raise Violation(f"{case.name}: {'; '.join(refused)}: {e}") from e
        return {"calls": 1, case.name: 1, "survived" if done.returncode == 0 else "refused": 1}
