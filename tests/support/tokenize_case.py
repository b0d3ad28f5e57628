"""Tests of data/tokenize.py from the outside that share a folder and a small tokenizer."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class TokenizeCase(unittest.TestCase):
    """`dir`, with plain.json, which was trained on text.txt, lines of TEXT."""
    TEXT = ""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.dir = Path(cls.folder.name)
        cls.plain = cls.dir / "plain.json"
        (cls.dir / "text.txt").write_text(cls.TEXT * 50)
        made = cls.run_script("--train-vocab", 300, "--tokenizer", cls.plain, cls.dir / "text.txt")
        assert made.returncode == 0, made.stderr

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @staticmethod
    def run_script(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "data/tokenize.py"), *map(str, arguments)], text=True,
                              capture_output=True, timeout=120, check=False)
