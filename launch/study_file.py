"""Study files: configs/studies/*.yaml, and the sizes that all studies come in, configs/studies/sizes; read strictly.

A value that depends on the size is a map of sizes, {micro: 88, tiny: 176, small: 352}, anywhere in a study.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from command_line import BadUsage, display

ROOT = Path(__file__).resolve().parent.parent
STUDIES = ROOT / "configs" / "studies"
SIZES = ("micro", "tiny", "small")
AXES = ("tokens", "flops", "seconds")
BATCHES = ("mates",)  # ways to lay out the batches of a last training, other than shuffled
# Of study_measures.py, each with the batches that the last trainings of its arms must have.
MEASURES = {"loss": None, "cost": None, "mates": "mates"}
STANDARD_TEXT = "stdlib"  # the sources of Python's standard library

SIZE_KEYS = {"text": dict, "seq_len": int, "eval_sequences": int, "evaluations": int, "models": dict, "recipe": dict,
             "steps": dict, "warmup": float, "tune_share": float, "rates": list, "run": dict}
# A study may have any key of the size as well: of a map it changes the entries that it names.
STUDY_KEYS = {"claim": str, "expect": str, "sizes": list, "texts": dict, "last": dict, "arms": dict, "compare": list,
              "fit": bool} | SIZE_KEYS
# Beside section.key.
LINK_KEYS = {"train": ("model", "steps", "warmup", "text", "batches", "teacher"), "upcycle": ("recipe", "calibrate")}
PLAIN_KEYS = {"train": ("freeze", "device"), "upcycle": ("keep_rest",)}  # of run configurations and recipes
# What the study itself says of every command, and from where it takes that.
TAKEN = {"train": {"train.steps": "`steps` says how many", "run.dir": "--out names the folder of all",
                   "run.seed": "it is the pair's", "data.seed": "it is the pair's",
                   "model.path": "it is what the command before made", "data.train": "`text` names it",
                   "data.valid": "`text` names it",
                   "train.teacher.model": "`teacher` is the number of the train of this arm that made it"},
         "upcycle": {"seed": "it is the pair's"}}
COMPARE_KEYS = ("better", "than", "by", "at", "worth", "most", "with_source")  # from `at` on: of held-out curves


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path):
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise BadUsage(f"{display(path)}: not YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(value, dict):
        raise BadUsage(f"{display(path)}: expected a map of keys")
    return value


@dataclass(frozen=True)
class Link:
    """One command of an arm's chain, and what the file says of it."""
    kind: str  # a key of LINK_KEYS
    keys: dict

    @property
    def own(self):
        return {key: value for key, value in self.keys.items() if key in LINK_KEYS[self.kind]}

    @property
    def overrides(self):
        return {key: value for key, value in self.keys.items() if key not in LINK_KEYS[self.kind]}


@dataclass(frozen=True)
class Comparison:
    better: str  # the arm that is claimed to be better
    than: str
    by: str = "loss"       # loss: nats at equal cost; cost: the ratio of what an equal loss takes; mates: see MEASURES
    at: str = "tokens"
    worth: float = 0.0     # by loss: the gain that is claimed, nats
    most: float = 1.0      # by cost: the claimed ratio
    with_source: bool = False  # charged with what their dense sources had cost


@dataclass
class Study:
    name: str
    file: Path
    size: str
    claim: str
    expect: str
    texts: dict   # name: folder, or STANDARD_TEXT; the first is the one of all that names none
    rates: list   # of learning, ascending
    steps: dict
    last: dict    # keys of every arm's last `train`
    arms: dict    # name: [Link]
    compare: list
    fit: bool     # upmoe cost --fit over all arms that have a source
    figures: dict = field(repr=False)  # the size's file

    @property
    def main_text(self):
        return next(iter(self.texts))


def folder_of(arm):
    """An arm's name in those of its runs' folders."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", arm)


class Reader:
    """What is wrong with a file, all of it at once."""

    def __init__(self, path):
        self.path, self.problems = path, []

    def add(self, text):
        self.problems.append(text)

    def unknown(self, key, valid, where):
        near = difflib.get_close_matches(str(key), valid, 1)
        self.add(f"{where}unknown key '{key}'; " +
                 (f"did you mean '{near[0]}'?" if near else f"valid here: {', '.join(valid)}"))

    def keys(self, value, types, required):
        for key, content in value.items():
            if key not in types:
                self.unknown(key, list(types), "")
            elif types[key] is float and isinstance(content, int):
                continue
            elif not isinstance(content, types[key]) or isinstance(content, bool) and types[key] is not bool:
                self.add(f"{key}: expected {types[key].__name__}, found {content!r}")
        for key in required:
            if key not in value:
                self.add(f"{key} is missing")

    def finish(self):
        if self.problems:
            raise BadUsage(f"{display(self.path)}: " + "; ".join(self.problems))


def of_size(value, size, where):
    """Every map of sizes in `value` as its entry of one size."""
    if isinstance(value, dict):
        if value and set(value) <= set(SIZES):
            if size not in value:
                raise BadUsage(f"{where}: says nothing of size {size}, only of {', '.join(value)}")
            return of_size(value[size], size, where)
        return {key: of_size(content, size, f"{where}: {key}") for key, content in value.items()}
    if isinstance(value, list):
        return [of_size(content, size, where) for content in value]
    return value


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_entries(figures, texts, reader):
    """That what stands in maps is of the type that their readers take."""
    for key, fits, what in (("steps", is_number, "a number"), ("text", is_number, "a number"),
                            ("models", lambda shape: isinstance(shape, dict), "a map of keys")):
        for name, content in figures[key].items():
            if not fits(content):
                reader.add(f"{key}: {name}: expected {what}, found {content!r}")
    for name, folder in texts.items():
        if not isinstance(folder, str):
            reader.add(f"texts: {name}: expected a folder or {STANDARD_TEXT}, found {folder!r}")


def steps_of(text, named):
    """'arm', 300, '0.25 source', 'source + arm': numbers, or named ones times a number, added up."""
    total = 0.0
    for term in str(text).split("+"):
        match = re.fullmatch(r"\s*(?:(\d+(?:\.\d+)?)\s*)?([a-z_]\w*)?\s*", term)
        if not match or not any(match.groups()) or match[2] and match[2] not in named:
            raise ValueError(f"steps '{text}': expected a number or one of {', '.join(named)}, each with a factor "
                             "before it, joined by +")
        total += float(match[1] or 1) * (named[match[2]] if match[2] else 1)
    if total < 1:
        raise ValueError(f"steps '{text}': less than one step")
    return round(total)


def check_names(kind, keys, own, place, reader):
    """Of keys of a command; which of those with a section there are, the command itself knows."""
    for key in keys:
        if TAKEN[kind].get(key):
            reader.add(f"{place}{key} is set by the study: {TAKEN[kind][key]}; leave it out")
        elif key not in (*own, *PLAIN_KEYS[kind]) and "." not in str(key):
            reader.unknown(key, [*own, *PLAIN_KEYS[kind], "section.key"], place)


def read_link(value, place, first, study, reader):
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in LINK_KEYS:
        reader.add(f"{place}: expected one of {', '.join(LINK_KEYS)} with its keys, found {value!r}")
        return None
    (kind, keys), = value.items()
    keys = keys or {}
    if not isinstance(keys, dict):
        reader.add(f"{place}: {kind}: expected keys, found {keys!r}")
        return None
    check_names(kind, keys, LINK_KEYS[kind], f"{place}: {kind}: ", reader)
    if first != ("model" in keys):
        reader.add(f"{place}: {kind}: " + ("the first command is a train with `model`, which says what is trained from "
                                           "random weights" if first else "model belongs to the first command alone"))
    for key in LINK_KEYS[kind]:
        number = key in ("steps", "warmup", "teacher")  # steps: also words, which steps_of reads
        words = key not in ("warmup", "teacher")
        if key in keys and not (number and is_number(keys[key]) or words and isinstance(keys[key], str)):
            reader.add(f"{place}: {kind}: {key}: expected a {'number' if number else 'name'}, found {keys[key]!r}")
            return None
    if keys.get("model", next(iter(study.figures["models"]))) not in study.figures["models"]:
        reader.unknown(keys["model"], list(study.figures["models"]), f"{place}: model: ")
    for key in ("text", "calibrate"):
        if keys.get(key, study.main_text) not in study.texts:
            reader.unknown(keys[key], list(study.texts), f"{place}: {key}: ")
    if keys.get("batches", BATCHES[0]) not in BATCHES:
        reader.unknown(keys["batches"], BATCHES, f"{place}: batches: ")
    if "recipe" in keys and not (ROOT / keys["recipe"]).is_file():
        shipped = {path.stem: path for path in (ROOT / "configs" / "upcycle").glob("*.yaml")}
        near = difflib.get_close_matches(Path(keys["recipe"]).stem, shipped, 1)
        reader.add(f"{place}: recipe: {keys['recipe']}: no such file" +
                   (f"; did you mean {shipped[near[0]].relative_to(ROOT)}?" if near else ""))
    if kind == "train":
        try:
            steps_of(keys.get("steps", ""), study.steps)
        except ValueError as problem:
            reader.add(f"{place}: {problem}")
    return Link(kind, keys)


def check_teachers(name, links, reader):
    for i, link in enumerate(links):
        teacher = link.own.get("teacher")
        trains = [k for k, earlier in enumerate(links[:i], 1) if earlier.kind == "train"]
        if teacher is not None and not (isinstance(teacher, int) and teacher in trains):
            reader.add(f"arms: {name}: command {i + 1}: teacher: expected the number of a train before it "
                       f"({', '.join(map(str, trains)) or 'there is none'}), found {teacher}")
        if teacher is None and any(str(key).startswith("train.teacher.") for key in link.keys):
            reader.add(f"arms: {name}: command {i + 1}: train.teacher.* without a `teacher`, the number of the train "
                       "of this arm that made it")


def read_arm(name, value, study, reader):
    if not isinstance(value, list) or not value:
        reader.add(f"arms: {name}: expected a list of commands")
        return []
    links = [read_link(link, f"arms: {name}: command {i + 1}", i == 0, study, reader) for i, link in enumerate(value)]
    if all(links):
        check_teachers(name, links, reader)
    links = [link for link in links if link]
    if links and links[-1].kind != "train":
        reader.add(f"arms: {name}: the last command is a train, whose end is compared")
    if any("batches" in link.keys for link in links[:-1]):
        reader.add(f"arms: {name}: batches belongs to the last train, which is compared")
    if links and ("batches" in links[-1].keys) != (study.rates == [0.0]):
        reader.add(f"arms: {name}: rates: [0.0] and batches belong together: only where nothing is learnt do two steps "
                   "have the same weights")
    if links and "optimizer.lr" in links[-1].keys:
        reader.add(f"arms: {name}: the learning rate of the last train is chosen from `rates`; leave optimizer.lr out")
    return links


def check_batches(value, needed, study, reader):
    """Of a comparison by a measure that wants its arms' batches laid out."""
    for name, links in study.arms.items():
        if links and name in (value.get("better"), value.get("than")) and links[-1].own.get("batches") != needed:
            reader.add(f"compare: by {value['by']}: the last train of '{name}' needs `batches: {needed}`")
    for key in COMPARE_KEYS[3:]:
        if key in value:
            reader.add(f"compare: by {value['by']}: it counts, and {key} says nothing to it; leave it out")


def read_comparison(value, study, reader):
    if not isinstance(value, dict):
        reader.add(f"compare: expected keys, found {value!r}")
        return None
    for key in value:
        if key not in COMPARE_KEYS:
            reader.unknown(key, list(COMPARE_KEYS), "compare: ")
    for key in ("better", "than"):
        if value.get(key) not in list(study.arms):
            reader.add(f"compare: {key}: expected an arm ({', '.join(study.arms)}), found {value.get(key)!r}")
    for key, valid in (("by", list(MEASURES)), ("at", AXES)):
        if value.get(key, valid[0]) not in valid:
            reader.add(f"compare: {key}: expected {' or '.join(valid)}, found {value[key]!r}")
    for key in ("worth", "most"):
        if not isinstance(value.get(key, 0), (int, float)) or value.get(key, 0) < 0:
            reader.add(f"compare: {key}: expected a number that is not negative, found {value[key]!r}")
    for measure, needed in MEASURES.items():
        if needed and value.get("by") == measure:
            check_batches(value, needed, study, reader)
    known = {key: content for key, content in value.items() if key in COMPARE_KEYS}
    return Comparison(**known) if {"better", "than"} <= set(known) else None


def names():
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def find(name):
    """The file of a study: a name of configs/studies, or a path."""
    if "/" in name or name.endswith(".yaml"):
        if not Path(name).is_file():
            raise BadUsage(f"{display(name)}: no such file")
        return Path(name)
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        raise BadUsage(f"unknown study '{display(name)}'; " +
                       (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names())}"))
    return STUDIES / f"{name}.yaml"


def read_figures(path):
    value, reader = read_yaml(path), Reader(path)
    reader.keys(value, SIZE_KEYS, SIZE_KEYS)
    reader.finish()
    return value


def read_study(path, size):
    value, reader = read_yaml(path), Reader(path)
    sizes = value.get("sizes", SIZES)
    if isinstance(sizes, list) and size not in sizes:
        raise BadUsage(f"{display(path)}: there is no size {size} of it, only {', '.join(map(str, sizes))}")
    value = of_size(value, size, display(path))
    reader.keys(value, STUDY_KEYS, ("claim", "arms", "compare"))
    reader.finish()
    value.pop("sizes", None)
    figures = read_figures(STUDIES / "sizes" / f"{size}.yaml")
    figures = {key: content | value.get(key, {}) if isinstance(content, dict) else value.get(key, content)
               for key, content in figures.items()}
    rates = sorted(figures["rates"])
    if rates != [0.0] and not (rates and all(isinstance(rate, float) and rate > 0 for rate in rates)):
        reader.add(f"rates: expected learning rates above 0, such as 1.0e-3, or 0.0 alone, found {rates}")
    study = Study(path.stem, path, size, " ".join(value["claim"].split()), " ".join(value.get("expect", "").split()),
                  value.get("texts") or {"text": STANDARD_TEXT}, rates, figures["steps"], value.get("last", {}), {},
                  [], value.get("fit", False), figures)
    check_entries(figures, study.texts, reader)
    check_names("train", figures["run"], (), "run: ", reader)
    check_names("train", study.last, (), "last: ", reader)
    check_names("upcycle", figures["recipe"], ("file",), "recipe: ", reader)
    if "optimizer.lr" in study.last:
        reader.add("last: the learning rate of the last train is chosen from `rates`; leave optimizer.lr out")
    reader.finish()  # what follows computes with them
    folders = {}
    for name, links in value["arms"].items():
        other = folders.setdefault(folder_of(str(name)), name)
        if other != name:
            reader.add(f"arms: {name}: its runs would lie in the folder of those of '{other}'; rename it")
        study.arms[str(name)] = read_arm(name, links, study, reader)
    study.compare = [c for c in (read_comparison(entry, study, reader) for entry in value["compare"]) if c]
    if not study.compare and not reader.problems:
        reader.add("compare: needs at least one comparison, of which the first gives the verdict")
    if set(sizes) - set(SIZES):
        reader.add(f"sizes: expected {', '.join(SIZES)}, found {', '.join(map(str, sizes))}")
    reader.finish()
    return study
