#!/usr/bin/env python3
"""data/tokenize.py on zstd and Parquet: the same documents as of plain JSON lines, and words for what is broken."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / folder) for folder in ("launch", "data")]
import parquet_rows  # noqa: E402
import text_documents  # noqa: E402
from chat_documents import ChatChoices  # noqa: E402
from text_documents import BadInput, Choices, documents_of, plan_tasks  # noqa: E402

TEXTS = [f"document {i}\nof naïve 日本語" for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
TALK = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]


def zstd(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


class PackedTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)

    def file(self, name, content):
        (self.dir / name).write_bytes(content)
        return self.dir / name

    def parquet(self, columns, name="a.parquet", **options):
        pyarrow.parquet.write_table(pyarrow.table(columns), self.dir / name, **options)
        return self.dir / name

    @staticmethod
    def texts(path, choices=None):
        choices = choices or Choices()
        return [text for task in plan_tasks([str(path)], choices) for text, _ in documents_of(task, choices)]

    def told(self, path, choices=None):
        with self.assertRaises(BadInput) as caught:
            self.texts(path, choices)
        self.assertIn(str(path), str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def tokenize(self, *arguments):
        return subprocess.run([sys.executable, str(ROOT / "data/tokenize.py"), "--tokenizer",
                               str(self.dir / "tokenizer.json"), *map(str, arguments)], text=True, capture_output=True,
                              timeout=120, check=False)

    def assert_refused_by_the_program(self, path, words):
        made = self.tokenize("--train-vocab", 300, self.file("plain.txt", b"some text"))
        self.assertEqual(made.returncode, 0, made.stderr)
        done = self.tokenize("--out", self.dir / "out.h5", path)
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn(words, done.stderr)
        self.assertFalse((self.dir / "out.h5").exists())


class Zstd(PackedTest):
    def test_whatever_the_name_and_however_often_packed(self):
        half = len(LINES) // 2
        for name, content in {
                "a.jsonl.zst": zstd(LINES), "a": zstd(LINES, level=19), "checked.zst": zstd(LINES, write_checksum=True),
                "frames.zst": zstd(LINES[:half]) + zstd(LINES[half:]), "empty_first.zst": zstd(b"") + zstd(LINES),
                "no_size.zst": zstd(LINES, write_content_size=False), "twice.zst": zstd(gzip.compress(LINES)),
                "twice.gz": gzip.compress(zstd(LINES)), "twice.xz": lzma.compress(zstd(LINES)),
                "thrice.zst": zstd(zstd(zstd(LINES)))}.items():
            self.assertEqual(self.texts(self.file(name, content)), TEXTS, name)
        self.assertEqual(self.texts(self.file("b.txt.zst", zstd(b"plain\ntext"))), ["plain\ntext"])

    def test_a_cut_or_damaged_file_is_refused(self):
        packed = zstd(LINES, write_checksum=True)
        for length in (5, 20, len(packed) // 2, len(packed) - 1):
            self.assertIn("its zstd data is damaged or cut short", self.told(self.file("a.zst", packed[:length])))
        second = packed + packed[:-9]
        self.assertIn("ends within a frame", self.told(self.file("a.zst", second)))
        self.assertIn("zstd data is damaged", self.told(self.file("a.zst", packed + b"what is this")))
        broken = bytearray(packed)
        broken[len(packed) // 2] ^= 0xff
        self.assertIn("zstd data is damaged", self.told(self.file("a.zst", bytes(broken))))
        self.assert_refused_by_the_program(self.file("a.zst", packed[:-4]), "cut short")

    def test_little_that_unpacks_to_much_is_read_in_parts(self):
        texts = self.texts(self.file("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 3_000_000)))
        self.assertEqual((len(texts), set(texts)), (3_000_000, {"x"}))

    def test_frames_to_be_skipped(self):
        skipped = b"\x50\x2a\x4d\x18\4\0\0\0abcd"  # as pzstd puts before each of its frames
        frames = skipped + zstd(LINES[:5000]) + skipped + zstd(LINES[5000:])
        self.assertEqual(self.texts(self.file("a.zst", frames)), TEXTS)

    def test_bad_lines_are_named(self):
        self.assertIn("a.zst:3001: not valid JSON", self.told(self.file("a.zst", zstd(LINES + b"wrong\n"))))


class Parquet(PackedTest):
    def test_rows_are_documents(self):
        ids = list(range(len(TEXTS)))
        for options in ({}, {"compression": "none"}, {"compression": "zstd"}, {"row_group_size": 100},
                        {"version": "1.0"}, {"use_dictionary": False}, {"data_page_version": "2.0"}):
            path = self.parquet({"id": ids, "text": TEXTS, "other": TEXTS[::-1]}, **options)
            self.assertEqual(self.texts(path), TEXTS, options)
            self.assertEqual(self.texts(path, Choices("other")), TEXTS[::-1], options)
        large = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
        pyarrow.parquet.write_table(large, self.dir / "named.txt")
        self.assertEqual(self.texts(self.dir / "named.txt"), TEXTS)
        coded = pyarrow.array(TEXTS[:3] * 50).dictionary_encode()
        self.assertEqual(self.texts(self.parquet({"text": coded})), TEXTS[:3] * 50)

    def test_the_same_token_file_as_of_json_lines(self):
        made = []
        plain = self.file("a.jsonl", LINES)
        for file, options in ((plain, ("--train-vocab", 300)), (self.parquet({"text": TEXTS}), ()),
                              (self.parquet({"text": TEXTS}, "b.parquet", row_group_size=7), ("--processes", 2))):
            done = self.tokenize("--out", self.dir / "out.h5", *options, file)
            self.assertEqual(done.returncode, 0, done.stderr)
            made.append(hashlib.sha256((self.dir / "out.h5").read_bytes()).hexdigest())
        self.assertEqual(len(set(made)), 1)

    def test_rows_come_a_few_at_a_time(self):
        path = self.parquet({"text": TEXTS})
        blocks = list(parquet_rows.row_blocks(str(path), "text", [], 1000, 10000))
        self.assertGreater(len(blocks), 50)
        firsts = [first for _, first, _ in blocks]
        self.assertEqual(firsts, sorted(set(firsts)))
        self.assertEqual([json.loads(line)["text"] for data, _, _ in blocks for line in data.split(b"\n")], TEXTS)
        self.assertEqual(sum(consumed for _, _, consumed in blocks), path.stat().st_size)

    def test_conversations(self):
        path = self.parquet({"messages": [TALK] * 3})
        turns = [(("user", "two and two?"), False), (("assistant", "four"), True)]
        self.assertEqual([talk.turns for talk in self.texts(path, ChatChoices())], [turns] * 3)

    def test_columns_and_values_that_are_no_texts(self):
        told = self.told(self.parquet({"body": TEXTS, "id": list(range(len(TEXTS)))}))
        self.assertIn("has no column 'text', its columns are: body, id", told)
        self.assertIn("--key", told)
        told = self.told(self.parquet({"text": ["a", "b", None]}))
        self.assertIn("row 2: 'text' holds null, expected a text; leave such records out", told)
        self.assertIn("row 0: 'text' holds 1", self.told(self.parquet({"text": [1, 2]})))
        told = self.told(self.parquet({"text": [b"a"]}))
        self.assertRegex(told, "row 0: 'text' holds a value of type bytes.*column.cast")
        wrong = pyarrow.Array.from_buffers(pyarrow.string(), 2, [
            None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")])
        self.assertIn("row 1: 'text' is not UTF-8", self.told(self.parquet({"text": wrong}, use_dictionary=False)))

    def test_broken_files(self):
        whole = self.parquet({"text": TEXTS}).read_bytes()
        for cut in (whole[:500], whole[:len(whole) // 2], whole[:-1], whole[:-4] + b"PARX"):
            self.assertIn("its Parquet data is damaged", self.told(self.file("a.parquet", cut)))
        self.assert_refused_by_the_program(self.file("a.parquet", whole[:-8]), "its Parquet data is damaged")
        self.assertIn("packed with gzip; unpack it first", self.told(self.file("a.gz", gzip.compress(whole))))
        self.assertIn("leave out --as text", self.told(self.file("a.parquet", whole), Choices(kind="text")))
        self.assertEqual(self.texts(self.file("a.txt", b"PAR1 is how it begins")), ["PAR1 is how it begins"])

    def test_a_text_that_is_too_long(self):
        path = self.parquet({"text": ["a", "b" * 5000]})
        with self.assertRaises(BadInput) as caught:
            list(parquet_rows.row_blocks(str(path), "text", [], 1000, 4000))
        self.assertIn("row 1: a text of", str(caught.exception))
        self.assertLess(text_documents.TASK_BYTES, text_documents.MAX_LINE)


if __name__ == "__main__":
    unittest.main()
