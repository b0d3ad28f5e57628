"""The control tokens of a tokenizer and its model: those that a template may write, and those that end an answer."""

import re

from chat_template import settings_of, text_of_token
from command_line import BadInput


def numbers_in(settings, path):
    """The tokens under eos_token_id, one or several."""
    inner = settings.get("text_config")  # of models that have more than text
    found = settings.get("eos_token_id")
    if found is None and isinstance(inner, dict):
        found = inner.get("eos_token_id")
    numbers = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in numbers):
        raise BadInput(f"{path}: eos_token_id: expected the number of a token, or a list of such")
    return numbers


def marked_in(settings):
    """Tokens that tokenizer_config.json alone calls special."""
    decoder, more = settings.get("added_tokens_decoder"), settings.get("additional_special_tokens")
    given = [token for token in (decoder.values() if isinstance(decoder, dict) else ())
             if isinstance(token, dict) and token.get("special") is True]
    for token in [*given, *(more if isinstance(more, list) else ())]:
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            yield text


def one_of(names):
    """The longest that fits is meant. Without groups: of thousands of names it would try each at every character."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, names), key=lambda name: (-len(name), name)))))


class ControlTokens:
    def __init__(self, speller, template):
        folder, stops = template.folder, {template.special_tokens.get("eos_token")}
        for path in (folder / "generation_config.json", folder / "config.json"):
            stops |= {speller.tokenizer.id_to_token(one) for one in numbers_in(settings_of(path), path)}
        self.added = {token.content: token for token in speller.tokenizer.get_added_tokens_decoder().values()}
        known = {name for name in {*template.special_tokens.values(), *marked_in(template.settings), *stops}
                 if name and speller.token(name) is not None}
        self.stops = sorted(stops & known)
        # What only a template may write, and what the tokenizer sets apart wherever it stands.
        self.marked = known | {name for name, token in self.added.items() if token.special}
        self.any_marked = one_of(self.marked)
        self.any = one_of(self.marked | {name for name, token in self.added.items() if not token.single_word})

    def found_in(self, text, begin=0):
        """(name, begin, end) of each; some tokens take blanks and line ends beside them along."""
        done = begin
        for found in self.any.finditer(text, begin):
            name, first, last, token = found[0], found.start(), found.end(), self.added.get(found[0])
            while token is not None and token.lstrip and first > done and text[first - 1].isspace():
                first -= 1
            while token is not None and token.rstrip and last < len(text) and text[last].isspace():
                last += 1
            done = last
            yield name, first, last

    def split(self, text):
        """(text or name of a token, whether it is one)"""
        done = 0
        for name, first, last in self.found_in(text):
            if first > done:
                yield text[done:first], False
            yield name, True
            done = last
        if done < len(text):
            yield text[done:], False

    def answer_in(self, text, begin):
        """Of what begins there up to the first token that ends an answer: (end, or None; the marked tokens in it)."""
        names = []
        for name, _, last in self.found_in(text, begin):
            names += [name] if name in self.marked else []
            if name in self.stops:
                return last, names
        return None, names
