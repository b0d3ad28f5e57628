"""`upmoe inspect --routing`: what tokens are made of, the command over a small mixture, and its picture. Needs
UPMOE_BINARY, and a Python with tokenizers and matplotlib.
"""

import json
import sys
import unittest

import cli_test
import numpy as np
import tokenizers
from cli_test import ROOT, upmoe

sys.path += [str(ROOT / "launch"), str(ROOT / "data")]
import routing_picture  # noqa: E402
import text_codec  # noqa: E402


def write_tokenizer(path, words):
    """Each word a token; <end> is a control token behind them."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path))


class Classes(unittest.TestCase):
    def test_of_texts(self):
        for text, token, name in ((" the", "\u0120the", "letters"), ("\u00e9t\u00e9", "x", "letters"),
                                  ("42", "42", "digits"), (" ==", "x", "punctuation"), ("\u20ac", "x", "punctuation"),
                                  ("\n\n", "x", "whitespace"), ("", "\u2581", "whitespace"),
                                  ("", "zz", "other"), ("a1", "a1", "other"),
                                  ("\ufffd", "x", "other")):
            self.assertEqual(text_codec.class_of(text, token), name, text)


class Picture(unittest.TestCase):
    def test_lift_is_beside_the_load_of_all(self):
        found = routing_picture.lift([[6, 2, 0], [2, 2, 0], [0, 0, 0]])
        np.testing.assert_allclose(found[0, :2], np.log2([0.75 / (8 / 12), 0.25 / (4 / 12)]))
        np.testing.assert_allclose(found[1, :2], np.log2([0.5 / (8 / 12), 0.5 / (4 / 12)]))
        self.assertTrue(np.isnan(found[:, 2]).all())  # an expert that nobody chose
        self.assertTrue(np.isnan(found[2]).all())     # a group without tokens
        self.assertEqual(routing_picture.lift([[1, 0], [0, 1]])[0, 1], -routing_picture.REACH)

    def test_layers_are_whole_numbers(self):
        one = {"first": 0.3, "first_by_chance": 0.2, "overlap": 0.5, "overlap_by_chance": 0.4, "pairs": 9}
        figure, ax = routing_picture.plt.subplots()
        self.addCleanup(routing_picture.plt.close, figure)
        routing_picture.draw_repeats(ax, {"layers": [{"layer": i, "repeats": [one]} for i in range(2)]})
        self.assertTrue(all(float(tick).is_integer() for tick in ax.get_xticks()), ax.get_xticks())


class Command(cli_test.CliTest):
    def counted(self, *arguments):
        done = upmoe("inspect", self.model, *arguments, "--routing", "--seq-len", 16, "--sequences", 5, "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_counts_by_source_position_and_class(self):
        other = self.write_tokens("other.h5", np.arange(500) * 7 % 101)
        found = self.counted(self.tokens, other)
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        self.assertEqual([(s["name"], s["sequences"], s["tokens"]) for s in found["sources"]],
                         [("tokens", 5, 80), ("other", 5, 80)])
        self.assertIn("frequency", found["classes_by"])
        self.assertEqual(found["experts"], config["num_experts"])
        for layer in found["layers"]:
            whole = 160 * config["num_experts_per_tok"]
            for key in ("by_source", "by_position", "by_class"):
                self.assertEqual(np.sum(layer[key]), whole, key)
                self.assertEqual(np.sum(layer[key], axis=0).tolist(), layer["assignments"])
            self.assertEqual([one["pairs"] for one in layer["repeats"]], [75, 75])
            for one in layer["repeats"]:
                self.assertTrue(0 <= one["first"] <= 1 and 0 < one["overlap_by_chance"] <= 1)
        loss = json.loads(upmoe("eval", self.model, "--data", other, "--seq-len", 16, "--sequences", 5,
                                "--device", "cpu").stdout)["loss"]
        self.assertAlmostEqual(found["sources"][1]["loss"], loss, places=6)

    def test_classes_of_a_tokenizer_and_the_picture(self):
        words = [f"w{'abcdefghij'[i % 10] * (i // 10 + 1)}" for i in range(50)] + [str(i) for i in range(30)] + list(
            "!?.,;:()[]{}+-*/<>=&")
        write_tokenizer(self.model / "tokenizer.json", words)
        found = self.counted(self.tokens, "--out", self.folder / "seen")
        self.assertIn("tokenizer.json", found["classes_by"])
        self.assertEqual({one["name"]: one["tokens"] for one in found["classes"]},
                         {"letters": 50, "digits": 30, "punctuation": 0, "whitespace": 0, "special": 0, "other": 0})
        self.assertEqual(json.loads((self.folder / "seen/routing.json").read_text(encoding="utf-8")), found)
        self.assertTrue((self.folder / "seen/routing.png").read_bytes().startswith(b"\x89PNG"))
        said = upmoe("inspect", "--routing", self.model, self.tokens, "--seq-len", 16)
        self.assertRegex(said.stdout, r"(?m)^layer +most +least +idle")

    def test_what_cannot_be(self):
        self.refused(2, ["give token files"], "inspect", self.model, "--routing")
        self.refused(2, ["for --routing"], "inspect", self.model, self.tokens)
        self.refused(2, ["not together"], "inspect", self.model, self.tokens, "--routing", "--verify")
        self.refused(3, ["nowhere.h5"], "inspect", self.model, self.folder / "nowhere.h5", "--routing")


if __name__ == "__main__":
    unittest.main()
