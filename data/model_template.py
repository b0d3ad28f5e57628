"""Conversations as a model's own chat template lays them out, and what of that the assistant writes.

A template is a program and says nowhere which of its text is an answer. But it lays out what stands before an answer,
as it does when the model is asked, and generation ends at tokens that the model's folder names:

    text of the turns before, up to where the answer begins    the answer, its stop    the turns that follow
    <|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n    hello<|im_end|>         \\n<|im_start|>user\\n...

So an answer begins where the first text ends, which has to be how the whole conversation begins, and ends with the
first such token behind, as it does where nothing follows. Tokens are those of the pieces, as the model will see and say
them; control tokens that the template writes are those tokens.
"""

import json
from pathlib import Path

from chat_template import ChatTemplate
from command_line import BadInput
from control_tokens import ControlTokens
from fixed_templates import END, Control
from tool_calls import as_written, functions_in

# What was thought before an answer: each template has one of these names for it.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


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


class ModelTemplate:
    """The template in a tokenizer's folder. Unless `parse_special`, no text of a record may spell a control token."""

    begins_texts = True  # with what a text of the model's begins

    def __init__(self, parse_special):
        self.parse_special, self.template, self.tokens = parse_special, None, None

    def controls(self):
        return []

    def check(self, speller, _name):
        """Reads what lies beside the tokenizer: before any document."""
        folder = Path(speller.path).parent
        self.template = ChatTemplate(folder)
        self.tokens = ControlTokens(speller, self.template)
        if not self.tokens.stops:
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
        kept = {key: value for key, value in turn.items() if key != "weight" and value is not None}
        if "content" in kept or not kept.get("tool_calls"):
            kept["content"] = reading.text(kept.get("content"), name)
        thought = next((kept[key] for key in THOUGHTS if kept.get(key)), None)
        if thought is not None:
            kept = dict.fromkeys(THOUGHTS, thought) | kept
        return reading.texts(kept, name), []

    @staticmethod
    def tools(tools, where, reading):
        if isinstance(tools, str):  # as tables hold them
            try:
                tools = json.loads(tools) if tools.strip() else None
            except ValueError as e:
                raise BadInput(f"{where}: a text that is no JSON: {e}; expected a list of tools") from None
        if tools is not None and not isinstance(tools, list):
            raise BadInput(f"{where}: expected a list of tools, found {json.dumps(tools)[:40]}")
        return reading.texts(tools, "tools"), []

    def parts(self, talk, where):
        """(text or control token, whether it counts) of a conversation."""
        turns, tools = [turn for turn, _ in talk.turns], talk.tools
        if not self.parse_special:
            self.refuse_controls([*turns, tools], where)
        turns = as_written(self.template, turns, tools)
        whole, done = self.rendered(turns, tools, False, where), 0
        if tools and whole == self.rendered(turns, None, False, where):
            talk.unread.append("tools")
        for i, (turn, counts) in enumerate(talk.turns):
            if not counts:
                continue
            begin = self.beginning(whole, turns[:i], tools, where)
            end = self.end(whole, begin, turns[:i + 1], tools, where, is_last=i + 1 == len(turns))
            self.require_trace(turn, whole[begin:end], f"{where}: turn {i}")
            yield from self.spelt(whole[done:begin], False)
            yield from self.spelt(whole[begin:end], True)
            done = len(whole) if end is None else end
            if end is None:  # the template leaves the last answer open
                yield END, True
        yield from self.spelt(whole[done:], False)

    def rendered(self, turns, tools, answer_begins, where):
        try:
            return self.template.render(turns, tools, answer_begins)
        except BadInput as e:
            raise BadInput(f"{where}: {e}") from None

    def beginning(self, whole, before, tools, where):
        """Where the answer begins that follows the turns `before`."""
        turn = f"turn {len(before)}"
        head = self.rendered(before, tools, True, f"{where}: what stands before {turn}, where it has to begin")
        if not whole.startswith(head):
            raise BadInput(f"{where}: the chat template lays out what stands before {turn} otherwise in the whole "
                           "conversation than where it asks for that turn, so that where the turn begins is not known; "
                           'give the turn "weight": 0, leave such conversations out, or take another --template')
        return len(head)

    def end(self, whole, begin, turns, tools, where, is_last):
        """Where the last of `turns` ends, which begins there: behind a token that ends answers; None: it is open."""
        end, names = self.tokens.answer_in(whole, begin)
        if is_last:
            if end is None and names:
                self.refuse_end(len(turns) - 1, names, where)
            return end
        # The same where nothing follows, but for what of an earlier answer a template leaves out.
        alone = self.rendered(turns, tools, False, where)
        end_alone, names_alone = self.tokens.answer_in(alone, begin)
        follows = end_alone is None and whole.startswith(alone)  # a token of the next turn may end this one
        names_alone += names[-1:] if follows else []
        if end is None or len(names) > len(names_alone) or names != names_alone[len(names_alone) - len(names):]:
            self.refuse_end(len(turns) - 1, names, where)
        return end

    def refuse_end(self, turn, names, where):
        found = f"; behind its beginning stand {', '.join(names[:6])}" if names else ""
        raise BadInput(f"{where}: turn {turn} ends with none of the tokens at which generation ends "
                       f"({', '.join(self.tokens.stops)}), as the chat template lays it out{found}; if the model stops "
                       "at the one that ends it, name that as eos_token_id in generation_config.json beside the "
                       "tokenizer")

    def require_trace(self, turn, answer, where):
        """Of what the turn says, as far as it shows: where a template has no form for it, silence would be learned."""
        bare = "".join(part for part, is_token in self.tokens.split(answer) if not is_token).strip()
        gone = [function["name"] for function in functions_in([turn])
                if isinstance(function.get("name"), str) and function["name"] not in bare]
        if gone:
            raise BadInput(f"{where}: calls {gone[0]}, for which the chat template has no form: nothing of it is left")
        if not bare and str(turn.get("content", "")).strip():
            raise BadInput(f"{where}: nothing of its content is left as the chat template lays it out")

    def spelt(self, text, counts):
        for part, is_token in self.tokens.split(text):
            yield Control(part) if is_token else part, counts

    def refuse_controls(self, values, where):
        for i, value in enumerate(values):
            found = next(filter(None, map(self.tokens.any_marked.search, texts_in(value))), None)
            if found:
                whose = "'tools' spell" if i + 1 == len(values) else f"turn {i} spells"
                raise BadInput(f"{where}: {whose} the control token {found[0]}, which the model's template could not "
                               "tell from its own; take it out, or have it read as that token: --parse-special")
