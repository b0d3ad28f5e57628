"""Whether the arms of a study can run, before anything is computed: every command of every arm as `upmoe plan` and
`upmoe upcycle --plan` look at it, which need neither tokens nor weights. Nothing is written where the study works.
"""

import json
import re
import tempfile
from pathlib import Path

import yaml
from command_line import BadInput, BadUsage, display
from study_work import StageFailed, config_of, positions_of
from whole_file import write_whole

USAGE = 2  # status of a command whose keys are wrong


def words_of(problem, file):
    """What a command said was wrong, without the files that it was given, which are not the user's."""
    text = "\n".join(problem.said)
    text = text.partition("upmoe: error: ")[2] or text
    text = re.sub(rf"{re.escape(str(file.parent))}/\w+-shape\.json", "its model", text)
    lines = [re.sub(rf"^\s*{re.escape(str(file))}(:\d+)*: ", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"\d+ problems", line)]
    return "; ".join(lines).replace(":; ", ": ") or str(problem)


def in_words(arms, of):
    """Which of `of` are meant."""
    if len(arms) == len(of) > 1:
        return "every arm"
    return f"arm{'s' if len(arms) > 1 else ''} " + ", ".join(f"'{arm}'" for arm in arms)


class Check:
    """Of one study; `folder` is for what its commands are given."""

    def __init__(self, work, folder):
        self.work, self.folder = work, folder
        self.shapes = {}    # stage id: config.json of the model that it leaves
        self.problems = {}  # stage id: what is wrong, once for all arms that have it
        self.statuses = set()  # of the commands that refused

    def shape(self, stage):
        """A file with the shape that a first command trains: with the vocabulary that is asked of the tokenizer."""
        figures = self.work.study.figures
        vocab = int(figures["text"]["vocab"])
        path = self.folder / f"{stage.id}-shape.json"
        write_whole(path, json.dumps(config_of(stage.shape, vocab, vocab - 1, positions_of(figures))))
        return path

    def look_at(self, stage):
        """Leaves the shape of what the command makes; throws StageFailed."""
        given, log = self.folder / f"{stage.id}.yaml", self.folder / "log.txt"
        model = self.shape(stage) if stage.before is None else self.shapes[stage.before]
        if stage.kind == "upcycle":
            write_whole(given, yaml.safe_dump(stage.settings, sort_keys=False))
            plan = json.loads(self.work.call([*self.work.program, "upcycle", given, "--from", model, "--to",
                                              self.folder / "nothing", "--plan", "--json"], log))
            if plan["asks_for_tokens"] != bool(stage.text):
                words = ("calibrate: the recipe asks for no tokens; leave it out" if stage.text else
                         "the recipe asks for tokens: `calibrate` names the text that experts are made by; others "
                         "(routers from prompts) a study does not give")
                raise StageFailed(words, USAGE, [words])
            model = self.folder / f"{stage.id}-shape.json"
            write_whole(model, json.dumps(plan["config"]))
        else:
            settings = self.work.run_settings(stage, model, self.shapes.get(stage.teacher))
            write_whole(given, yaml.safe_dump(settings, sort_keys=False))
            self.work.call([*self.work.program, "plan", given, "--world", 1, "--json"], log)
        self.shapes[stage.id] = model

    def run(self, run):
        """The id of its first command that cannot be; None where all can."""
        for number, stage in enumerate(run.stages, 1):
            if stage.id in self.problems:
                return stage.id
            if stage.id in self.shapes:
                continue
            try:
                self.look_at(stage)
            except StageFailed as problem:
                self.statuses.add(problem.status)
                words = words_of(problem, self.folder / f"{stage.id}.yaml")
                self.problems[stage.id] = f"command {number} ({stage.kind}): {words}"
                return stage.id
        return None


def check_arms(work, builder, arms, say):
    """Throws BadUsage that names everything that is wrong, or BadInput where it is not the file's fault."""
    study, wrong = builder.study, {}  # what is wrong: the arms that have it
    with tempfile.TemporaryDirectory(prefix="upmoe-study-") as folder:
        check = Check(work, Path(folder))
        say(f"looking at the commands of {len(arms)} arms")
        for arm in arms:
            try:
                run = builder.first(arm)
                found = None if work.finished(run.last) else check.run(run)
            except BadUsage as problem:
                check.statuses.add(USAGE)
                wrong.setdefault(str(problem), []).append(arm)
                continue
            if found:
                wrong.setdefault(check.problems[found], []).append(arm)
    if wrong:
        text = "; ".join(f"{in_words(having, arms)}: {what}" for what, having in wrong.items())
        kind = BadUsage if check.statuses == {USAGE} else BadInput
        raise kind(f"{display(study.file)}: {text}; nothing was begun")
