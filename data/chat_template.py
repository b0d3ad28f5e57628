"""A model's own chat template: turns to text as transformers' apply_chat_template makes it."""

import datetime
import functools
import json

from command_line import BadInput, BadUsage, missing_package

TOOL_USE = "tool_use"  # of several templates the one for conversations with tools, as in transformers
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def text_of_file(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8: {e.reason}") from None


def settings_of(path):
    """What a JSON file beside a tokenizer says; nothing where there is none."""
    try:
        found = json.loads(text_of_file(path)) if path.exists() else {}
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return found


def text_of_token(token, where):
    """A token's text, which settings give alone or with its traits; None of none."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise BadInput(f"{where}: expected a token's text, found {json.dumps(token)[:40]}")
    return text


def special_tokens_of(folder, settings):
    """Texts by the names that templates have for them; `settings`: of tokenizer_config.json."""
    more, found = settings.get("extra_special_tokens"), {}
    beside = settings_of(folder / "special_tokens_map.json")
    for name, tokens in (("special_tokens_map.json", {key: beside.get(key) for key in SPECIAL}),
                         ("tokenizer_config.json", {key: settings.get(key) for key in SPECIAL}),
                         ("tokenizer_config.json", more if isinstance(more, dict) else {})):
        texts = {key: text_of_token(token, f"{folder / name}: {key}") for key, token in tokens.items()}
        found |= {key: text for key, text in texts.items() if text is not None}
    return found


def named(templates, path):
    """What tokenizer_config.json gives as chat_template, one or several, by name."""
    if isinstance(templates, list):
        if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in templates):
            raise BadInput(f"{path}: chat_template: expected a text, or objects with 'name' and 'template'")
        return {one["name"]: one.get("template") for one in templates}
    return templates if isinstance(templates, dict) else {"default": templates}


def templates_of(folder, settings):
    """A model's chat templates by name, "default" that of conversations, if it has one; `settings`: of
    tokenizer_config.json."""
    texts = named(settings.get("chat_template"), folder / "tokenizer_config.json")
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        texts[path.stem] = text_of_file(path)
    alone = folder / "chat_template.jinja"
    return texts | ({"default": text_of_file(alone)} if alone.exists() else {})


def sandbox(now):
    """Where templates run: Jinja without access to Python, with the names that they ask for."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Answers(Extension):
        """{% generation %} marks what the assistant writes, for transformers' masks; it changes no text."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

        def _as_it_is(self, caller):
            return caller()

    def refuse(words):
        raise jinja2.TemplateError(words)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[Answers, "jinja2.ext.loopcontrols"])
    made.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    made.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
    return made


class ChatTemplate:
    """That of a folder; every conversation is laid out at one and the same time of day, that of its making."""

    def __init__(self, folder):
        self.folder, self.now, self.compiled = folder, datetime.datetime.now(), {}
        self.settings = settings_of(folder / "tokenizer_config.json")
        self.texts = templates_of(folder, self.settings)
        if not isinstance(self.texts.get("default"), str):
            raise BadInput(f"{folder}: no chat template, neither chat_template.jinja nor chat_template in "
                           "tokenizer_config.json")

    @functools.cached_property
    def special_tokens(self):
        return special_tokens_of(self.folder, self.settings)

    @functools.cached_property
    def sandbox(self):
        return sandbox(self.now)

    def render(self, messages, tools=None, answer_begins=True):
        """The turns' text, up to where the next answer begins if so."""
        try:
            import jinja2
        except ImportError as e:
            raise BadUsage(missing_package(e)) from None
        name = TOOL_USE if tools is not None and isinstance(self.texts.get(TOOL_USE), str) else "default"
        try:
            if name not in self.compiled:
                self.compiled[name] = self.sandbox.from_string(self.texts[name])
            return self.compiled[name].render(messages=messages, tools=tools, documents=None,
                                              add_generation_prompt=answer_begins, **self.special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                RecursionError) as e:
            # A template is a program, which stumbles over turns that it does not expect with Python's errors, too.
            raise BadInput(f"{self.folder}: its chat template refuses: {' '.join(str(e).split())}") from None
