"""Templates of conversations that are known here: what stands before, behind and between turns. What a content spells
is text, also where it looks like a control token."""

import json
from dataclasses import dataclass

from command_line import BadInput

ROLES = ("system", "user", "assistant")
CALLS = ("tool_calls", "function_call")
READ = ("role", "content", "weight")


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

    begins_texts = False      # with what a text of the model's begins

    def controls(self):
        every = [*self.heads.values(), *self.ends.values(), self.behind, self.between]
        return sorted({part.name for parts in every for part in parts if isinstance(part, Control) and part.name})

    def check(self, speller, name):
        missing = [control for control in self.controls() if speller.token(control) is None]
        if missing:
            without = sorted(other for other, template in TEMPLATES.items() if not template.controls())
            raise BadInput(f"{speller.path}: has no token {' and '.join(missing)}, which --template {name} needs; use "
                           f"a tokenizer that has them, or --template {' or '.join(without)}")

    @staticmethod
    def required(_turn):
        return {"role", "content"}

    @staticmethod
    def turn(turn, where, reading, name):
        """Role and content of a turn, and the names of what else it says: that has no place."""
        role, calls = turn["role"], [key for key in CALLS if turn.get(key)]
        if role not in ROLES:
            raise BadInput(f"{where}: expected a 'role' of {', '.join(ROLES)}, found {json.dumps(role)[:40]}; name it "
                           "one of these, take the model's own template (--template model), or leave such "
                           "conversations out")
        if calls:  # its content is no answer, often none at all
            raise BadInput(f"{where}: holds '{calls[0]}', for which this --template has no form; the model's own may "
                           "have one (--template model); or write the call into its content as the model is to say "
                           "it, or leave such conversations out")
        unread = [key for key, value in turn.items() if key not in READ and value not in (None, "", [], {}, False)]
        return (role, reading.text(turn["content"], name)), unread

    @staticmethod
    def tools(tools, _where, _reading):
        return None, ["tools"] if tools else []

    def parts(self, talk, _where):
        """(text or control token, whether it counts) of a conversation."""
        for i, ((role, content), counts) in enumerate(talk.turns):
            yield from ((part, False) for part in (self.between if i > 0 else ()))
            yield from ((part, False) for part in self.heads[role])
            yield content, counts
            yield from ((part, counts) for part in self.ends[role])
            yield from ((part, False) for part in self.behind)


TEMPLATES = {
    "chatml": Template(heads={role: (Control("<|im_start|>"), f"{role}\n") for role in ROLES},
                       ends={role: (Control("<|im_end|>"),) for role in ROLES}, behind=("\n",)),
    # Needs no control tokens: its assistant ends its turns as documents end.
    "alpaca": Template(heads={"system": (), "user": ("### Instruction:\n",), "assistant": ("### Response:\n",)},
                       ends={"system": (), "user": (), "assistant": (END,)}, between=("\n\n",)),
}
