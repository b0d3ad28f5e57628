#!/usr/bin/env python3
"""data/tokenize.py and its files: what they are taken for, how many there may be, which are given twice."""

import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / folder) for folder in ("launch", "data")]
from text_documents import Choices, documents_of, plan_tasks  # noqa: E402


class FilesTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)
        bytes_alone = tokenizers.Tokenizer(models.BPE(
            {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
        bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytes_alone.decoder = decoders.ByteLevel()
        bytes_alone.add_special_tokens(["<|endoftext|>"])
        self.tokenizer = self.dir / "tokenizer.json"
        bytes_alone.save(str(self.tokenizer))

    def file(self, name, content):
        path = self.dir / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @staticmethod
    def texts(path):
        return [text for task in plan_tasks([str(path)], Choices()) for text, _ in documents_of(task, Choices())]

    def run_script(self, *arguments, status):
        done = subprocess.run([sys.executable, str(ROOT / "data/tokenize.py"), *map(str, arguments)], text=True,
                              capture_output=True, timeout=120, check=False)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stderr

    def refused(self, status, *arguments):
        said = self.run_script(*arguments, status=status)
        self.assertFalse((self.dir / "out.h5").exists())
        return said

    def tokenize(self, *files, options=()):
        out = self.dir / "out.h5"
        return out, self.run_script("--tokenizer", self.tokenizer, "--out", out, *options, *files, status=0)

    def documents(self, path):
        tokenizer = tokenizers.Tokenizer.from_file(str(self.tokenizer))
        with h5py.File(path) as file:
            tokens, ends = file["tokens"][:].tolist(), file["document_ends"][:].tolist()
        return [tokenizer.decode(tokens[begin:end - 1]) for begin, end in zip([0, *ends], ends, strict=False)]

    def test_records_longer_than_what_is_looked_at(self):
        long = json.dumps({"text": "a word " * 20000}).encode()  # as of a book
        for name in ("a.txt", "part-00000", "a.jsonl", "a.json"):
            for end in (b"", b"\n", b'\n{"text": "b"}\n'):
                expected = ["a word " * 20000] + ["b"] * (b"b" in end)
                self.assertEqual(self.texts(self.file(name, long + end)), expected, name)
        code = "{" + "x = 1; " * 20000 + "}\nmore\n"
        self.assertEqual(self.texts(self.file("a.js", code)), [code])
        packed = self.file("part-00001", gzip.compress(long + b'\n{"text": "b"}\n'))
        self.assertEqual(self.texts(packed)[1:], ["b"])

    def test_more_files_than_a_command_line_takes(self):
        names = [f"a {i}.txt" for i in range(300)] + ["a\nb.txt"]
        for i, name in enumerate(names):
            self.file(name, f"text {i}")
        expected = [f"text {i}" for i in range(301)]
        listed = self.file("names", "\0".join(str(self.dir / name) for name in names) + "\0")
        self.assertEqual(self.documents(self.tokenize("--files-from", listed)[0]), expected)
        listed = self.file("names", "\n".join(str(self.dir / name) for name in names[1:300]) + "\n")
        out, _ = self.tokenize(self.dir / names[0], options=("--files-from", listed))
        self.assertEqual(self.documents(out), expected[:300])
        out.unlink()
        good = ("--tokenizer", self.tokenizer, "--out", out)
        self.assertIn("holds no names", self.refused(2, *good, "--files-from", self.file("none", "\n")))
        self.assertIn("no FILE is given", self.refused(2, *good))
        self.assertIn("missing: No such file", self.refused(3, *good, "--files-from", self.dir / "missing"))
        self.assertIn("--files-from -", self.refused(3, *good, self.dir))

    def test_a_text_too_long_for_the_memory_is_told(self):
        small, large = self.file("small.txt", "a b"), self.file("large.txt", "a b c d e f " * 1_000_000)
        done = subprocess.run(
            [sys.executable, str(ROOT / "data/tokenize.py"), "--tokenizer", self.tokenizer, "--out",
             self.dir / "out.h5", "--processes", "2", small, large], text=True, capture_output=True, timeout=120,
            check=False, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # which would take room for each core
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)))
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("out of memory? each takes many times", done.stderr)
        self.assertIn(f"{large} is the largest, {large.stat().st_size} bytes", done.stderr)
        self.assertEqual([p.name for p in self.dir.iterdir() if p.name.startswith("out.h5")], [])

    def test_a_file_that_is_given_twice_is_told(self):
        text, other = self.file("a.txt", "x"), self.file("b.txt", "y")
        (self.dir / "link.txt").symlink_to(text)
        _, said = self.tokenize(text, other, self.dir / "link.txt")
        self.assertIn("a.txt is given 2 times and is read as often", said)
        self.assertNotIn("times", self.tokenize(text, other)[1])


if __name__ == "__main__":
    unittest.main()
