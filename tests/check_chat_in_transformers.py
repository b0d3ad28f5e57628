#!/usr/bin/env python3
"""`tokenize.py --chat --template model` beside transformers' apply_chat_template, for templates of several kinds.

    python tests/check_chat_in_transformers.py

The tokens have to be the same, but for the one that ends the document, and what counts those of transformers' own
assistant mask where the template marks answers. Needs transformers, tokenizers and h5py; not part of the test suite.
Exit status 0 only if all agrees.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from check_export_in_transformers import ROOT, require_packages, run_tool

sys.path.append(str(ROOT / "tests/support"))
from chat_templates import BEGIN, CALLING, TALK, TEMPLATES, THINKING, TOOLS, add_controls  # noqa: E402

try:  # what --help does without
    import h5py
    import tokenizers
    import transformers
    MISSING = None
except ImportError as missing:
    MISSING = missing

TEXT = "one two three four five six seven\nI think user assistant\n"
MARKS = [dict(turn, content=turn["content"].replace("and", "<think>and")) for turn in TALK]
RECORDS = {"marks": {"messages": MARKS}, "thoughts": {"messages": THINKING},
           "calls": {"messages": CALLING, "tools": TOOLS}}


def tokenize(*arguments):
    subprocess.run([sys.executable, ROOT / "data/tokenize.py", *map(str, arguments)], check=True, timeout=120,
                   capture_output=True)


def with_bytes(folder):
    tokenize("--train-vocab", 300, "--tokenizer", folder / "plain.json", folder / "text.txt")
    return tokenizers.Tokenizer.from_file(str(folder / "plain.json"))


def with_blanks(scheme):
    """As SentencePiece's: blanks are letters, and one is put before a text, or before each piece of it."""
    def make(folder):
        made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        made.train([str(folder / "text.txt")], tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False))
        return made
    return make


TOKENIZERS = {"bytes": with_bytes, "a blank first": with_blanks("first"), "a blank always": with_blanks("always")}


def write_model(folder, plain, kind):
    template, controls, stop = TEMPLATES[kind]
    tokenizer = tokenizers.Tokenizer.from_str(plain)
    add_controls(tokenizer, controls)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": stop} |
        ({"bos_token": BEGIN} if BEGIN in controls else {})))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def agrees(folder, kind, theirs, what):
    record = RECORDS.get(kind, {"messages": TALK})
    (folder / "talk.jsonl").write_text(json.dumps(record) + "\n")
    tokenize("--tokenizer", folder, "--out", folder / "out.h5", "--chat", "--template", "model", folder / "talk.jsonl")
    with h5py.File(folder / "out.h5") as file:
        ids, mask = file["tokens"][:].tolist(), file["loss_mask"][:].tolist()
    marked = "{% generation %}" in TEMPLATES[kind][0]
    made = theirs.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=True, return_dict=True,
                                      return_assistant_tokens_mask=marked)
    same = ids[:-1] == made["input_ids"]
    counted = not marked or mask[:-1] == made["assistant_masks"]
    print(f"{what:16} {kind:10} {len(ids):4} tokens {'as' if same else 'NOT as'} in transformers"
          f"{', what counts as well' if marked and counted else ''}{'' if counted else ', what counts DIFFERS'}")
    return same and counted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    require_packages(MISSING)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text((TEXT + "?,.:\n") * 50)
        for place, (what, make) in enumerate(TOKENIZERS.items()):
            plain = make(folder).to_str()
            for kind in TEMPLATES:
                model = folder / f"{kind}{place}"
                outcomes.append(agrees(model, kind, write_model(model, plain, kind), what))
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(run_tool("check_chat_in_transformers", main))
