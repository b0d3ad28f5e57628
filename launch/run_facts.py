"""What runs were: from RUN_DIR/starts.jsonl, which has an object for each start of a run, and RUN_DIR/config.yaml."""

import json
import shlex
from dataclasses import dataclass, field

import yaml
from command_line import BadInput, display


@dataclass
class RunFacts:
    starts: list = field(default_factory=list)  # objects of starts.jsonl; empty for runs of earlier programs
    config_text: str = ""
    config: dict = field(default_factory=dict)  # section.key -> value, as it stands in the file


def read_starts(path):
    file = path / "starts.jsonl"
    if not file.is_file():
        return []
    starts = []
    for place, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            start = json.loads(line)
        except (ValueError, RecursionError):
            start = None
        if not isinstance(start, dict):
            raise BadInput(f"{display(file)}:{place}: not the record of a start")
        starts.append(start)
    return starts


def flat(tree, prefix=""):
    """section.key -> value; a list is one value."""
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat(value, name + ".")
        else:
            found[name] = value
    return found


def read_facts(path):
    facts, file = RunFacts(read_starts(path)), path / "config.yaml"
    if file.is_file():
        facts.config_text = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = yaml.safe_load(facts.config_text)
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            raise BadInput(f"{display(file)}: not a run configuration ({' '.join(str(problem).split())})") from None
        facts.config = flat(tree) if isinstance(tree, dict) else {}
    return facts


def at(tree, *keys):
    """A value deep in an object, None where there is none: nothing in a file is as it should be."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def count(value):
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def command_of(start):
    words = at(start, "command")
    if not isinstance(words, list) or not words:
        return "not recorded"
    line, ranks = shlex.join(str(word) for word in words), at(start, "ranks")
    return line + (f"   (on {ranks} ranks)" if isinstance(ranks, int) and ranks > 1 else "")


def program_of(start):
    version, commit, digest = (at(start, "program", key) for key in ("version", "commit", "digest"))
    if commit:
        commit = f"commit {str(commit).removesuffix('-dirty')}" + (
            " with changes" if str(commit).endswith("-dirty") else "")
    return f"upmoe {version or '(version unknown)'}, {commit or 'commit unknown'}, program {digest or 'unknown'}"


def machine_of(start):
    parts = [at(start, "machine") or "not recorded"]
    hosts = at(start, "hosts")
    if isinstance(hosts, int) and hosts > 1:
        parts.append(f"{hosts} hosts")
    if at(start, "cores"):
        parts.append(at(start, "cores"))
    return "; ".join(map(str, parts))


def model_of(start):
    model = at(start, "model")
    if not isinstance(model, dict):
        return "not recorded"
    experts = (f", {model['mixtures']} of them mixtures of {model['experts']} experts of which "
               f"{count(model.get('experts_per_token'))} compute a token"
               if "experts" in model and "mixtures" in model else "")
    return (f"{model.get('source')} ({model.get('start')}): {model.get('type')}, {model.get('layers')} layers"
            f"{experts}; {count(model.get('parameters'))} parameters, "
            f"{count(model.get('activated'))} activated per token")


def teacher_of(teacher):
    return (f"{teacher.get('source')}: {teacher.get('type')}, {teacher.get('layers')} layers; "
            f"{count(teacher.get('parameters'))} parameters; weight {teacher.get('weight')} of the loss, temperature "
            f"{teacher.get('temperature')}")


def adapters_of(config):
    """None where the weights themselves train."""
    rank, targets = config.get("lora.rank"), config.get("lora.targets")
    if not isinstance(rank, int) or rank < 1:
        return None
    return (f"rank {rank}, alpha {config.get('lora.alpha')}, targets "
            f"{' '.join(map(str, targets)) if isinstance(targets, list) else targets}; they alone train")


def counted(masked):
    return ", of which the targets that its loss mask names count" if masked is True else ""


def data_lines(start, config):
    yield str(at(start, "data", "words") or "not recorded")
    files, asked = at(start, "data", "train"), config.get("data.train")
    for i, file in enumerate(files if isinstance(files, list) else []):
        masked = at(asked[i], "loss_mask") if isinstance(asked, list) and i < len(asked) else None
        yield (f"{at(file, 'path')}: {count(at(file, 'tokens'))} tokens{counted(masked)}, "
               f"{count(at(file, 'documents'))} documents, weight {at(file, 'weight')}, "
               f"digest {at(file, 'identity') or 'unknown'}")


def held_out_lines(start, config):
    files = at(start, "data", "held_out")
    for file in files if isinstance(files, list) else []:
        name = f"{at(file, 'name')}: " if at(file, "name") else ""
        yield (f"{name}{at(file, 'path')}: {count(at(file, 'tokens'))} tokens"
               f"{counted(config.get('data.valid_loss_mask'))}, {count(at(file, 'sequences'))} sequences")


def training_of(config):
    def say(key):
        return config.get(key, "?")

    return (f"{count(say('train.steps'))} steps of {say('train.global_batch')} sequences of {say('data.seq_len')} "
            f"tokens; {say('optimizer.name')}, learning rate {say('optimizer.lr')}, {say('schedule.name')} with "
            f"{say('schedule.warmup')} steps of warm-up; {say('train.precision')}")


def start_line(start):
    return (f"step {at(start, 'first_step')}: {at(start, 'started')}, {at(start, 'ranks')} ranks, {machine_of(start)}, "
            f"{program_of(start)}")


def facts_of(facts):
    """(name, lines) in the order of the page."""
    last = facts.starts[-1] if facts.starts else {}
    frozen = at(last, "frozen") or ("nothing" if last else str(facts.config.get("freeze") or "nothing"))
    rows = [("command", [command_of(last), f"in {last['folder']}"] if "folder" in last else [command_of(last)])]
    if len(facts.starts) > 1:
        rows.append((f"{len(facts.starts)} starts", [start_line(start) for start in facts.starts]))
    elif last:
        rows.append(("started", [str(last.get("started"))]))
    source = facts.config.get("model.path", "not recorded")
    # A later start goes on from a checkpoint; what the run began from, the first one tells.
    rows += [("model", [model_of(facts.starts[0]) if last else str(source)]), ("frozen", [str(frozen)])]
    if isinstance(at(last, "teacher"), dict):
        rows.insert(-1, ("teacher", [teacher_of(last["teacher"])]))
    if adapters := adapters_of(facts.config):
        rows.insert(-1, ("adapters", [adapters]))
    if at(last, "kept_in_fp32"):
        rows.append(("kept in fp32", [str(last["kept_in_fp32"])]))
    if facts.config:
        rows.append(("training", [training_of(facts.config)]))
    data = data_lines(last, facts.config) if last else [str(facts.config.get("data.train", "not recorded"))]
    rows.append(("data", list(data)))
    if held_out := list(held_out_lines(last, facts.config)):
        rows.append(("held out", held_out))
    rows += [("mesh", [str(at(last, "mesh") or "not recorded")]), ("machine", [machine_of(last)]),
             ("program", [program_of(last) if last else "not recorded"])]
    return rows


def recipe_of(facts):
    """The recipe that the model was upcycled with and where its report lies; None for another model."""
    recipe = at(facts.starts[0], "recipe") if facts.starts else None
    if not isinstance(recipe, dict):
        return None
    names = [str(at(file, "name")) for file in at(recipe, "source", "files") or [] if isinstance(file, dict)]
    error = at(recipe, "step_zero", "loss")
    return {"text": str(recipe.get("recipe")), "report": str(recipe.get("report")), "files": names,
            "loss": error if isinstance(error, (int, float)) else None}


def differences(all_facts):
    """(key, values run by run) of the configuration's keys that are not the same in all runs, folders left out."""
    keys = dict.fromkeys(key for facts in all_facts for key in facts.config)
    rows = []
    for key in keys:
        found = [facts.config.get(key, "-") for facts in all_facts]
        if key != "run.dir" and any(value != found[0] for value in found):
            rows.append((key, [str(value) for value in found]))
    return rows
