"""Conversations as documents: how a template spells them, and which of their tokens count as targets.

Counted is what the assistant has to learn to write: its content and the token that ends its turn. What stands before
(who speaks, what the others said) and behind is given to it and does not count. Between what counts and what does not
tokens are never merged; and what a content spells is text, also where it looks like a control token.
"""

from dataclasses import dataclass

from text_documents import Choices, text_in
from command_line import BadInput

ROLES = ("system", "user", "assistant")


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
        for i, (role, content) in enumerate(turns):
            counts = role == "assistant"
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
class ChatChoices(Choices):
    """Records are conversations: under `key` a list of turns, each with a role and a content."""
    key: str = "messages"
    template: str = "chatml"

    def plain(self, piece, data):
        raise BadInput(f"{piece.path}: is plain text, and conversations are JSON lines: one record a line with a list "
                       f"of turns under '{self.key}'")

    def document_of(self, record, path, place):
        turns, replaced = [], 0
        if not isinstance(record, dict) or not isinstance(record.get(self.key), list):
            keys = ", ".join(map(str, list(record)[:8])) if isinstance(record, dict) else "none"
            raise BadInput(f"{path}{place}: expected an object with a list of turns under '{self.key}', its keys are: "
                           f"{keys}; name the right one with --key")
        for i, turn in enumerate(record[self.key]):
            if not isinstance(turn, dict) or turn.get("role") not in ROLES or "content" not in turn:
                raise BadInput(f"{path}{place}: turn {i} of '{self.key}': expected an object with 'content' and a "
                               f"'role' of {', '.join(ROLES)}")
            content, wrong = text_in(turn["content"], f"content of turn {i}", path, place, self)
            turns.append((turn["role"], content))
            replaced += wrong
        if all(role != "assistant" for role, _ in turns):
            raise BadInput(f"{path}{place}: has no turn of the assistant, so that nothing of it would count; take it "
                           "out, or tokenize such texts without --chat")
        return turns, replaced

    def check(self, tokenizer, path):
        missing = [name for name in TEMPLATES[self.template].controls() if tokenizer.token_to_id(name) is None]
        if missing:
            without = sorted(name for name, template in TEMPLATES.items() if not template.controls())
            raise BadInput(f"{path}: has no token {' and '.join(missing)}, which --template {self.template} needs; use "
                           f"a tokenizer that has them, or --template {' or '.join(without)}")

    def encode(self, turns, tokenizer, eos):
        ids, mask, text, counted = [], [], "", False

        def add(more, counts):
            ids.extend(more)
            mask.extend([counts] * len(more))

        def spell():
            if text:
                add(tokenizer.encode(text, add_special_tokens=False).ids, counted)

        for part, counts in TEMPLATES[self.template].parts(turns):
            if isinstance(part, str) and counts == counted:
                text += part
                continue
            spell()
            text, counted = (part, counts) if isinstance(part, str) else ("", counts)
            if isinstance(part, Control):
                add([eos if part.name is None else tokenizer.token_to_id(part.name)], counts)
        spell()
        if ids[-1] != eos:
            add([eos], False)
        return ids, mask
