"""Conversations as a model's own chat template lays them out, and what of that the assistant writes.

A template is a program and says nowhere which of its text is an answer. But it lays out what stands before an answer,
as it does when the model is asked, and generation ends at tokens that the model's folder names:

    text of the turns before, up to where the answer begins    the answer, its stop    the turns that follow
    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n    hello<|im_end|>         \\n<|im_start|>user\\n...

So an answer begins where the first text ends, which has to be how the whole conversation begins, and ends with the
first such token behind. Tokens are those of the pieces, as the model will see and say them; control tokens that the
template writes are those tokens.
"""

import json
import re
from pathlib import Path

from chat_template import ChatTemplate, settings_of, text_of_token
from command_line import BadInput
from fixed_templates import END, Control
from text_documents import json_value


def texts_in(value):
    """Every text within a JSON value, names of its objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from texts_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_in(one)


def with_objects(calls):
    """Calls of tools; where their arguments are JSON in a text, as OpenAI's are, with what it says: so templates expect
    them."""
    if not isinstance(calls, list):
        return calls
    made = json.loads(json.dumps(calls))
    for call in made:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                said = json.loads(function["arguments"])
            except ValueError:
                continue
            if isinstance(said, dict):
                function["arguments"] = said
    return made


class Names:
    """Control tokens of a tokenizer and its model: those that a template may write, and those that end an answer."""

    def __init__(self, speller, folder, settings):
        stops = {text_of_token(settings.get("eos_token"))}
        for path in (folder / "generation_config.json", folder / "config.json"):
            ids = settings_of(path).get("eos_token_id")
            stops |= {speller.tokenizer.id_to_token(one) for one in (ids if isinstance(ids, list) else [ids])
                      if isinstance(one, int)}
        self.stops = sorted(name for name in stops if name and speller.token(name) is not None)
        added = {token.content: token for token in speller.tokenizer.get_added_tokens_decoder().values()}
        controls = {name for name, token in added.items() if token.special} | set(self.stops)
        self.controls = sorted(controls, key=lambda name: (-len(name), name))  # the longest that fits is meant
        self.pattern = re.compile("|".join(self.written(name, added.get(name)) for name in self.controls))

    @staticmethod
    def written(name, token):
        """How a text has it: some tokens take blanks and line ends beside them along."""
        before, behind = (r"\s*" if getattr(token, side, False) else "" for side in ("lstrip", "rstrip"))
        return f"{before}({re.escape(name)}){behind}"

    def split(self, text):
        """(text or name of a control token, whether it is one)"""
        done = 0
        for found in self.pattern.finditer(text):
            if found.start() > done:
                yield text[done:found.start()], False
            yield found[found.lastindex], True
            done = found.end()
        if done < len(text):
            yield text[done:], False

    def end_of_answer(self, text, begin):
        """Behind the first token that ends an answer, or None."""
        for found in self.pattern.finditer(text, begin):
            if found[found.lastindex] in self.stops:
                return found.end()
        return None


class ModelTemplate:
    """The template in a tokenizer's folder. Unless `parse_special`, no text of a record may spell a control token."""

    begins_texts = True  # with what a text of the model's begins

    def __init__(self, parse_special):
        self.parse_special, self.template, self.names = parse_special, None, None

    def controls(self):
        return []

    def check(self, speller, _name):
        """Reads what lies beside the tokenizer: before any document."""
        folder = Path(speller.path).parent
        self.template = ChatTemplate(folder)
        self.names = Names(speller, folder, self.template.settings)
        if not self.names.stops:
            raise BadInput(f"{folder}: neither generation_config.json nor config.json (eos_token_id) nor "
                           "tokenizer_config.json (eos_token) names a token of the tokenizer at which an answer ends")

    @staticmethod
    def required(turn):
        return {"role"} if turn.get("tool_calls") else {"role", "content"}

    @staticmethod
    def turn(turn, where, reading, name):
        """What the template is given of a turn, and the names of what not: nothing but what is none."""
        if not isinstance(turn["role"], str):
            raise BadInput(f"{where}: expected a text as 'role', found {json.dumps(turn['role'])[:40]}")
        kept = {key: value for key, value in turn.items()
                if key != "weight" and (key == "content" or value is not None)}
        if "tool_calls" in kept:
            kept["tool_calls"] = with_objects(kept["tool_calls"])
        kept.setdefault("content", None)
        if kept["content"] is not None or not kept.get("tool_calls"):
            kept["content"] = reading.text(kept["content"], name)
        return reading.texts(kept, name), []

    @staticmethod
    def tools(tools, where, reading):
        if isinstance(tools, str):  # as tables hold them
            tools = json_value(tools, where, "")
        if tools is not None and not isinstance(tools, list):
            raise BadInput(f"{where}: expected a list of tools, found {json.dumps(tools)[:40]}")
        return reading.texts(tools, "tools"), []

    def parts(self, talk, where):
        """(text or control token, whether it counts) of a conversation."""
        turns = [turn for turn, _ in talk.turns]
        if not self.parse_special:
            self.refuse_controls([*turns, talk.tools], where)
        whole, done = self.rendered(turns, talk.tools, False, where), 0
        for i, counts in ((i, counts) for i, (turn, counts) in enumerate(talk.turns) if turn["role"] == "assistant"):
            begin = self.beginning(whole, done, turns[:i], talk.tools, where)
            stop = self.names.end_of_answer(whole, begin)
            if stop is None and i + 1 < len(turns):
                raise BadInput(f"{where}: turn {i} ends with none of the tokens at which generation ends "
                               f"({', '.join(self.names.stops)}) as the chat template lays it out")
            yield from self.spelt(whole[done:begin], False)
            yield from self.spelt(whole[begin:stop], counts)
            done = len(whole) if stop is None else stop
            if stop is None:  # the template leaves the last answer open
                yield END, counts
        yield from self.spelt(whole[done:], False)

    def rendered(self, turns, tools, answer_begins, where):
        try:
            return self.template.render(turns, tools, answer_begins)
        except BadInput as e:
            raise BadInput(f"{where}: {e}") from None

    def beginning(self, whole, done, before, tools, where):
        """Where the answer begins that follows the turns `before`."""
        head = self.rendered(before, tools, True, where)
        if len(head) < done or not whole.startswith(head):
            raise BadInput(f"{where}: the chat template lays out what stands before turn {len(before)} otherwise once "
                           "that turn is there, so that where it begins is not known; leave such conversations out, "
                           "cut them behind it, or take another --template")
        return len(head)

    def spelt(self, text, counts):
        for part, is_control in self.names.split(text):
            yield Control(part) if is_control else part, counts

    def refuse_controls(self, values, where):
        for i, value in enumerate(values):
            found = next(filter(None, map(self.names.pattern.search, texts_in(value))), None)
            if found:
                whose = "'tools' spell" if i + 1 == len(values) else f"turn {i} spells"
                raise BadInput(f"{where}: {whose} the control token {found[found.lastindex]}, which the model's "
                               "template could not tell from its own; take it out, or have it read as that token: "
                               "--parse-special")
