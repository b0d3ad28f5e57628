#!/usr/bin/env python3
"""data/tokenize.py from the outside: what it writes, what it refuses, what it leaves behind."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from unittest import mock

import h5py
import tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
# data/tokenize.py itself is started, not imported
sys.path += [str(ROOT / folder) for folder in ("launch", "data", "tests/support")]
import hdf5_child  # noqa: E402
import staged_file  # noqa: E402
import text_documents  # noqa: E402
import token_file_writer  # noqa: E402
from text_documents import BadInput, Choices, documents_of, plan_tasks  # noqa: E402
from tiny_run import state_of, strace, why_no_strace  # noqa: E402

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
    def run_script(*arguments, before=(), **options):
        return subprocess.run([*before, sys.executable, str(ROOT / "data/tokenize.py"), *map(str, arguments)],
                              text=True, capture_output=True, timeout=120, check=False, **options)

    def tokenize(self, *files, out="out.h5", options=()):
        done = self.run_script("--tokenizer", self.tokenizer, "--out", self.dir / out, *options, *files)
        self.assertEqual(done.returncode, 0, done.stderr)
        return self.dir / out, done.stderr

    def file(self, name, content):
        path = self.dir / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    @staticmethod
    def texts(path, **choices):
        """The documents of one file, without a tokenizer."""
        chosen = Choices(**choices)
        return [text for task in plan_tasks([str(path)], chosen) for text, _ in documents_of(task, chosen)]

    def told(self, path, **choices):
        """The words with which a file is refused."""
        with self.assertRaises(BadInput) as refused:
            self.texts(path, **choices)
        self.assertIn(str(path), str(refused.exception))
        self.assertNotIn("\n", str(refused.exception))
        return str(refused.exception)

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
        texts = ["plain\n", "carriage\r\nreturns\r\n", "naïve 日本語 🙂\n", " \n\t\n"]
        path, _ = self.tokenize(*(self.file(f"{i}.txt", t) for i, t in enumerate(texts)))
        self.assertEqual(self.documents(path), texts)

    def test_attributes(self):
        path, _ = self.tokenize(self.file("a.txt", "hello"))
        with h5py.File(path) as f:
            # Of fixed length: what lies in the file's heap is read by the HDF5 library without checking.
            self.assertEqual(f.attrs["format"], b"upmoe-tokens-1")
            self.assertEqual(f.attrs["tokenizer_sha256"],
                             hashlib.sha256(self.tokenizer.read_bytes()).hexdigest().encode())
            size = tokenizers.Tokenizer.from_file(str(self.tokenizer)).get_vocab_size()
            self.assertEqual((f.attrs["vocab_size"], f.attrs["eos_id"]), (size, size - 1))
            for name, dtype in (("tokens", "<u4"), ("document_ends", "<i8")):
                self.assertEqual(f[name].dtype, dtype)
                self.assertIsNone(f[name].chunks)

    def test_jsonl(self):
        lines = [{"text": "one"}, {"text": "two\nlines", "id": 3}, {"text": ""}, {"text": "\u0000 and \ud800 alone"}]
        replacing = ("--replace-invalid",)
        content = "\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\r\n\r\n"
        path, log = self.tokenize(self.file("a.jsonl", content), options=replacing)
        self.assertEqual(self.documents(path), ["one", "two\nlines", "\0 and \ufffd alone"])
        self.assertIn("1 empty documents", log)
        self.assertIn("1 invalid UTF-8", log)
        path, _ = self.tokenize(self.file("b.jsonl", '{"body": "x"}'), options=("--key", "body"))
        self.assertEqual(self.documents(path), ["x"])

    def test_invalid_utf8_and_marks(self):
        contents = (b"good \xff\xfe bad \xc3(", b"\xef\xbb\xbfmark", b"", b"\xef\xbb\xbf")
        files = [self.file(f"{i}.txt", c) for i, c in enumerate(contents)]
        path, log = self.tokenize(*files, options=("--replace-invalid",))
        self.assertEqual(self.documents(path), ["good \ufffd\ufffd bad \ufffd(", "mark"])
        self.assertIn("3 invalid UTF-8", log)
        self.assertIn("2 empty documents", log)

    def test_what_is_not_utf8_is_refused_with_its_place(self):
        self.assertIn("byte 5: not UTF-8", self.told(self.file("a.txt", b"good \xff bad")))
        self.assertIn(":2, byte 9 of the line", self.told(self.file(
            "a.jsonl", b'{"text": "x"}\n{"text":"\xff"}\n')))
        self.assertIn("half a character", self.told(self.file("b.jsonl", rb'{"text": "\ud800"}')))
        self.assertIn("byte 1 is zero", self.told(self.file("c.txt", b"a\0b")))
        late = b"text " * 20000 + b"\0"  # behind what is looked at first
        self.assertIn("byte 100000 is zero", self.told(self.file("d.txt", late)))

    RECORDS = [{"text": "one"}, {"text": "two\nlines"}]
    LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()

    # Whatever the name says.
    def test_a_files_kind_is_read_from_its_bytes(self):
        lines = self.LINES
        same = {"a.jsonl": lines, "a.json": lines, "a.txt": lines, "a": lines, "marked.json": b"\xef\xbb\xbf" + lines,
                "crlf.jsonl": lines.replace(b"\n", b"\r\n"), "array.json": json.dumps(self.RECORDS).encode(),
                "array.txt": json.dumps(self.RECORDS, indent=2).encode(),
                "a.jsonl.gz": gzip.compress(lines), "a.bin": gzip.compress(lines), "a.jsonl.bz2": bz2.compress(lines),
                "a.json.xz": lzma.compress(lines), "twice.gz": gzip.compress(bz2.compress(lines)),
                "members.gz": gzip.compress(lines[:20]) + gzip.compress(lines[20:])}
        for name, content in same.items():
            self.assertEqual(self.texts(self.file(name, content)), [r["text"] for r in self.RECORDS], name)
        plain = {"a.txt.gz": (gzip.compress(b"plain"), "plain"), "b.txt": (b"[a list] of words", "[a list] of words"),
                 "c.txt": (b"{braces} first", "{braces} first"), "d.txt": (b"PARENT", "PARENT"), "e": (b"GIF8", "GIF8"),
                 "f.txt": (b"BZhello", "BZhello"), "g.txt": (b"ORCHID", "ORCHID")}
        for name, (content, text) in plain.items():
            self.assertEqual(self.texts(self.file(name, content)), [text], name)
        self.assertEqual(self.texts(self.file("h.jsonl", lines), kind="text"), [lines.decode()])
        path, _ = self.tokenize(self.file("i.gz", gzip.compress(lines)), options=("--as", "text"))
        self.assertEqual(self.documents(path), [lines.decode()])

    def test_what_is_no_text_is_refused_with_its_cure(self):
        packed = gzip.compress(self.LINES * 50)
        files = {"zstd": b"\x28\xb5\x2f\xfd\0\0", "Parquet": b"PAR1\x15\0\x15", "zip": b"PK\x03\x04\x14\0",
                 "PDF": b"%PDF-1.7\n", "HDF5": b"\x89HDF\r\n\x1a\n\0", "safetensors": b"\x40" + b"\0" * 7 + b'{"a"',
                 "UTF-16": "text".encode("utf-16"),
                 "UTF-16LE": "text".encode("utf-16-le"), "UTF-16BE": "text".encode("utf-16-be"),
                 "UTF-32": "text".encode("utf-32"), "tar archive": b"name" + b"\0" * 253 + b"ustar\0" + b"00",
                 "not text": bytes(range(256)), "damaged or cut short": packed[:-20],
                 "is damaged": packed[:14] + b"\xff\xff\xff" + packed[17:]}
        for words, content in files.items():
            for name in ("a.txt", "a.jsonl"):
                self.assertIn(words, self.told(self.file(name, content)))
        self.refused(3, "--tokenizer", self.tokenizer, "--out", self.dir / "out.h5", self.dir / "a.txt")

    def test_records_without_their_text_name_what_they_have(self):
        told = self.told(self.file("a.jsonl", b'{"body": "x", "id": 1}'))
        self.assertIn("its keys are: body, id", told)
        self.assertIn("--key", told)
        self.assertIn("record 1", self.told(self.file("a.json", b'[{"text": "x"}, {"body": "y"}]')))
        self.assertIn("--as text", self.told(self.file("package.json", b'{\n "name": "x"\n}')))

    def test_packed_files_give_the_same_bytes(self):
        lines = (json.dumps({"text": TEXT}) + "\n").encode() * 1500
        digests = set()
        for name, content in (("a.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines, 1))):
            path, _ = self.tokenize(self.file(name, content), options=("--processes", 2))
            digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        self.assertEqual(len(digests), 1)
        broken = self.file("c.jsonl.gz", gzip.compress(lines + b"wrong\n", 1))  # in the second task
        self.assertIn(f"{broken}:1501:", self.told(broken))

    def test_a_folder_stands_for_its_tokenizer(self):
        (self.dir / "model").mkdir()
        text = self.file("a.txt", "x")
        told = self.refused(3, "--tokenizer", self.dir / "model", "--out", self.dir / "out.h5", text)
        self.assertIn("model/tokenizer.json: no such file", told)
        (self.dir / "model/tokenizer.json").write_bytes(self.tokenizer.read_bytes())
        done = self.run_script("--tokenizer", self.dir / "model", "--out", self.dir / "out.h5", text)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_inputs_are_not_overwritten(self):
        text = self.file("a.txt", "precious")
        self.assertIn("overwritten", self.refused(2, "--tokenizer", self.tokenizer, "--out", text, text))
        self.assertEqual(text.read_text(), "precious")
        self.refused(2, "--tokenizer", self.tokenizer, "--out", self.tokenizer, text)
        self.assertTrue(self.tokenizer.read_text().startswith("{"))

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
        for line in (b"{", b'{"text": 3}', b'{"body": "x"}', b"[1]", b"[" * 100000):
            path = self.file("a.jsonl", b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')
            self.assertIn(f"{path}:3:", self.refused(3, *good, path))
        row = json.dumps({"text": TEXT}).encode() + b"\n"
        for line in (b"wrong", b'{"text": "a\0b"}'):
            path = self.file("b.jsonl", row * 1200 + line + b"\n")  # in the second task
            self.assertIn(f"{path}:1201:", self.refused(3, *good, path))

    def test_a_line_that_is_too_long_is_not_read_whole(self):
        line = b'{"text": "x"}\n'
        path = self.file("long.jsonl", line * 3 + b'{"text": "' + b"y" * 500 + b'"}\n' + line)
        packed = self.file("long.jsonl.gz", gzip.compress(path.read_bytes()))
        with mock.patch.multiple(text_documents, TASK_BYTES=50, MAX_LINE=200):
            for file in (path, packed):
                with self.assertRaisesRegex(BadInput, ":4: a line of more than 200 bytes"):
                    list(plan_tasks([str(file)], Choices()))

    def test_a_full_disk_leaves_the_old_file(self):
        path, _ = self.tokenize(self.file("a.txt", "old"))
        before = path.read_bytes()
        done = self.run_script("--tokenizer", self.tokenizer, "--out", path, self.file("b.txt", TEXT * 200),
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertEqual(path.read_bytes(), before)
        self.assertEqual(sorted(p.name for p in self.dir.iterdir()), ["a.txt", "b.txt", "out.h5"])

    def test_the_library_may_fail_at_any_byte(self):
        path, whole, count = self.dir / "t.h5", self.dir / "whole.h5", 3000
        raw = self.file("raw", b"".join(i.to_bytes(4, "little") for i in range(count)))

        def write(at, limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            token_file_writer.write_token_file(str(at), str(raw), count, [count], {
                "format": token_file_writer.FORMAT, "vocab_size": count, "eos_id": 0, "tokenizer_sha256": "0" * 64})
        hdf5_child.in_child(str(whole), lambda: write(whole, 1 << 20))
        for limit in range(0, whole.stat().st_size, 131):
            path.unlink(missing_ok=True)
            with self.assertRaises(OSError) as told:
                hdf5_child.in_child(str(path), lambda: write(path, limit))
            self.assertEqual(told.exception.filename, str(path))
        with self.assertRaisesRegex(OSError, "by signal 11"):
            hdf5_child.in_child(str(path), lambda: os.kill(os.getpid(), signal.SIGSEGV))
        raw.write_bytes(b"1234")
        with self.assertRaisesRegex(OSError, "lost its end"):
            hdf5_child.in_child(str(path), lambda: write(path, 1 << 20))

    def test_what_a_killed_job_left_is_cleared_by_the_next(self):
        text, partial = self.file("a.txt", TEXT * 3000), self.dir / "out.h5.upmoe-partial"
        job = subprocess.Popen([sys.executable, ROOT / "data/tokenize.py", "--tokenizer", self.tokenizer, "--out",
                                self.dir / "out.h5", "--processes", "2", text], stderr=subprocess.DEVNULL)
        processes = Path(f"/proc/{job.pid}/task/{job.pid}/children")
        end = time.monotonic() + 60
        while not (partial.exists() and len(started := processes.read_text().split()) == 2):
            self.assertIsNone(job.poll())
            self.assertLess(time.monotonic(), end)
        job.send_signal(signal.SIGSTOP)
        self.assertIn("another job", self.ends_with(2, self.file("b.txt", "b")))
        job.kill()
        job.wait()
        while any(state_of(pid) != "Z" for pid in started):  # they end with it
            self.assertLess(time.monotonic(), end)
        self.assertTrue(partial.exists())
        self.tokenize(self.file("b.txt", "b"))
        self.assertEqual(sorted(p.name for p in self.dir.iterdir()), ["a.txt", "b.txt", "out.h5"])

    def ends_with(self, status, *arguments, before=()):
        done = self.run_script("--tokenizer", self.tokenizer, "--out", self.dir / "out.h5", *arguments, before=before)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stderr

    def test_a_folder_of_somebody_else_stays(self):
        partial = self.dir / "out.h5.upmoe-partial"
        partial.mkdir()
        (partial / "mine").write_text("thesis")
        self.assertIn("move it away", self.ends_with(2, self.file("a.txt", "a")))
        self.assertEqual((partial / "mine").read_text(), "thesis")

    def test_a_whole_file_is_no_failure_because_its_name_is_not_confirmed(self):
        if reason := why_no_strace():
            self.skipTest(reason)
        said = self.ends_with(0, self.file("a.txt", TEXT),
                              before=strace("-P", self.dir, "-e", "inject=fsync:error=EIO"))
        self.assertIn("did not confirm its name", said)
        self.assertEqual(sorted(p.name for p in self.dir.iterdir()), ["a.txt", "out.h5"])

    def test_what_could_not_be_removed_is_cleared_by_the_next(self):
        if reason := why_no_strace():
            self.skipTest(reason)
        text = self.file("a.txt", TEXT)
        self.ends_with(0, text, before=strace("-e", "inject=unlinkat,rmdir:error=EIO"))
        self.assertTrue((self.dir / "out.h5.upmoe-partial").exists())
        self.ends_with(0, text)
        self.assertEqual(sorted(p.name for p in self.dir.iterdir()), ["a.txt", "out.h5"])

    def test_a_clean_up_that_fails_is_no_failure(self):
        refused = PermissionError(13, "refused")
        with mock.patch.object(staged_file.shutil, "rmtree", side_effect=refused), \
                mock.patch.object(staged_file.os, "rmdir", side_effect=refused):
            with staged_file.StagedFile(str(self.dir / "out"), self.fail) as staged:
                Path(staged.part("whole")).write_text("content")
                staged.commit("whole")
                os.close(staged.lock)  # so that closing it is refused too
        self.assertEqual((self.dir / "out").read_text(), "content")

    def test_a_file_that_cannot_be_closed_is_no_unexpected_failure(self):
        def fails():
            raise RuntimeError("Can't decrement id ref count (unable to close file, errno = 28, ...)")  # as h5py does
        with self.assertRaisesRegex(OSError, "unable to close") as caught:
            hdf5_child.in_child(str(self.dir / "x.h5"), fails)
        self.assertEqual((caught.exception.errno, caught.exception.filename), (28, str(self.dir / "x.h5")))


if __name__ == "__main__":
    unittest.main()
