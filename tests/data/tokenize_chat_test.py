#!/usr/bin/env python3
"""data/tokenize.py --chat: what templates spell, which tokens count, what is refused."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "four"}, {"role": "user", "content": "and three?"},
        {"role": "assistant", "content": "seven <|im_end|>"}]
CHATML = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TALK) + "<|endoftext|>"
ALPACA = ("Be brief.\n\n### Instruction:\ntwo and two?\n\n### Response:\nfour<|endoftext|>\n\n"
          "### Instruction:\nand three?\n\n### Response:\nseven <|im_end|><|endoftext|>")


class ChatTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dir = Path(cls.folder.name)
        (cls.dir / "text.txt").write_text("one two three four five six seven\nresponse instruction\n" * 50)
        cls.plain = cls.dir / "plain.json"
        made = cls.run_script("--train-vocab", 300, "--tokenizer", cls.plain, cls.dir / "text.txt")
        assert made.returncode == 0, made.stderr
        tokenizer = tokenizers.Tokenizer.from_file(str(cls.plain))
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        cls.chat = cls.dir / "chat.json"
        tokenizer.save(str(cls.chat))

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @staticmethod
    def run_script(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "data/tokenize.py"), *map(str, arguments)], text=True,
                              capture_output=True, timeout=120, check=False)

    def tokenize(self, records, template, tokenizer, *options):
        source = self.dir / "talks.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        done = self.run_script("--tokenizer", tokenizer, "--out", self.dir / "out.h5", "--chat", source, "--template",
                               template, *options)
        return done, self.dir / "out.h5"

    def read(self, path, tokenizer):
        """(text of the whole file, text of what counts, ends of its documents)"""
        with h5py.File(path) as file:
            tokens, mask, ends = (file[name][:] for name in ("tokens", "loss_mask", "document_ends"))
        self.assertEqual(len(tokens), len(mask))
        decode = tokenizers.Tokenizer.from_file(str(tokenizer)).decode
        return (decode(tokens.tolist(), skip_special_tokens=False),
                decode(tokens[mask == 1].tolist(), skip_special_tokens=False), ends.tolist())

    def test_chatml(self):
        done, out = self.tokenize([{"messages": TALK}] * 2, "chatml", self.chat)
        self.assertEqual(done.returncode, 0, done.stderr)
        whole, counted, ends = self.read(out, self.chat)
        self.assertEqual(whole, CHATML * 2)
        self.assertEqual(counted, "four<|im_end|>seven <|im_end|><|im_end|>" * 2)
        self.assertEqual(len(ends), 2)
        self.assertIn("targets that count", done.stderr)

    def test_a_content_cannot_end_its_turn(self):
        _, out = self.tokenize([{"messages": TALK}], "chatml", self.chat)
        end = tokenizers.Tokenizer.from_file(str(self.chat)).token_to_id("<|im_end|>")
        with h5py.File(out) as file:
            self.assertEqual((file["tokens"][:] == end).sum(), len(TALK))

    def test_alpaca_needs_no_control_tokens(self):
        done, out = self.tokenize([{"talk": TALK}], "alpaca", self.plain, "--key", "talk")
        self.assertEqual(done.returncode, 0, done.stderr)
        whole, counted, _ = self.read(out, self.plain)
        self.assertEqual(whole, ALPACA)
        self.assertEqual(counted, "four<|endoftext|>seven <|im_end|><|endoftext|>")

    def test_a_last_turn_of_the_user_ends_its_document_without_counting(self):
        _, out = self.tokenize([{"messages": TALK[:4]}], "alpaca", self.plain)
        whole, counted, _ = self.read(out, self.plain)
        self.assertTrue(whole.endswith("and three?<|endoftext|>"), whole)
        self.assertEqual(counted, "four<|endoftext|>")

    def test_talks_to_try_it_with(self):
        outcomes = []
        for out in ("talks_a.jsonl", "talks_b.jsonl"):
            subprocess.run([sys.executable, str(ROOT / "launch/make_talks.py"), "--talks", "50", "--out",
                            str(self.dir / out)], check=True, timeout=120)
            outcomes.append((self.dir / out).read_text())
        self.assertEqual(*outcomes)
        done, out = self.tokenize([json.loads(line) for line in outcomes[0].splitlines()], "alpaca", self.plain)
        self.assertEqual(done.returncode, 0, done.stderr)
        whole, counted, ends = self.read(out, self.plain)
        self.assertEqual(len(ends), 50)
        self.assertIn(" plus ", counted)
        self.assertNotIn("###", counted)
        self.assertIn("### Response:", whole)

    def test_same_bytes_for_any_number_of_processes(self):
        outcomes = []
        for processes in (1, 3):
            _, out = self.tokenize([{"messages": TALK}] * 40, "alpaca", self.plain, "--processes", processes)
            outcomes.append(out.read_bytes())
        self.assertEqual(*outcomes)

    def test_refusals(self):
        for record, words in (({"text": "a"}, "its keys are: text"),
                              ({"messages": "a"}, "expected an object with a list"),
                              ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
                              ({"messages": [{"role": "cook", "content": "a"}]}, "'role' of system, user, assistant"),
                              ({"messages": [{"role": "user", "content": 3}]}, "content of turn 0")):
            done, _ = self.tokenize([{"messages": TALK}, record], "alpaca", self.plain)
            self.assertEqual(done.returncode, 3, done.stderr)
            self.assertIn("talks.jsonl:2", done.stderr)
            self.assertIn(words, done.stderr)
        done, _ = self.tokenize([{"messages": TALK}], "chatml", self.plain)
        self.assertEqual(done.returncode, 3)
        self.assertIn("no token <|im_end|> and <|im_start|>", done.stderr)
        self.assertIn("--template alpaca", done.stderr)
        for options in (["--chat"], ["--template", "alpaca"], ["--chat", "--template", "alpaca", "--as", "text"]):
            done = self.run_script("--tokenizer", self.plain, "--out", self.dir / "out.h5", *options,
                                   self.dir / "text.txt")
            self.assertEqual(done.returncode, 2, done.stderr)


if __name__ == "__main__":
    unittest.main()
