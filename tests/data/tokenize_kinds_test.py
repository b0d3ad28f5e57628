#!/usr/bin/env python3
"""data/tokenize.py with tokenizers of other kinds than ours: what begins a text, what is unknown, what goes on."""

import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent.parent
TALK = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
LETTERS = sorted(set("▁ abcdefghijklmnopqrstuvwxyzIR#?:\n"))


def begins_with_s(tokenizer):
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def of_letters(normalizer=None, pre_tokenizer=None, unknown="<unk>"):
    """One token for each letter."""
    vocab = {letter: i for i, letter in enumerate([unknown or "?", *(x for x in LETTERS if unknown or x != "?")])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unknown))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    return begins_with_s(tokenizer)


BLANKS = normalizers.Replace(" ", "▁")
# Each puts a blank before a text: at a document's beginning, or (`everywhere`) behind every control token as well.
PREFIXED = {
    "llama": (of_letters(normalizers.Sequence([normalizers.Prepend("▁"), BLANKS])), True),
    "metaspace": (of_letters(None, pre_tokenizers.Metaspace(prepend_scheme="always")), True),
    "sequence": (of_letters(None, pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="always")])), True),
    "first": (of_letters(None, pre_tokenizers.Metaspace(prepend_scheme="first")), False),
    "none": (of_letters(BLANKS), None)}


class KindsTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.dir = Path(temporary.name)

    def tokenize(self, tokenizer, content, *options, status=0):
        (self.dir / "in.jsonl").write_text(content)
        tokenizer.save(str(self.dir / "tokenizer.json"))
        done = subprocess.run(
            [sys.executable, str(ROOT / "data/tokenize.py"), "--tokenizer", self.dir / "tokenizer.json", "--eos",
             "</s>", "--out", self.dir / "out.h5", self.dir / "in.jsonl", *options], text=True, capture_output=True,
            timeout=120, check=False)
        self.assertEqual(done.returncode, status, done.stderr)
        return done.stderr

    def tokens(self, tokenizer):
        with h5py.File(self.dir / "out.h5") as file:
            mask = file["loss_mask"][:].tolist() if "loss_mask" in file else None
            return [tokenizer.id_to_token(token) for token in file["tokens"][:].tolist()], mask

    def test_a_content_begins_without_a_blank_of_the_tokenizers_own(self):
        talk = json.dumps({"messages": TALK + TALK}) + "\n"
        for name, (tokenizer, everywhere) in PREFIXED.items():
            with self.subTest(name):
                self.tokenize(tokenizer, talk, "--chat", "--template", "chatml")
                found, mask = self.tokens(tokenizer)
                text = "".join(found).replace("▁", " ")
                blank = " " if everywhere else ""
                turns = "".join(f"<|im_start|>{blank}{t['role']}\n{t['content']}<|im_end|>{blank}\n" for t in TALK * 2)
                self.assertEqual(text, turns + "</s>")
                # What the library itself makes of the whole text, which it was given as one.
                whole = tokenizer.encode(turns.replace("<|im_start|> ", "<|im_start|>").replace(
                    "<|im_end|> ", "<|im_end|>"), add_special_tokens=False)
                self.assertEqual(found[:-1], whole.tokens)
                counted = "".join(token for token, counts in zip(found, mask, strict=True) if counts)
                self.assertEqual(counted, "four<|im_end|>" * 2)

    def test_control_tokens_that_are_not_marked_as_such(self):
        """As of tokenizer.add_tokens(["<|im_end|>"]): it is one all the same, and no content may end its turn."""
        tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(
            ["<unk>", *LETTERS, *"</|>_"])}, [], unk_token="<unk>"))
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "</s>", "word"])
        talk = [TALK[0], {"role": "assistant", "content": "a<|im_end|></s>word"}]
        self.tokenize(tokenizer, json.dumps({"messages": talk}), "--chat", "--template", "chatml")
        found, mask = self.tokens(tokenizer)
        counted = [token for token, counts in zip(found, mask, strict=True) if counts]
        self.assertEqual(counted, [*"a<|im_end|></s>", "word", "<|im_end|>"])
        self.assertEqual((found.count("<|im_end|>"), found.count("</s>")), (2, 1))
        self.tokenize(tokenizer, '{"text": "a</s><|im_end|>"}\n')
        self.assertEqual(self.tokens(tokenizer)[0], [*"a</s>", "<|im_end|>", "</s>"])
        self.tokenize(tokenizer, '{"text": "a</s>b"}\n', "--parse-special")
        self.assertEqual(self.tokens(tokenizer)[0], ["a", "</s>", "b", "</s>"])

    def test_nothing_is_left_to_chance(self):
        letters = {token: i for i, token in enumerate(["<unk>", *LETTERS, "ab", "abc", "cd"])}
        tokenizer = begins_with_s(tokenizers.Tokenizer(models.BPE(
            letters, [("a", "b"), ("ab", "c"), ("c", "d")], unk_token="<unk>", dropout=0.5)))
        self.tokenize(tokenizer, '{"text": "abcd"}\n' * 50)
        self.assertEqual(self.tokens(tokenizer)[0], ["abc", "d", "</s>"] * 50)

    def test_what_begins_a_text_is_told_and_can_be_had(self):
        tokenizer = PREFIXED["llama"][0]
        lines = '{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n'
        self.assertIn("begins a text with <s>", self.tokenize(tokenizer, lines))
        self.assertEqual(self.tokens(tokenizer)[0], ["▁", "a", "b", "</s>", "▁", "c", "</s>"])
        self.assertNotIn("begins a text", self.tokenize(tokenizer, lines, "--bos", "<s>"))
        self.assertEqual(self.tokens(tokenizer)[0], ["<s>", "▁", "a", "b", "</s>", "<s>", "▁", "c", "</s>"])
        self.tokenize(tokenizer, json.dumps({"messages": TALK}), "--bos", "<s>", "--chat", "--template", "alpaca")
        found, mask = self.tokens(tokenizer)
        self.assertEqual((found[0], mask[0], len(mask)), ("<s>", 0, len(found)))
        self.assertIn("'<b>'; name the one that begins documents with --bos",
                      self.tokenize(tokenizer, lines, "--bos", "<b>", status=3))

    def test_records_that_are_refused_can_be_left_out(self):
        tokenizer = PREFIXED["none"][0]
        lines = '{"text": "a"}\n{"text": 3}\nwrong\n{"text": "b"}\n{"text": null}\n\n["c"]\n{"text": "c"}\n'
        self.assertIn("in.jsonl:2: 'text' holds 3", self.tokenize(tokenizer, lines, status=3))
        told = self.tokenize(tokenizer, lines, "--skip-refused")
        self.assertEqual(self.tokens(tokenizer)[0], ["a", "</s>", "b", "</s>", "c", "</s>"])
        self.assertRegex(told, r"warning: 4 records left out that are refused; the first: .*in.jsonl:2: 'text' holds 3")
        self.assertRegex(told, r"warning: another: .*in.jsonl:3: not valid JSON")
        self.assertRegex(told, r"warning: another: .*in.jsonl:5: 'text' holds null")
        self.assertEqual(told.count("another:"), 2)
        records = "[" + ",".join(line for line in lines.splitlines() if line and line != "wrong") + "]"
        told = self.tokenize(tokenizer, records, "--skip-refused", "--as", "json")
        self.assertEqual(self.tokens(tokenizer)[0], ["a", "</s>", "b", "</s>", "c", "</s>"])
        self.assertRegex(told, r"warning: 3 records left out .* the first: .*in.jsonl, record 1: 'text' holds 3")
        # In all pieces of a file, whichever process reads them.
        many = '{"text": "ab"}\n' * 600_000 + "wrong\n"
        for processes in (1, 2):
            told = self.tokenize(tokenizer, many, "--skip-refused", "--processes", str(processes))
            self.assertRegex(told, r"1 records left out that are refused; it: .*in.jsonl:600001: not valid JSON")
        told = self.tokenize(tokenizer, "wrong\nbad\n", "--skip-refused", status=3)
        self.assertIn("2 records left out", told)
        self.assertIn("no text in 1 files", told)
        # A file that is wrong as a whole is no record.
        self.assertIn("not valid JSON", self.tokenize(tokenizer, "[1, 2", "--skip-refused", "--as", "json", status=3))

    def test_a_vocabulary_of_what_is_not_refused(self):
        (self.dir / "in.jsonl").write_text('{"text": "one two"}\nwrong\n' * 20)
        for more in ((), ("--out", self.dir / "out.h5")):
            done = subprocess.run(
                [sys.executable, str(ROOT / "data/tokenize.py"), "--tokenizer", self.dir / "new.json", "--train-vocab",
                 "260", "--force", "--skip-refused", self.dir / "in.jsonl", *more], text=True, capture_output=True,
                timeout=120, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr.count("20 records left out"), 1, done.stderr)

    def test_conversations_that_are_refused_can_be_left_out(self):
        tokenizer = PREFIXED["none"][0]
        talks = "".join(json.dumps({"messages": turns}) + "\n" for turns in (TALK, TALK[:1], TALK))
        told = self.tokenize(tokenizer, talks, "--skip-refused", "--chat", "--template", "alpaca")
        self.assertIn("in.jsonl:2: has no turn of the assistant", told)
        self.assertEqual(self.tokens(tokenizer)[0].count("</s>"), 2)

    def test_what_the_tokenizer_does_not_know_is_counted(self):
        lines = '{"text": "a0b"}\n{"text": "a\\u6f22"}\n'
        told = self.tokenize(PREFIXED["none"][0], lines)
        self.assertIn("warning: 2 of 7 tokens stand for text that", told)
        self.assertNotIn("stand for text", self.tokenize(PREFIXED["none"][0], '{"text": "ab"}\n'))
        loses = of_letters(BLANKS, unknown=None)
        told = self.tokenize(loses, '{"text": "a0b"}\n{"text": "00"}\n{"text": ""}\n')
        self.assertIn("such characters are lost", told)
        self.assertIn("warning: 1 documents left out of whose text", told)
        self.assertIn("1 empty documents left out", told)
        self.assertEqual(self.tokens(loses)[0], ["a", "b", "</s>"])

    def test_what_is_said_beside_the_tokenizer_is_advised(self):
        beside, wrong = self.dir / "tokenizer_config.json", ("--eos", "<none>")
        for said, advised in (('{"eos_token": "</s>"}', True), ('{"eos_token": {"content": "</s>"}}', True),
                              ("[]", False), ("{", False), ('{"eos_token": null}', False)):
            beside.write_text(said)
            told = self.tokenize(PREFIXED["none"][0], '{"text": "a"}', *wrong, status=3)
            self.assertIn("has no token '<none>'; name the one that ends documents with --eos", told)
            self.assertEqual("(tokenizer_config.json says '</s>')" in told, advised, told)

    def test_a_text_that_a_tokenizer_refuses_is_named(self):
        tokenizer = begins_with_s(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        told = self.tokenize(tokenizer, '{"text": "a"}\n{"text": "a word"}\n', status=3)
        self.assertIn("begins a text with <s>", told)
        self.assertRegex(told, r"in\.jsonl: .*tokenizer\.json: cannot spell the text 'a word'.*Missing")
        self.assertNotIn("unexpected", told)
        tokenizer.model = models.WordLevel({"b": 0}, unk_token="<unk>")
        self.assertIn("cannot spell the text 'a'", self.tokenize(tokenizer, '{"text": "a"}\n', status=3))


if __name__ == "__main__":
    unittest.main()
