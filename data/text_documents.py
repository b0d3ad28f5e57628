"""Documents out of text files and .jsonl files, by byte ranges that several processes can share."""

import codecs
import json
import os

TASK_BYTES = 4 << 20     # what one process takes at a time
MAX_LINE = 64 << 20      # of a .jsonl file


class BadInput(Exception):
    pass


def is_jsonl(path):
    return path.endswith(".jsonl")


def without_mark(path, data):
    """UTF-8 bytes without the byte order mark; other encodings that announce themselves are refused."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"{path}: is UTF-16; convert it to UTF-8")
    return data[len(codecs.BOM_UTF8):] if data.startswith(codecs.BOM_UTF8) else data


def decode(data):
    """Text, and how many invalid sequences were replaced by U+FFFD."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def json_text(path, line_number, line, key):
    if len(line) > MAX_LINE:
        raise BadInput(f"{path}:{line_number}: a line of {len(line)} bytes, at most {MAX_LINE}")
    text, replaced = decode(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}:{line_number}: not valid JSON: {e}") from None
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise BadInput(f"{path}:{line_number}: expected an object with a text under '{key}'")
    document = record[key]
    surrogates = sum("\ud800" <= c <= "\udfff" for c in document) if not document.isascii() else 0
    if surrogates:  # an escape such as \ud800 alone: no character
        document = document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        replaced += surrogates
    return document, replaced


def documents_of(task, key):
    """(text, replaced) of each document of a task: a list of (path, begin, end) byte ranges."""
    for path, begin, end in task:
        with open(path, "rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
            if len(data) != end - begin:
                raise BadInput(f"{path}: became shorter while it was read")
            if begin == 0:
                data = without_mark(path, data)
            if not is_jsonl(path):
                yield decode(data)
                continue
            file.seek(0)
            first_line = None
            for i, line in enumerate(data.split(b"\n")):
                if not line.strip():
                    continue
                try:
                    yield json_text(path, i, line, key)
                except BadInput:  # the line number costs a pass over what lies before, so only now
                    first_line = 1 + count_lines(file, begin)
                    json_text(path, first_line + i, line, key)
                    raise


def count_lines(file, end):
    lines, left = 0, end
    while left > 0:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
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


def plan_tasks(paths):
    """Byte ranges in order, about TASK_BYTES together; depends on the files alone, not on the processes."""
    task, filled = [], 0
    for path in paths:
        size = os.path.getsize(path)
        begin = 0
        while begin < size:
            end = size
            if is_jsonl(path) and size - begin > TASK_BYTES:
                with open(path, "rb") as file:
                    end = next_line_end(file, begin + TASK_BYTES, size)
            task.append((path, begin, end))
            filled += end - begin
            begin = end
            if filled >= TASK_BYTES:
                yield task
                task, filled = [], 0
    if task:
        yield task
