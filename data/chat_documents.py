"""Conversations as documents: what a record says, as a template lays it out, and which of its tokens count as targets.

Counted is what the assistant has to learn to write: its content and the token that ends its turn. What stands before
and behind (who speaks, what the others said) is given to it and does not count. Between what counts and what does
not tokens are never merged.

A template (fixed_templates.py, model_template.py) has turn() and tools(), what it takes of a record and what of that
has no place; parts(), the conversation as texts and control tokens; controls() and check(), what it needs of a
tokenizer.
"""

import json
from dataclasses import dataclass, field

from command_line import BadInput
from fixed_templates import TEMPLATES, Control
from model_template import ModelTemplate
from text_documents import CONTROL, NOTHING, TEXT, Choices, Reading

FORMS = {name: (lambda _, template=template: template) for name, template in TEMPLATES.items()}
FORMS["model"] = ModelTemplate
TOOLS = "tools"


@dataclass
class Talk:
    turns: list                                 # (what a template takes of a turn, whether it counts)
    tools: list | None = None
    unread: list = field(default_factory=list)  # names of what the record says that a template has no place for
    parts: list = field(default_factory=list)   # (text or control token, whether it counts)


@dataclass
class ChatChoices(Choices):
    """Records are conversations: under `key` a list of turns, each with a role, a content and perhaps a weight."""
    key: str = "messages"
    template: str = "chatml"
    parse_special: bool = False

    def __post_init__(self):
        self.form = FORMS[self.template](self.parse_special)

    def plain(self, piece, data):
        raise BadInput(f"{piece.path}: is plain text, and conversations are JSON lines: one record a line with a list "
                       f"of turns under '{self.key}'")

    def columns(self):
        return [TOOLS]

    def document_of(self, record, path, place):
        try:
            return self.talk_of(record, path, place)
        except RecursionError:
            raise BadInput(f"{path}{place}: nested too deeply") from None

    def talk_of(self, record, path, place):
        if not isinstance(record, dict) or self.key not in record:
            keys = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else "none"
            raise BadInput(f"{path}{place}: expected an object with a list of turns under '{self.key}', its keys are: "
                           f"{keys}; name the right one with --key")
        found = record[self.key]
        if not isinstance(found, list):
            raise BadInput(f"{path}{place}: expected an object with a list of turns under '{self.key}', which holds "
                           f"{json.dumps(found)[:40]}")
        talk, reading = Talk([]), Reading(path, place, self)
        for i, turn in enumerate(found):
            self.add_turn(talk, turn, i, reading)
        if not any(counts for _, counts in talk.turns):
            raise BadInput(f"{path}{place}: has no turn of the assistant that counts, so that nothing of it would; "
                           "take it out, or tokenize such texts without --chat")
        talk.tools, unread = self.form.tools(record.get(TOOLS), f"{path}{place}: '{TOOLS}'", reading)
        talk.unread += unread
        talk.parts = list(self.form.parts(talk, f"{path}{place}"))
        return talk, reading.replaced

    def add_turn(self, talk, turn, i, reading):
        where = f"{reading.path}{reading.place}: turn {i} of '{self.key}'"
        if not isinstance(turn, dict) or not self.form.required(turn) <= turn.keys():
            keys = f"its keys are: {', '.join(map(str, list(turn)[:8]))}" if isinstance(turn, dict) else "it is none"
            raise BadInput(f"{where}: expected an object with 'role' and 'content', {keys}; write it so, for example "
                           "with jq")
        weight = 1 if turn.get("weight") is None else turn["weight"]
        if weight not in (0, 1):
            raise BadInput(f"{where}: 'weight' is {json.dumps(weight)[:40]}, expected 1, or 0: it does not count")
        said, unread = self.form.turn(turn, where, reading, f"content of turn {i}")
        talk.turns.append((said, turn["role"] == "assistant" and weight == 1))
        talk.unread += unread

    def controls(self):
        return self.form.controls()

    def unread(self, document):
        return document.unread

    def begins_texts(self):
        return self.form.begins_texts

    def check(self, speller):
        self.form.check(speller, self.template)

    def encode(self, talk, speller, eos):
        ids, mask, text, counted, before = [], [], "", False, NOTHING

        def add(more, counts, is_now):
            nonlocal before
            ids.extend(more)
            mask.extend([counts] * len(more))
            before = is_now

        def spell():
            if text:
                add(speller.spell(text, before), counted, TEXT)

        for part, counts in talk.parts:
            if isinstance(part, str) and counts == counted:
                text += part
                continue
            spell()
            text, counted = (part, counts) if isinstance(part, str) else ("", counts)
            if isinstance(part, Control):
                add([eos if part.name is None else speller.token(part.name)], counts, CONTROL)
        spell()
        if ids[-1] != eos:
            add([eos], False, CONTROL)
        return ids, mask
