"""Documents out of text, JSON lines, JSON and Parquet files, packed or not, in pieces that several processes can
share."""

import codecs
import functools
import json
import os
from dataclasses import dataclass

from command_line import BadInput
from parquet_rows import row_blocks
from text_kinds import MAX_LINE, Opened, kind_of, require_small, whole_of

NOTHING, TEXT, CONTROL = "nothing", "text", "control"  # what stands before a piece of a document
TASK_BYTES = 4 << 20     # what one process takes at a time


@dataclass
class Piece:
    """Bytes [begin, end) of a file that is read as `kind`; of a packed file they come along as `data`, and of a Parquet
    file the JSON lines of its rows."""
    path: str
    kind: str
    begin: int
    end: int
    data: bytes | None = None
    first_line: int = 0   # where `data` is given: lines or rows before it
    consumed: int = 0     # bytes of the file on disk, for the progress bar


@dataclass
class Choices:
    """How the caller wants text to be read."""
    key: str = "text"
    kind: str = "auto"
    replace_invalid: bool = False
    skip_refused: bool = False

    def plain(self, piece, data):
        return plain_text(piece, data, self)

    def document_of(self, record, path, place):
        return text_of(record, path, place, self)

    def controls(self):
        """Names of the control tokens that documents hold beside those of their ends."""
        return []

    def check(self, speller):
        """Whether the tokenizer has what documents need beside their text."""

    def columns(self):
        """Names of columns of a table that belong to a document beside `key`, where there are such."""
        return []

    def begins_texts(self):
        """Whether documents begin by themselves with what a text of the model's begins."""
        return False

    def unread(self, document):
        """Names of what a record says that has no place in the document."""
        return ()

    def encode(self, text, speller, eos):
        """A document's tokens, none of an empty one; and of each whether it counts as a target, where that is known."""
        ids = speller.spell(text) if text else []
        return (ids + [eos] if ids else []), []


def decode(data, path, place, choices):
    """Text, and how many invalid sequences were replaced by U+FFFD (only where that was asked for)."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError as e:
        if not choices.replace_invalid:
            raise BadInput(f"{path}{place(e.start)}: not UTF-8 (byte {data[e.start]:#04x}); convert it, for example: "
                           "iconv -f LATIN1 -t UTF-8, or replace such bytes by U+FFFD with --replace-invalid") from None
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def plain_text(piece, data, choices):
    zero = data.find(0)
    if zero >= 0:
        raise BadInput(f"{piece.path}: is not text: byte {zero} is zero; if it is text all the same, remove those: "
                       "tr -d '\\000'")
    return decode(data.removeprefix(codecs.BOM_UTF8), piece.path, lambda at: f", byte {at}", choices)


def text_of(record, path, place, choices):
    """The document in a JSON record."""
    instead = f"to take {path} as plain text use --as text"
    if not isinstance(record, dict):
        raise BadInput(f"{path}{place}: expected an object with a text under '{choices.key}'; {instead}")
    if choices.key not in record:
        keys = ", ".join(map(str, list(record)[:8])) or "none"
        raise BadInput(f"{path}{place}: expected an object with a text under '{choices.key}', its keys are: {keys}; "
                       f"name the right one with --key, or {instead}")
    return text_in(record[choices.key], choices.key, path, place, choices)


def text_in(document, name, path, place, choices):
    """A value of a JSON record that is to be a text."""
    if not isinstance(document, str):
        cure = ("leave such records out, or give them an empty text" if document is None else
                "write the text that is meant there, for example with jq")
        raise BadInput(f"{path}{place}: '{name}' holds {json.dumps(document)[:40]}, expected a text; {cure}")
    surrogates = sum("\ud800" <= c <= "\udfff" for c in document) if not document.isascii() else 0
    if surrogates:  # an escape such as \ud800 alone: no character
        if not choices.replace_invalid:
            raise BadInput(f"{path}{place}: '{name}' holds half a character (an escape such as \\ud800 alone); "
                           "replace such by U+FFFD with --replace-invalid")
        document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document, surrogates


def text_of_parts(content):
    """A content that is a list of parts as one text, where all of them are texts."""
    texts = isinstance(content, list) and content and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content)
    return "".join(part["text"] for part in content) if texts else content


class Reading:
    """Texts of one record, and how many invalid characters were replaced in them."""

    def __init__(self, path, place, choices):
        self.path, self.place, self.choices, self.replaced = path, place, choices, 0

    def text(self, value, name):
        text, replaced = text_in(text_of_parts(value), name, self.path, self.place, self.choices)
        self.replaced += replaced
        return text

    def texts(self, value, name):
        """A JSON value, of which every text is read so."""
        if isinstance(value, str):
            return self.text(value, name)
        if isinstance(value, list):
            return [self.texts(one, name) for one in value]
        if isinstance(value, dict):
            return {self.text(key, name): self.texts(one, name) for key, one in value.items()}
        return value


def json_value(text, path, place):
    try:
        return json.loads(text)
    except RecursionError:
        raise BadInput(f"{path}{place}: not valid JSON: nested too deeply") from None
    except ValueError as e:
        raise BadInput(f"{path}{place}: not valid JSON: {e}; JSON lines have one record a line, as of jq -c; to take "
                       "the file as plain text use --as text") from None


def json_line(piece, number, line, choices):
    place = f":{number}"
    if len(line) > MAX_LINE:
        raise BadInput(f"{piece.path}{place}: a line of {len(line)} bytes, at most {MAX_LINE}")
    text, replaced = decode(line, piece.path, lambda at: f"{place}, byte {at} of the line", choices)
    document, surrogates = choices.document_of(json_value(text, piece.path, place), piece.path, place)
    return document, replaced + surrogates


def json_records(piece, data, choices):
    """Of a JSON file that is one value: a list of records, or one record."""
    text, replaced = decode(data.removeprefix(codecs.BOM_UTF8), piece.path, lambda at: f", byte {at}", choices)
    value = json_value(text, piece.path, "")

    def read(record, place, first):
        document, wrong = choices.document_of(record, piece.path, place)
        return document, wrong + (replaced if first else 0)

    for i, record in enumerate(value if isinstance(value, list) else [value]):
        yield functools.partial(read, record, f", record {i}" if isinstance(value, list) else "", i == 0)


def data_of(piece):
    if piece.data is not None:
        return piece.data
    with open(piece.path, "rb") as file:
        file.seek(piece.begin)
        data = file.read(piece.end - piece.begin)
    if len(data) != piece.end - piece.begin:
        raise BadInput(f"{piece.path}: became shorter while it was read")
    return data


class Refused:
    """Records that are left out because something is wrong with them, and with what words the first of them."""
    TOLD = 3

    def __init__(self):
        self.count, self.words = 0, []

    def add(self, error):
        self.count += 1
        if len(self.words) < self.TOLD:
            self.words.append(str(error))


def documents_of(task, choices, refused=None):
    """(document, replaced) of each document of a task, which is a list of pieces; of records that are refused none
    where `refused` keeps them."""
    for piece in task:
        if piece.kind == "empty":
            continue
        if piece.kind == "text":
            yield choices.plain(piece, data_of(piece))
            continue
        for read in records_of(piece, choices):
            try:
                document = read()
            except BadInput as e:
                if refused is None:
                    raise
                refused.add(e)
            else:
                yield document


def records_of(piece, choices):
    """For each record of a piece what reads it."""
    data = data_of(piece)
    if piece.kind == "json":
        yield from json_records(piece, data, choices)
    elif piece.kind == "parquet":
        for row, line in enumerate(data.split(b"\n"), piece.first_line):
            yield functools.partial(choices.document_of, json.loads(line), piece.path, f", row {row}")
    else:
        yield from json_lines(piece, data, choices)


def json_lines(piece, data, choices):
    if piece.begin == 0:
        data = data.removeprefix(codecs.BOM_UTF8)

    @functools.cache  # a pass over what lies before: for a line that is refused alone, and once
    def before():
        return lines_before(piece)

    def read(i, line):
        try:
            return json_line(piece, i, line, choices)
        except BadInput:
            json_line(piece, 1 + before() + i, line, choices)
            raise

    for i, line in enumerate(data.split(b"\n")):
        if line.strip():
            yield functools.partial(read, i, line)


def lines_before(piece):
    if piece.data is not None:
        return piece.first_line
    lines, left = 0, piece.begin
    with open(piece.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def next_line_end(file, at, size):
    """The first offset behind `at` where a line ends, so that lines stay whole."""
    if at >= size:
        return size
    file.seek(at - 1)
    while block := file.read(1 << 16):
        found = block.find(b"\n")
        if found >= 0:
            return min(size, at + found)
        at += len(block)
    return size


def pieces_on_disk(path, kind, size):
    begin = 0
    while begin < size:
        end = size
        if kind == "jsonl" and size - begin > TASK_BYTES:
            with open(path, "rb") as file:
                end = next_line_end(file, begin + TASK_BYTES, size)
            if end - begin > MAX_LINE + TASK_BYTES:  # would be read whole
                number = 1 + lines_before(Piece(path, kind, begin + TASK_BYTES, end))
                raise BadInput(f"{path}:{number}: a line of more than {MAX_LINE} bytes")
        yield Piece(path, kind, begin, end, consumed=end - begin)
        begin = end


def pieces_unpacked(path, kind, opened):
    """The content of a packed file, JSON lines a few whole lines at a time."""
    begin, lines, told, rest = 0, 0, 0, b""

    def piece(data):
        nonlocal begin, lines, told
        made = Piece(path, kind, begin, begin + len(data), data, lines, opened.raw.tell() - told)
        begin, lines, told = made.end, lines + data.count(b"\n"), opened.raw.tell()
        return made

    if kind != "jsonl":
        data = opened.read() if kind == "text" else whole_of(path, opened)
        yield piece(data)
        return
    while block := opened.read(TASK_BYTES):
        rest += block
        if len(rest) > MAX_LINE + TASK_BYTES:
            raise BadInput(f"{path}:{lines + 1}: a line of more than {MAX_LINE} bytes")
        end = rest.rfind(b"\n") + 1
        if end > 0:
            yield piece(rest[:end])
            rest = rest[end:]
    if rest:
        yield piece(rest)


def pieces_of_rows(path, choices):
    for data, first, consumed in row_blocks(path, choices.key, choices.columns(), TASK_BYTES, MAX_LINE):
        yield Piece(path, "parquet", 0, len(data), data, first, consumed)


def pieces_of(path, choices):
    with Opened(path) as opened:
        kind = kind_of(path, opened, choices.kind)
        if kind == "empty":
            yield Piece(path, kind, 0, 0, b"", consumed=os.path.getsize(path))
        elif kind == "parquet":
            yield from pieces_of_rows(path, choices)
        elif opened.compressed:
            yield from pieces_unpacked(path, kind, opened)
        else:
            if kind == "json":
                require_small(path, os.path.getsize(path))
            yield from pieces_on_disk(path, kind, os.path.getsize(path))


def plan_tasks(paths, choices):
    """Pieces in order, about TASK_BYTES together; depends on the files alone, not on the processes."""
    task, filled = [], 0
    for path in paths:
        for piece in pieces_of(path, choices):
            task.append(piece)
            filled += piece.end - piece.begin
            if filled >= TASK_BYTES:
                yield task
                task, filled = [], 0
    if task:
        yield task
