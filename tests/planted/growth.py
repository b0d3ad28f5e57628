"""A long run of a tiny model: what memory and open files do over its steps."""

import json
import os
import subprocess
import time
from pathlib import Path

from subjects import ENVIRONMENT, TIMEOUT_S, Part, require

WARM_UP = 0.25  # of the steps
MOST_KB_A_STEP = 1.0  # 100 MB in 100,000 steps


def slope(points):
    """Of the least-squares line through (x, y)."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


class Growth(Part):
    """One trial of `count` steps, with a save and an evaluation every 100, sampled ten times a second."""

    name, count = "growth", 4000
    shows = f"at most {MOST_KB_A_STEP} KB a step by least squares after the first quarter; no more open files later on"

    def numbers(self, first, count):
        return [count or self.count]  # the steps of the one trial

    def trial(self, steps, draw):
        run = self.program.dir / "long"
        words = [self.program.upmoe, "train", self.program.dir / "run.yaml", "parallel.ep=1", f"train.steps={steps}",
                 "checkpoint.every=100", "checkpoint.keep=2", "log.every=1", f"run.dir={run}", "train.eval_every=100",
                 f"data.valid={self.program.dir}/tokens.h5", "train.eval_sequences=8"]
        with open(self.program.dir / "said", "w+") as said:
            process = subprocess.Popen([*map(str, words)], stderr=said, env=ENVIRONMENT)
            try:
                samples = self.sample(process, run / "metrics.jsonl")
            finally:
                process.kill()
            said.seek(0)
            require(process.wait() == 0, f"the run fails: {said.read()}")
        steady = [s for s in samples if s[0] >= WARM_UP * steps]
        require(len(steady) >= 20, f"only {len(samples)} samples; too few steps to tell")
        kb = slope([(step, memory) for step, memory, _ in steady])
        early, late = steady[:len(steady) // 2], steady[len(steady) // 2:]
        files = [max(s[2] for s in half) for half in (early, late)]
        require(kb <= MOST_KB_A_STEP, f"memory grows by {kb:.3f} KB a step")
        require(files[1] <= files[0], f"open files grow from {files[0]} to {files[1]}")
        return {"steps": steps, "samples": len(steady), "kb_a_step": round(kb, 4), "open_files": float(files[1]),
                "memory_kb": float(steady[-1][1])}

    def sample(self, process, metrics):
        """(step, KB of memory, open files) until the process ends."""
        samples, position, step, began = [], 0, 0, time.monotonic()
        place = Path(f"/proc/{process.pid}")
        while process.poll() is None:
            require(time.monotonic() - began < 10 * TIMEOUT_S, "the run does not end")
            time.sleep(0.1)
            if metrics.exists():
                with open(metrics, encoding="utf-8") as file:
                    file.seek(position)
                    text = file.read()
                lines = text[:text.rfind("\n") + 1]
                position += len(lines)
                step = max([step, *(json.loads(line)["step"] for line in lines.splitlines())])
            try:
                status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
                kb = int(status["RssAnon"].split()[0])  # without the pages of libraries and token files
                samples.append((step, kb, len(os.listdir(place / "fd"))))
            except (OSError, KeyError):  # it has just ended
                break
        return samples
