"""Conversations as documents: how a template spells them, and which of their tokens count as targets.

Counted is what the assistant has to learn to write: its content and the token that ends its turn. What stands before
(who speaks, what the others said) and behind is given to it and does not count. Between what counts and what does not
tokens are never merged; and what a content spells is text, also where it looks like a control token.
"""

import json
from dataclasses import dataclass

from command_line import BadInput
from text_documents import CONTROL, NOTHING, TEXT, Choices, text_in

ROLES = ("system", "user", "assistant")
CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Control:
    """A token of the tokenizer by its name; without one the token that ends documents."""
    name: str | None = None


END = Control()


@dataclass(frozen=True)
class Template:
    heads: dict               # before a turn, by role: texts and control tokens
    ends: dict                # ends a turn, by role; the assistant's counts
    behind: tuple = ()        # behind every turn
    between: tuple = ()       # between two turns

    def parts(self, turns):
        """(text or control token, whether it counts) of a conversation."""
        for i, (role, content, counts) in enumerate(turns):
            yield from ((part, False) for part in (self.between if i > 0 else ()))
            yield from ((part, False) for part in self.heads[role])
            yield content, counts
            yield from ((part, counts) for part in self.ends[role])
            yield from ((part, False) for part in self.behind)

    def controls(self):
        every = [*self.heads.values(), *self.ends.values(), self.behind, self.between]
        return sorted({part.name for parts in every for part in parts if isinstance(part, Control) and part.name})


TEMPLATES = {
    "chatml": Template(heads={role: (Control("<|im_start|>"), f"{role}\n") for role in ROLES},
                       ends={role: (Control("<|im_end|>"),) for role in ROLES}, behind=("\n",)),
    # Needs no control tokens: its assistant ends its turns as documents end.
    "alpaca": Template(heads={"system": (), "user": ("### Instruction:\n",), "assistant": ("### Response:\n",)},
                       ends={"system": (), "user": (), "assistant": (END,)}, between=("\n\n",)),
}


@dataclass
class Talk:
    turns: list   # (role, content, whether it counts)
    unread: list  # names of what turns say that a template has no place for


def text_of_parts(content):
    """A content that is a list of parts as one text, where all of them are texts."""
    texts = isinstance(content, list) and content and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
    return "".join(part["text"] for part in content) if texts else content


@dataclass
class ChatChoices(Choices):
    """Records are conversations: under `key` a list of turns, each with a role, a content and perhaps a weight."""
    key: str = "messages"
    template: str = "chatml"

    def plain(self, piece, data):
        raise BadInput(f"{piece.path}: is plain text, and conversations are JSON lines: one record a line with a list "
                       f"of turns under '{self.key}'")

    def document_of(self, record, path, place):
        if not isinstance(record, dict) or self.key not in record:
            keys = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else "none"
            raise BadInput(f"{path}{place}: expected an object with a list of turns under '{self.key}', its keys are: "
                           f"{keys}; name the right one with --key")
        found = record[self.key]
        if not isinstance(found, list):
            raise BadInput(f"{path}{place}: expected an object with a list of turns under '{self.key}', which holds "
                           f"{json.dumps(found)[:40]}")
        talk, replaced = Talk([], []), 0
        for i, turn in enumerate(found):
            replaced += self.add_turn(talk, turn, f"{path}{place}: turn {i} of '{self.key}'", path, place)
        if not any(counts for _, _, counts in talk.turns):
            raise BadInput(f"{path}{place}: has no turn of the assistant that counts, so that nothing of it would; "
                           "take it out, or tokenize such texts without --chat")
        return talk, replaced

    def add_turn(self, talk, turn, where, path, place):
        """How many invalid characters were replaced in it."""
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            keys = f"its keys are: {', '.join(map(str, list(turn)[:8]))}" if isinstance(turn, dict) else "it is none"
            raise BadInput(f"{where}: expected an object with 'role' and 'content', {keys}; write it so, for example "
                           "with jq")
        role, calls = turn["role"], [key for key in CALLS if turn.get(key)]
        if role not in ROLES:
            raise BadInput(f"{where}: expected a 'role' of {', '.join(ROLES)}, found {json.dumps(role)[:40]}; name it "
                           "one of these, or leave such conversations out")
        if calls:  # its content is no answer, often none at all
            raise BadInput(f"{where}: holds '{calls[0]}', for which no --template has a form; write the call into its "
                           "content as the model is to say it, or leave such conversations out")
        weight = 1 if turn.get("weight") is None else turn["weight"]
        if weight not in (0, 1):
            raise BadInput(f"{where}: 'weight' is {json.dumps(weight)[:40]}, expected 1, or 0: it does not count")
        name = f"content of turn {len(talk.turns)}"
        content, replaced = text_in(text_of_parts(turn["content"]), name, path, place, self)
        talk.turns.append((role, content, role == "assistant" and weight == 1))
        talk.unread += [key for key, value in turn.items()
                        if key not in ("role", "content", "weight") and value not in (None, "", [], {}, False)]
        return replaced

    def controls(self):
        return TEMPLATES[self.template].controls()

    def unread(self, document):
        return document.unread

    def check(self, speller):
        missing = [name for name in self.controls() if speller.token(name) is None]
        if missing:
            without = sorted(name for name, template in TEMPLATES.items() if not template.controls())
            raise BadInput(f"{speller.path}: has no token {' and '.join(missing)}, which --template {self.template} "
                           f"needs; use a tokenizer that has them, or --template {' or '.join(without)}")

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

        for part, counts in TEMPLATES[self.template].parts(talk.turns):
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
