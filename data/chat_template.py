"""A model's own chat template: turns to text as transformers' apply_chat_template makes it."""

import datetime
import functools
import json

from command_line import BadInput, BadUsage, missing_package

TOOL_USE = "tool_use"  # of several templates the one for conversations with tools, as in transformers


def settings_of(path):
    """What a JSON file beside a tokenizer says; nothing where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise BadInput(f"{path}: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return found


def text_of_file(path):
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8: {e.reason}") from None


def named(templates):
    """What tokenizer_config.json gives as chat_template, one or several, by name."""
    if isinstance(templates, list):
        return {one.get("name"): one.get("template") for one in templates if isinstance(one, dict)}
    return templates if isinstance(templates, dict) else {"default": templates}


def text_of_token(token):
    """A token's text, which tokenizer_config.json gives alone or with its traits."""
    return token.get("content") if isinstance(token, dict) else token or ""


def sandbox(now):
    """Where templates run: Jinja without access to Python, with the names that they ask for."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Answers(Extension):
        """{% generation %} marks what the assistant writes, for transformers' masks; it changes no text."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
        self.folder, self.now = folder, datetime.datetime.now()
        config = folder / "tokenizer_config.json"
        self.settings = settings_of(config)
        alone = folder / "chat_template.jinja"
        self.texts = named(self.settings.get("chat_template"))
        for path in (folder / "additional_chat_templates").glob("*.jinja"):
            self.texts[path.stem] = text_of_file(path)
        if alone.exists():
            self.texts["default"] = text_of_file(alone)
        if not isinstance(self.texts.get("default"), str):
            raise BadInput(f"{folder}: no chat template, neither {alone.name} nor chat_template in {config.name}")

    def special_tokens(self):
        return {name: text_of_token(self.settings.get(name))
                for name in ("bos_token", "eos_token", "unk_token", "pad_token")}

    @functools.cached_property
    def sandbox(self):
        return sandbox(self.now)

    @functools.cached_property
    def compiled(self):
        return {}  # by name

    def render(self, messages, tools=None, answer_begins=True):
        """The turns' text, up to where the next answer begins if so."""
        try:
            import jinja2
        except ImportError as e:
            raise BadUsage(missing_package(e)) from None
        name = TOOL_USE if tools and isinstance(self.texts.get(TOOL_USE), str) else "default"
        try:
            if name not in self.compiled:
                self.compiled[name] = self.sandbox.from_string(self.texts[name])
            return self.compiled[name].render(messages=messages, tools=tools, documents=None,
                                              add_generation_prompt=answer_begins, **self.special_tokens())
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as e:
            # A template is a program, which stumbles over turns that it does not expect with Python's errors, too.
            raise BadInput(f"{self.folder}: its chat template refuses: {' '.join(str(e).split())}") from None
