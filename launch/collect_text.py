#!/usr/bin/env python3
"""Chooses the quickstart's text: writes two lists of files, one to train on and one held out.

Without --text it takes the sources of Python's standard library as found on this machine. The order is that of a hash
of the path below the folder, so it mixes topics and is the same everywhere; files are taken until --megabytes are
reached, and every 20th is held out.
"""

import argparse
import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from command_line import BadInput, ToolParser, display, run_tool

sys.path.append(str(Path(__file__).resolve().parent.parent / "data"))
from text_documents import Choices, documents_of, plan_tasks  # noqa: E402

HELD_OUT_EVERY = 20
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
LARGEST_FILE = 400_000  # bytes: tables in disguise


def candidates(folder, suffixes):
    for path in folder.rglob("*"):
        below = path.relative_to(folder)
        if suffixes is not None and (path.suffix not in suffixes or SKIPPED_FOLDERS & set(below.parts[:-1])):
            continue
        if path.is_file() and not path.is_symlink() and 0 < path.stat().st_size <= LARGEST_FILE:
            yield hashlib.sha256(os.fsencode(below.as_posix())).digest(), path


def is_text(path):
    """What data/tokenize.py takes without being told anything about it."""
    try:
        tasks = plan_tasks([str(path)], Choices())
        return any(text for task in tasks for text, _ in documents_of(task, Choices()))
    except (BadInput, OSError):
        return False


def main():
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="folder of text files to use instead")
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and valid.txt")
    args = parser.parse_args()
    folder = (args.text or Path(sysconfig.get_paths()["stdlib"])).resolve()
    if not folder.is_dir():
        raise BadInput(f"{display(folder)}: is not a folder")
    chosen, size = [], 0
    for _, path in sorted(candidates(folder, None if args.text else {".py"})):
        if size >= args.megabytes * 1e6:
            break
        if is_text(path):
            chosen.append(path)
            size += path.stat().st_size
    lists = {"valid.txt": chosen[HELD_OUT_EVERY - 1::HELD_OUT_EVERY],
             "train.txt": [path for i, path in enumerate(chosen, 1) if i % HELD_OUT_EVERY]}
    if not lists["valid.txt"] or size < 500_000:
        raise BadInput(f"{display(folder)}: holds {len(chosen)} usable text files of {size / 1e6:.1f} MB together; "
                       f"at least {HELD_OUT_EVERY} files and 0.5 MB are needed. Give another folder with --text")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, paths in lists.items():
        (args.out / name).write_bytes(b"".join(os.fsencode(path) + b"\n" for path in paths))
    print(f"text: {len(chosen)} files, {size / 1e6:.1f} MB from {display(folder)}; {len(lists['valid.txt'])} of them "
          "held out")


if __name__ == "__main__":
    sys.exit(run_tool("collect_text", main))
