"""A file that stands under its name complete or not at all: no reader finds half of one."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def whole_file(path):
    """Where to write it meanwhile; it gets its name when the block is through, and none when the block fails."""
    part = Path(f"{path}.part")
    yield part
    os.replace(part, path)


def write_whole(path, text):
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
