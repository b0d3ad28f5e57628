#!/usr/bin/env python3
"""data/tokenize.py --chat: what templates spell, which tokens count, what is refused."""

import gzip
import json
import subprocess
import sys
import unittest
from pathlib import Path

import h5py
import tokenizers

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [str(ROOT / "tests/support")]
from tokenize_case import TokenizeCase  # noqa: E402

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "four"}, {"role": "user", "content": "and three?"},
        {"role": "assistant", "content": "seven <|im_end|>"}]
CHATML = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in TALK) + "<|endoftext|>"
ALPACA = ("Be brief.\n\n### Instruction:\ntwo and two?\n\n### Response:\nfour<|endoftext|>\n\n"
          "### Instruction:\nand three?\n\n### Response:\nseven <|im_end|><|endoftext|>")


class ChatTest(TokenizeCase):
    TEXT = "one two three four five six seven\nresponse instruction\n"

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        tokenizer = tokenizers.Tokenizer.from_file(str(cls.plain))
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        cls.chat = cls.dir / "chat.json"
        tokenizer.save(str(cls.chat))

    def tokenize(self, records, template, tokenizer, *options):
        source = self.dir / "talks.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        done = self.run_script("--tokenizer", tokenizer, "--out", self.dir / "out.h5", "--chat", "--template", template,
                               source, *options)
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

    def test_turns_of_weight_zero_do_not_count(self):
        talk = [dict(turn, weight=int(i > 2), tool_calls=None) for i, turn in enumerate(TALK)]
        done, out = self.tokenize([{"messages": talk}], "chatml", self.chat)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.read(out, self.chat)[:2], (CHATML, "seven <|im_end|><|im_end|>"))
        self.assertNotIn("has no place for", done.stderr)

    def test_a_content_of_several_texts(self):
        talk = [dict(turn, content=[{"type": "text", "text": turn["content"][:3]},
                                    {"type": "text", "text": turn["content"][3:]}]) for turn in TALK]
        done, out = self.tokenize([{"messages": talk}], "chatml", self.chat)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.read(out, self.chat)[0], CHATML)

    def test_what_of_a_turn_has_no_place_is_told(self):
        talk = [TALK[1], dict(TALK[2], reasoning_content="hm", name="b"), dict(TALK[4], name="b")]
        done, _ = self.tokenize([{"messages": talk}, {"messages": TALK}], "alpaca", self.plain)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("--template alpaca has no place for: name (2), reasoning_content (1)", done.stderr)

    def test_an_empty_file_holds_no_conversation(self):
        for name, content in (("empty.jsonl", b""), ("empty.jsonl.gz", gzip.compress(b""))):
            (self.dir / name).write_bytes(content)
            done, _ = self.tokenize([{"messages": TALK}], "alpaca", self.plain, self.dir / name)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("1 empty documents left out", done.stderr)

    def test_refusals(self):
        for record, words in (({"text": "a"}, "its keys are: text"),
                              ({"messages": "a"}, "expected an object with a list"),
                              ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
                              ({"messages": "a"}, "which holds \"a\""),
                              ({"messages": [{"from": "user", "value": "a"}]}, "its keys are: from, value"),
                              ({"messages": ["hello"]}, "with 'role' and 'content', it is none"),
                              ({"messages": [{"role": "cook", "content": "a"}]},
                               "'role' of system, user, assistant, found \"cook\""),
                              ({"messages": [{"role": ["user"], "content": "a"}]}, "found [\"user\"]"),
                              ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
                               "turn 0 of 'messages': holds 'tool_calls'"),
                              ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
                               "holds 'function_call'"),
                              ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
                               "'weight' is 0.5, expected 1, or 0"),
                              ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
                               "no turn of the assistant that counts"),
                              ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of turn 0"),
                              ({"messages": [{"role": "user", "content": []}]}, "content of turn 0"),
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
