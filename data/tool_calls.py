"""Calls of tools in turns of a conversation, and the forms in which records have them."""

import json

from command_line import BadInput


def functions_in(turns):
    """What is called: an object with a name and arguments, as far as the record has it."""
    for turn in turns:
        calls = turn.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict):
                yield function


def object_in(text):
    try:
        said = json.loads(text)
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def with_objects(turns):
    """The turns with arguments as objects that are JSON in a text."""
    made = json.loads(json.dumps(turns))
    for function in functions_in(made):
        if isinstance(function.get("arguments"), str) and (said := object_in(function["arguments"])) is not None:
            function["arguments"] = said
    return made


def as_written(template, turns, tools):
    """The turns with arguments in the form in which this template writes them. Records mostly have them as OpenAI
    does, JSON in a text: some templates write that text, others make JSON of an object, and would of the text again."""
    texts = [function["arguments"] for function in functions_in(turns)
             if isinstance(function.get("arguments"), str) and object_in(function["arguments"]) is not None]
    if not texts:
        return turns
    try:
        whole = template.render(turns, tools, answer_begins=False)
    except BadInput:
        return with_objects(turns)
    as_they_are = all(text in whole and json.dumps(text, ensure_ascii=False) not in whole for text in texts)
    return turns if as_they_are else with_objects(turns)
