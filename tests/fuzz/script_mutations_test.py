#!/usr/bin/env python3
"""Seeded mutations of good inputs for what the scripts read: text to tokenize, tokenizers, metrics, host files.

Whatever comes in, the answer is a result or words (BadInput, status 2 or 3), never another exception.
"""

import bz2
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / "launch"), str(ROOT / "data")]
import report  # noqa: E402
import report_page  # noqa: E402
from command_line import BadInput  # noqa: E402
from text_documents import Choices, documents_of, plan_tasks  # noqa: E402
from tokenizer_file import load_tokenizer  # noqa: E402

PIECES = [b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b'""', b"{}", b"[]", b"[" * 3000, b"{", b"}", b",", b":",
          b"\n", b"\r\n", b"\xff", b"\0", b"\\ud800", b"9" * 400, b"\xef\xbb\xbf", b'"text"', b"$x^$", b"slots=", b"#",
          b" "]


def mutated(draw, good):
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(good)), draw.randint(0, 30)
        kind = draw.randint(0, 5)
        if kind == 0 and at < len(good):
            good = good[:at] + bytes([good[at] ^ 1 << draw.randint(0, 7)]) + good[at + 1:]
        elif kind == 1:
            good = good[:at] + good[at + length:]
        elif kind == 2:
            good = good[:at] + good[at:at + length] * 2 + good[at + length:]
        elif kind == 3:
            good = good[:at]
        else:
            good = good[:at] + draw.choice(PIECES) + good[at + (length if kind == 4 else 0):]
    return good


class ScriptMutations(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def accepted(self, count, corpus, read):
        """How many of `count` mutations `read` takes; what it throws must be BadInput."""
        taken = 0
        for seed in range(count):
            draw = random.Random(seed)
            content = mutated(draw, draw.choice(corpus))
            try:
                read(content)
                taken += 1
            except BadInput as e:
                self.assertNotIn("\n", str(e))
            except BaseException as e:
                raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}\n{content[:500]!r}") from e
        return taken

    def test_text_of_every_kind(self):
        lines = b'{"text": "one"}\n{"text": "two", "id": 2}\n'
        corpus = [lines, b'[{"text": "one"}, {"text": "two"}]', b'{\n "text": "one"\n}\n', "plain t\u00e9xt\n".encode(),
                  gzip.compress(lines), bz2.compress(lines), zstandard.ZstdCompressor().compress(lines)]
        self.assertGreater(self.accepted(2000, corpus, self.read_text), 100)

    def test_parquet(self):
        corpus = []
        for options in ({}, {"compression": "none", "use_dictionary": False}):
            file = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"]}), file, **options)
            corpus.append(file.getvalue())
        self.assertGreater(self.accepted(300, corpus, self.read_text), 1)

    def read_text(self, content):
        names = ["a.jsonl", "a.json", "a.txt", "a"]
        path = self.folder / names[len(content) % len(names)]
        path.write_bytes(content)
        for choices in (Choices(), Choices(replace_invalid=True)):
            for task in plan_tasks([str(path)], choices):
                for text, _ in documents_of(task, choices):
                    text.encode("utf-8")  # no half characters

    def test_tokenizers(self):
        good = json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [
                {"id": 3, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}],
            "normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
            "decoder": None, "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": {
                "a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}).encode()
        self.assertGreater(self.accepted(300, [good], lambda content: load_tokenizer(content, "t")), 1)

    def test_metrics(self):
        steps = [{"step": i, "tokens": 100 * i, "loss": 8.0 / i, "grad_norm": 1.0, "seconds": 0.5, "mfu": None,
                  "tokens_per_s": 200.0, "flops": 1e9, "ranks": 1, "expert_load": [[0.25] * 4] * 2}
                 for i in range(1, 5)]
        held_out = {"kind": "eval", "step": 4, "tokens": 400, "eval_loss": 2.5}
        corpus = ["".join(json.dumps(r) + "\n" for r in [*steps, held_out]).encode(),
                  (json.dumps(steps[0]) + "\n").encode()]
        drawn = []

        def read(content):
            (self.folder / "metrics.jsonl").write_bytes(content)
            run = report.read_run(self.folder, "run_$x^$", "#000000")
            if len(drawn) < 3 and len(content) % 7 == 0:
                drawn.append(run)
            for against in report.AXES:
                run.x(run.steps, against)
            for row in report_page.summary_rows([run]):
                self.assertEqual(len(row), 8)

        self.assertGreater(self.accepted(1500, corpus, read), 20)
        with report.plt.rc_context(report.STYLE | {"savefig.dpi": 40}), report.np.errstate(all="ignore"):
            report.draw_all(self.folder, [report.Group(run.label, run.colour, [run]) for run in drawn], "seconds")

    # launch/run_hosts.sh's own function, on many files in one shell.
    def test_host_files(self):
        script = (ROOT / "launch" / "run_hosts.sh").read_text(encoding="utf-8")
        function = script[script.index("read_hosts() {"):]
        function = function[:function.index("\n}\n") + 3]
        corpus = [b"node1 slots=8\nnode2 slots=8\n", b"# all\nlocalhost\n10.0.0.2\n", b"a\nb\na\nb\n@\n@\n",
                  b"fe80::1 slots = 2 max_slots=4\n"]
        for seed in range(250):
            draw = random.Random(seed)
            (self.folder / f"{seed}.hosts").write_bytes(mutated(draw, draw.choice(corpus)))
        done = subprocess.run(["bash", "-c", f"""set -euo pipefail
            die() {{ echo "die $*"; exit 2; }}
            {function}
            for hostfile in "$1"/*.hosts; do
              status=0
              (ranks=; read_hosts
               [[ $per_host =~ ^[1-9][0-9]*$ ]] || echo "wrong: $hostfile per_host '$per_host'"
               for host in "${{hosts[@]}}"; do
                 [[ $host =~ ^[][A-Za-z0-9._:%@+-]+$ && $host != -* ]] || echo "wrong: $hostfile host '$host'"
               done
               echo "taken") || status=$?
              [[ $status -eq 0 || $status -eq 2 ]] || echo "wrong: $hostfile status $status"
            done""", "bash", self.folder], capture_output=True, check=False)
        self.assertEqual(done.stderr.decode(errors="replace"), "")
        lines = done.stdout.decode(errors="replace").splitlines()
        self.assertEqual([line for line in lines if line.startswith("wrong")], [])
        self.assertGreater(lines.count("taken"), 20)
        self.assertEqual(len([line for line in lines if line == "taken" or line.startswith("die ")]), 250)


if __name__ == "__main__":
    unittest.main()
