#!/usr/bin/env python3
"""Text to tokens and back with a model's tokenizer.json, for `upmoe generate`, which starts this.

One JSON object a line on standard input, its answer a line on standard output:

    {"encode": TEXT}      {"tokens": [...]}     with what the tokenizer puts before a text or behind it; text that
                                                spells a control token is that token
    {"chat": {...}}       {"tokens": [...]}     of "messages", turns of {"role": ..., "content": TEXT}, and perhaps
                                                "tools", as the chat template beside the tokenizer lays them out, up
                                                to where the answer begins
    {"decode": [...]}     {"text": TEXT}        without control tokens
    {"bytes": true}       {"tokens": [...]}     those for single bytes, where a run of them is decoded as one
    {"classes": N}        {"names": [...], "classes": [...]}  of each of the tokens 0..N-1 the place of its class

{"error": WORDS, "status": N} where something is wrong, and that status: 2 for a Python without the packages, 3 for what
was asked. Ends with its input.
"""

import os
import sys

FOLDER = os.path.dirname(os.path.realpath(__file__))
# data/tokenize.py has the name of a standard module, which others import: its folder is searched last.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != FOLDER] + [
    os.path.join(os.path.dirname(FOLDER), "launch"), FOLDER]

import functools  # noqa: E402
import json  # noqa: E402
import unicodedata  # noqa: E402
from pathlib import Path  # noqa: E402

from chat_template import ChatTemplate, settings_of, special_tokens_of  # noqa: E402
from command_line import BadInput, BadUsage, run_tool, words_of  # noqa: E402
from control_tokens import marked_in  # noqa: E402
from model_template import ModelTemplate  # noqa: E402
from text_documents import Choices, Reading  # noqa: E402
from tokenizer_file import load_tokenizer  # noqa: E402
from tool_calls import as_written  # noqa: E402


def load(path):
    try:
        return load_tokenizer(path.read_bytes(), path)
    except OSError as e:
        raise BadInput(words_of(e)) from None


@functools.cache
def special_beside(tokenizer, folder):
    """Tokens that only the files beside tokenizer.json call special: no text either, as in transformers."""
    settings = settings_of(folder / "tokenizer_config.json")
    names = (*special_tokens_of(folder, settings).values(), *marked_in(settings))
    return frozenset(tokenizer.token_to_id(name) for name in names)


CLASSES = ("letters", "digits", "punctuation", "whitespace", "special", "other")
SPACES = " \u2581\u0120\n\t"  # a blank, as it is and as tokenizers write it


def class_of(text, token):
    """What the text of one token is made of, blanks around it aside; `token` is how the tokenizer writes it."""
    bare = text.strip()
    if not bare:
        return "whitespace" if text or not token.strip(SPACES) else "other"
    kinds = {unicodedata.category(character)[0] for character in bare}
    if kinds <= {"L", "M"}:
        return "letters"
    if kinds == {"N"}:
        return "digits"
    # A part of a character decodes to the replacement character, which is a symbol.
    return "punctuation" if kinds <= {"P", "S"} and "\ufffd" not in bare else "other"


def classes_of(tokenizer, count):
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    found = []
    for token in range(count):
        written = tokenizer.id_to_token(token)
        name = ("special" if token in special else "other" if written is None else
                class_of(tokenizer.decode([token], skip_special_tokens=False), written))
        found.append(CLASSES.index(name))
    return {"names": CLASSES, "classes": found}


@functools.cache
def template_in(folder):
    """Read and compiled once: a batch has many chats."""
    return ChatTemplate(folder)


def turns_and_tools(chat):
    """What a template is given of a conversation, as when one is learned."""
    reading, turns = Reading("messages", "", Choices()), []
    for i, turn in enumerate(chat["messages"]):
        turns.append(ModelTemplate.turn(turn, f"turn {i}", reading, f"content of turn {i}")[0])
    return turns, ModelTemplate.tools(chat.get("tools"), "tools", reading)[0]


def byte_tokens(tokenizer):
    """Of a tokenizer with byte fallback: it decodes the token <0x41> to an A."""
    letter = tokenizer.token_to_id("<0x41>")
    if letter is None or tokenizer.decode([letter]).strip() != "A":
        return []
    tokens = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return [token for token in tokens if token is not None]


def answer(tokenizer, folder, request):
    if "encode" in request:
        return {"tokens": tokenizer.encode(request["encode"]).ids}
    if "chat" in request:  # the template writes what begins a text
        template = template_in(folder)
        turns, tools = turns_and_tools(request["chat"])
        text = template.render(as_written(template, turns, tools), tools)
        return {"tokens": tokenizer.encode(text, add_special_tokens=False).ids}
    if "decode" in request:
        special = special_beside(tokenizer, folder)
        tokens = [token for token in request["decode"] if token not in special]
        return {"text": tokenizer.decode(tokens, skip_special_tokens=True)}
    if "bytes" in request:
        return {"tokens": byte_tokens(tokenizer)}
    if "classes" in request:
        return classes_of(tokenizer, request["classes"])
    raise BadInput(f"neither encode, chat, decode, bytes nor classes: {request}")


def main():
    if len(sys.argv) != 2:
        raise BadUsage("expected one word, a tokenizer.json")
    path = Path(sys.argv[1])
    try:
        tokenizer = load(path)
        for line in sys.stdin:
            print(json.dumps(answer(tokenizer, path.parent, json.loads(line))), flush=True)
    except RecursionError:
        print(json.dumps({"error": "nested too deeply", "status": 3}), flush=True)
        return 3
    except (BadInput, BadUsage) as e:
        status = 2 if isinstance(e, BadUsage) else 3
        print(json.dumps({"error": str(e), "status": status}), flush=True)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("text_codec", main))
