#!/usr/bin/env python3
"""What the steps of launch/after_training.sh came to: notes it, tells it, and writes it into docs/serving.md.

    launch/serving_record.py note OUT STEP STATUS WORDS    the result of a step that could not tell it itself
    launch/serving_record.py tell OUT STEP...              a line for each; exit status 0, 1 or 69, as the script's
    launch/serving_record.py write OUT DOCUMENT EXPORT STEP...    a row for each of the model's family and step into the
                                                           table between the document's markers, in place of its own

A result is OUT/results/STEP.json: step, status, versions, words. Statuses: done; differs (other tokens than upmoe);
failed; not_run (it cannot here); not_taken (the tool does not take the model).
"""

import datetime
import json
import platform
import re
import sys
from pathlib import Path

from command_line import BadInput, BadUsage, run_tool
from whole_file import write_whole

STATUSES = {"done": 0, "differs": 1, "failed": 1, "not_run": 69, "not_taken": 69}
BEGIN, END = "<!-- launch/after_training.sh EXPORT --record -->", "<!-- end -->"
HEAD = ("| family | step | came to | words | versions | when, where |", "|---|---|---|---|---|---|")


def note(out, step, status, words, versions=None):
    if status not in STATUSES:
        raise BadUsage(f"status '{status}': expected one of {', '.join(STATUSES)}")
    folder = Path(out) / "results"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"step": step, "status": status, "versions": versions or {}, "words": " ".join(words.split())}
    write_whole(folder / f"{step}.json", json.dumps(result) + "\n")


def result_of(out, step):
    path = Path(out) / "results" / f"{step}.json"
    if not path.is_file():
        return {"step": step, "status": "not_run", "versions": {}, "words": "was not started"}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["status"] not in STATUSES or not isinstance(result["words"], str):
            raise ValueError(result["status"])
        return result
    except (ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{path}: no result of a step ({e})") from None


def status_of(results):
    """A failure before a step that could not run; 0 only where everything is done."""
    worst = {STATUSES[result["status"]] for result in results}
    return next((status for status in (1, 69) if status in worst), 0)


def tell(results):
    for result in results:
        print(f"{result['step']:13} {result['status'].replace('_', ' '):10} {result['words']}")
    left = [result["step"] for result in results if result["status"] != "done"]
    print(f"not done: {', '.join(left)}" if left else "every step is done", file=sys.stderr)
    return status_of(results)


def cells_of(row):
    """Of a row of the table; a bar within a cell stays as it is written."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def row_of(family, result, day):
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items()) or "-"
    cells = (family, result["step"], result["status"].replace("_", " "), result["words"], versions, day)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def family_of(export):
    path = Path(export) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{path}: names no model_type ({e})") from None


def write(document, family, results, day=None):
    text = Path(document).read_text(encoding="utf-8")
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise BadInput(f"{document}: has no '{BEGIN}' with '{END}' behind it")
    day = f"{day or datetime.date.today().isoformat()}, {platform.machine()}"
    rows = {tuple(cells_of(line)[:2]): line for line in text[begin:end].splitlines() if line.startswith("|")}
    for head in HEAD:
        rows.pop(tuple(cells_of(head)[:2]), None)
    rows |= {(family, result["step"]): row_of(family, result, day) for result in results}
    # A family's rows stand together, however they came.
    families = list(dict.fromkeys(family for family, _ in rows))
    ordered = [row for family in families for (own, _), row in rows.items() if own == family]
    write_whole(document, "\n".join((text[:begin] + BEGIN, *HEAD, *ordered, text[end:])))


def main():
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if len(words) == 5 and words[0] == "note":
        note(*words[1:])
        return 0
    if len(words) >= 3 and words[0] == "tell":
        return tell([result_of(words[1], step) for step in words[2:]])
    if len(words) >= 5 and words[0] == "write":
        write(words[2], family_of(words[3]), [result_of(words[1], step) for step in words[4:]])
        return 0
    raise BadUsage("expected note OUT STEP STATUS WORDS, tell OUT STEP... or write OUT DOCUMENT EXPORT STEP...")


if __name__ == "__main__":
    sys.exit(run_tool("serving_record", main))
