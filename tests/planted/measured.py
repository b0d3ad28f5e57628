"""What trials came to: counts, ranges, violations, and the file in which they are recorded."""

import datetime
import hashlib
import json
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
from bench_record import ROOT, machine  # noqa: E402


class Measured:
    """Of one part: whole numbers are summed over the trials, others become their range."""

    def __init__(self, part, shows, seed):
        self.part, self.shows, self.seed = part, shows, seed
        self.planned, self.trials, self.found, self.violations, self.seconds, self.reason = 0, 0, {}, [], 0.0, None

    def add(self, found):
        self.trials += 1
        self.found = combined(self.found, {k: v if isinstance(v, int) else [v, v] for k, v in found.items()})

    def violation(self, recipe, text):
        self.trials += 1
        self.violations.append({"repeat": recipe, "what": text})

    def entry(self):
        if self.reason:
            return {"part": self.part, "not_measured": self.reason}
        return {"part": self.part, "shows": self.shows, "seed": self.seed, "planned": self.planned,
                "trials": self.trials, "found": self.found, "violations": self.violations,
                "seconds": round(self.seconds, 1)}

    def __str__(self):
        if self.reason:
            return f"{self.part}: NOT MEASURED: {self.reason}"
        found = ", ".join(f"{name} {value}" for name, value in self.found.items())
        return f"{self.part}: {self.trials} trials in {self.seconds:.0f} s: {found}; {len(self.violations)} violations"


def combined(one, two):
    both = one | two
    for name in one.keys() & two.keys():
        a, b = one[name], two[name]
        both[name] = a + b if isinstance(a, int) else [min(a[0], b[0]), max(a[1], b[1])]
    return both


def output_of(*words):
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).partition("\n")[0].strip()
    except OSError:
        return "none"


class Record:
    """A JSON file, or none. Parts of one seed that were measured of one program are one entry."""

    def __init__(self, path, program):
        self.path = path
        self.content = {
            "program": {"commit": output_of("git", "-C", str(ROOT), "rev-parse", "HEAD"),
                        "sha256": hashlib.sha256(program.read_bytes()).hexdigest()},
            "versions": {"upmoe": output_of(str(program), "--version"), "strace": output_of("strace", "--version"),
                         "mpirun": output_of("mpirun", "--version"), "python": sys.version.split()[0]},
            "machine": machine(), "commands": [], "results": []}
        if path and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["program"]["sha256"] != self.content["program"]["sha256"]:
                sys.exit(f"faults: {path}: is of another program; give another file")
            self.content |= {"program": before["program"], "commands": before["commands"],
                             "results": before["results"]}

    def add(self, measured, arguments):
        new, results = measured.entry(), self.content["results"]
        same = [r for r in results if r["part"] == new["part"] and r.get("seed") == new.get("seed")]
        if same and "trials" in new:
            same[0] |= {"trials": same[0]["trials"] + new["trials"], "found": combined(same[0]["found"], new["found"]),
                        "violations": same[0]["violations"] + new["violations"],
                        "seconds": round(same[0]["seconds"] + new["seconds"], 1)}
        elif not same:
            results.append(new)
        where = arguments.index("--record") if "--record" in arguments else len(arguments)
        command = " ".join(["tests/faults.py", *arguments[:where], *arguments[where + 2:]])
        if command not in self.content["commands"]:
            self.content["commands"].append(command)
        self.content["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
