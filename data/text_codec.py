#!/usr/bin/env python3
"""Text to tokens and back with a model's tokenizer.json, for `upmoe generate`, which starts this.

One JSON object a line on standard input, its answer a line on standard output:

    {"encode": TEXT}      {"tokens": [...]}     with what the tokenizer puts before a text or behind it; text that
                                                spells a control token is that token
    {"decode": [...]}     {"text": TEXT}        without control tokens

{"error": WORDS} where something is wrong, and status 3. Ends with its input.
"""

import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))
# data/tokenize.py has the name of a standard module, which others import: its folder is searched last.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != FOLDER] + [
    os.path.join(os.path.dirname(FOLDER), "launch"), FOLDER]

import json  # noqa: E402

from command_line import BadInput, run_tool  # noqa: E402


def load(path):
    try:
        import tokenizers
    except ImportError as e:
        raise BadInput(f"{e}; run launch/setup.sh, or set UPMOE_PYTHON to a Python that has tokenizers") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises plain Exception, and a panic of its own that is none
        raise BadInput(f"{path}: not a Hugging Face tokenizer.json: {' '.join(str(e).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def answer(tokenizer, request):
    if "encode" in request:
        return {"tokens": tokenizer.encode(request["encode"]).ids}
    if "decode" in request:
        return {"text": tokenizer.decode(request["decode"], skip_special_tokens=True)}
    raise BadInput(f"neither encode nor decode: {request}")


def main():
    try:
        tokenizer = load(sys.argv[1])
        for line in sys.stdin:
            print(json.dumps(answer(tokenizer, json.loads(line))), flush=True)
    except BadInput as e:
        print(json.dumps({"error": str(e)}), flush=True)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("text_codec", main))
