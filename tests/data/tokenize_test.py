#!/usr/bin/env python3
"""data/tokenize.py from the outside: what it writes, what it refuses, what it leaves behind."""

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = "def f(x):\n    return x + 1  # one more\n\nfor i in range(10):\r\n    print(f(i), 'done')\n" * 40


class TokenizeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.base = Path(cls.folder.name)
        (cls.base / "train.txt").write_bytes(TEXT.encode())
        cls.tokenizer = cls.base / "tokenizer.json"
        done = cls.run_script("--train-vocab", 400, "--tokenizer", cls.tokenizer, cls.base / "train.txt")
        assert done.returncode == 0, done.stderr

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def setUp(self):
        self.dir = Path(tempfile.mkdtemp(dir=self.base))

    @staticmethod
    def run_script(*arguments, **options):
        return subprocess.run([sys.executable, str(ROOT / "data/tokenize.py"), *map(str, arguments)], text=True,
                              capture_output=True, timeout=120, check=False, **options)

    def tokenize(self, *files, out="out.h5", options=()):
        done = self.run_script("--tokenizer", self.tokenizer, "--out", self.dir / out, *options, *files)
        self.assertEqual(done.returncode, 0, done.stderr)
        return self.dir / out, done.stderr

    def file(self, name, content):
        path = self.dir / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def documents(self, path):
        """The texts of a token file, the end-of-document tokens checked and removed."""
        tokenizer = tokenizers.Tokenizer.from_file(str(self.tokenizer))
        with h5py.File(path) as f:
            tokens, ends, eos = f["tokens"][:], f["document_ends"][:], f.attrs["eos_id"]
            self.assertLess(tokens.max(), f.attrs["vocab_size"])
        self.assertEqual(ends[-1], len(tokens))
        texts, begin = [], 0
        for end in ends:
            self.assertEqual(tokens[end - 1], eos)
            texts.append(tokenizer.decode(tokens[begin:end - 1].tolist(), skip_special_tokens=False))
            begin = end
        return texts

    def refused(self, code, *arguments):
        done = self.run_script(*arguments)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertEqual([p.name for p in self.dir.iterdir() if p.name.startswith("out.h5")], [])
        return done.stderr

    def test_texts_come_back(self):
        texts = ["plain\n", "carriage\r\nreturns\r\n", "NUL \0 inside", "naïve 日本語 🙂\n", " \n\t\n"]
        path, _ = self.tokenize(*(self.file(f"{i}.txt", t) for i, t in enumerate(texts)))
        self.assertEqual(self.documents(path), texts)

    def test_attributes(self):
        path, _ = self.tokenize(self.file("a.txt", "hello"))
        with h5py.File(path) as f:
            self.assertEqual(f.attrs["format"], "upmoe-tokens-1")
            self.assertEqual(f.attrs["tokenizer_sha256"], hashlib.sha256(self.tokenizer.read_bytes()).hexdigest())
            size = tokenizers.Tokenizer.from_file(str(self.tokenizer)).get_vocab_size()
            self.assertEqual((f.attrs["vocab_size"], f.attrs["eos_id"]), (size, size - 1))
            for name, dtype in (("tokens", "<u4"), ("document_ends", "<i8")):
                self.assertEqual(f[name].dtype, dtype)
                self.assertIsNone(f[name].chunks)

    def test_jsonl(self):
        lines = [{"text": "one"}, {"text": "two\nlines", "id": 3}, {"text": ""}, {"text": "\u0000 and \ud800 alone"}]
        content = "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\r\n\r\n"
        path, log = self.tokenize(self.file("a.jsonl", content))
        self.assertEqual(self.documents(path), ["one", "two\nlines", "\0 and \ufffd alone"])
        self.assertIn("1 empty documents", log)
        self.assertIn("1 invalid UTF-8", log)
        path, _ = self.tokenize(self.file("b.jsonl", '{"body": "x"}'), options=("--key", "body"))
        self.assertEqual(self.documents(path), ["x"])

    def test_invalid_utf8_and_marks(self):
        contents = (b"good \xff\xfe bad \xc3(", b"\xef\xbb\xbfmark", b"", b"\xef\xbb\xbf")
        path, log = self.tokenize(*(self.file(f"{i}.txt", c) for i, c in enumerate(contents)))
        self.assertEqual(self.documents(path), ["good \ufffd\ufffd bad \ufffd(", "mark"])
        self.assertIn("3 invalid UTF-8", log)
        self.assertIn("2 empty documents", log)

    def test_control_tokens_in_text_are_text(self):
        text = self.file("a.txt", "a<|endoftext|>b")
        path, _ = self.tokenize(text)
        with h5py.File(path) as f:
            self.assertEqual(list(f["tokens"][:]).count(f.attrs["eos_id"]), 1)
        path, _ = self.tokenize(text, options=("--parse-special",))
        with h5py.File(path) as f:
            self.assertEqual(list(f["tokens"][:]).count(f.attrs["eos_id"]), 2)

    def test_same_bytes_for_any_number_of_processes(self):
        line = json.dumps({"text": TEXT}) + "\n"
        files = [self.file("big.jsonl", line * 1300), self.file("a.txt", TEXT), self.file("b.txt", TEXT * 2)]
        self.assertGreater(files[0].stat().st_size, 4 << 20)  # several tasks
        digests = set()
        for processes in (1, 3):
            path, _ = self.tokenize(*files, out=f"p{processes}.h5", options=("--processes", processes))
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        self.assertEqual(len(digests), 1)
        with h5py.File(path) as f:
            self.assertEqual(len(f["document_ends"]), 1302)

    def test_training_is_repeatable_and_keeps_other_tokenizers(self):
        before = self.tokenizer.read_bytes()
        again = self.run_script("--train-vocab", 400, "--tokenizer", self.tokenizer, self.base / "train.txt")
        self.assertEqual((again.returncode, self.tokenizer.read_bytes()), (0, before), again.stderr)
        other = self.file("tokenizer.json", "{}")
        arguments = ("--train-vocab", 280, "--tokenizer", other, self.base / "train.txt")
        self.assertIn("another tokenizer", self.refused(2, *arguments))
        self.assertEqual(other.read_text(), "{}")
        self.assertEqual(self.run_script("--force", *arguments).returncode, 0)
        self.assertEqual(tokenizers.Tokenizer.from_file(str(other)).get_vocab_size(), 280)

    def test_usage(self):
        text = self.file("a.txt", "x")
        self.assertIn("--out", self.refused(2, "--tokenizer", self.tokenizer, text))
        self.assertIn("257", self.refused(2, "--tokenizer", self.tokenizer, "--train-vocab", 256, text))
        self.refused(2, "--tokenizer", self.tokenizer, "--out", self.dir / "out.h5")

    def test_bad_input(self):
        text, out = self.file("a.txt", "x"), ("--out", self.dir / "out.h5")
        good = ("--tokenizer", self.tokenizer, *out)
        self.assertIn("no such file", self.refused(3, *good, self.dir / "missing.txt"))
        self.assertIn("UTF-16", self.refused(3, *good, self.file("b.txt", "x".encode("utf-16"))))
        self.assertIn("no text", self.refused(3, *good, self.file("c.txt", "")))
        self.assertIn("'<eos>'", self.refused(3, *good, "--eos", "<eos>", text))
        self.assertIn("tokenizer.json", self.refused(3, "--tokenizer", self.file("t.json", "{"), *out, text))
        self.assertIn("--train-vocab", self.refused(3, "--tokenizer", self.dir / "none.json", *out, text))
        self.assertIn("folder", self.refused(3, "--tokenizer", self.tokenizer, "--out", self.dir / "no/out.h5", text))

    def test_bad_lines_are_named(self):
        good = ("--tokenizer", self.tokenizer, "--out", self.dir / "out.h5")
        for line in (b"{", b'{"text": 3}', b'{"body": "x"}', b"[1]", b'{"text": "a\0b"}', b"[" * 100000):
            path = self.file("a.jsonl", b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
            self.assertIn(f"{path}:3:", self.refused(3, *good, path))
        row = json.dumps({"text": TEXT}).encode() + b"\n"
        path = self.file("b.jsonl", row * 1200 + b"wrong\n")  # in the second task
        self.assertIn(f"{path}:1201:", self.refused(3, *good, path))

    def test_a_full_disk_leaves_the_old_file(self):
        path, _ = self.tokenize(self.file("a.txt", "old"))
        before = path.read_bytes()
        done = self.run_script("--tokenizer", self.tokenizer, "--out", path, self.file("b.txt", TEXT * 200),
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertEqual(path.read_bytes(), before)
        self.assertEqual(sorted(p.name for p in self.dir.iterdir()), ["a.txt", "b.txt", "out.h5"])


if __name__ == "__main__":
    unittest.main()
