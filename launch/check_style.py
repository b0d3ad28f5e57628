#!/usr/bin/env python3
"""Style as a test: length of files and functions, names of files, left-overs, formatting.

Function length in C++ is measured by matching braces: a block that opens at namespace or class level and is no
namespace, class, struct, union, enum or initialiser is a function. What stands inside a function counts with it.
"""

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDERS = ["cmake", "kernels", "configs", "parallel", "data", "trainer", "upcycle", "launch", "tests"]
CPP = {".h", ".cpp", ".cu", ".cuh"}
SCRIPTS = {".py", ".sh"}
MAX_FILE, MAX_FUNCTION, MAX_COLUMN, MAX_OP_PARAMETERS = 400, 70, 120, 7
BAD_NAMES = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|\.|$)")
OP = re.compile(r"^void (\w+)\(([^;]*)\);", re.MULTILINE)  # the contracts of kernels/ops
LEFT_OVERS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "BOOT" + "STRAP")) + r")\b")
CLANG_FORMAT = "clang-format-14"
SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b")
TEXT = re.compile(r"""//[^\n]*|/\*.*?\*/|R"([^(\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*\"|(?<!\w)'(?:\\.|[^'\\\n])+'""",
                  re.DOTALL)
# Tests run beside each other, and variants of one test too: a name that is theirs in a folder of all would be shared.
SHARED_FOLDER = re.compile(r"\b(TempDir|temp_directory_path)\(")
OWN_FOLDER = "tests/support/temporary_directory.h"
KEPT = re.compile(r"// (namespace|clang-format)")


def blank_text(source):
    """Comments, strings and character literals as blanks, so that braces in them do not count."""
    return TEXT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def cpp_functions(source):
    """(name line, number of lines) of every function body that opens at namespace or class level."""
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group()), blank_text(source),
                  flags=re.MULTILINE)
    stack, head_start = [], 0  # stack: kind of each open block, and where it began
    for i, c in enumerate(text):
        if c == "{":
            head = " ".join(text[head_start:i].split())
            inside = stack[-1][0] if stack else "scope"
            if inside != "scope":
                kind = "inner"
            elif SCOPE.search(head) and not re.search(r"\)( const| noexcept| override)*$", head):
                kind = "scope"
            elif head.endswith("=") or ")" not in head:
                kind = "inner"
            else:
                kind = "function"
            begin = head_start + len(text[head_start:i]) - len(text[head_start:i].lstrip())
            stack.append((kind, text.count("\n", 0, begin) + 1))
            head_start = i + 1
        elif c == "}" and stack:
            kind, first = stack.pop()
            if kind == "function":
                yield first, text.count("\n", 0, i) + 2 - first
            head_start = i + 1
        elif c == ";" and (not stack or stack[-1][0] == "scope"):
            head_start = i + 1


def python_functions(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno + 1


def wide_ops(source):
    """(line, name, number of parameters) of each op that takes too many to tell apart by their places."""
    text = blank_text(source)
    for op in OP.finditer(text):
        parameters = re.sub(r"<[^<>]*>|\{[^{}]*\}", "", op[2]).count(",") + 1
        if parameters > MAX_OP_PARAMETERS:
            yield text.count("\n", 0, op.start()) + 1, op[1], parameters


def is_build_file(path):
    return path.suffix == ".cmake" or path.name == "CMakeLists.txt"


def check_file(root, path):
    text = (root / path).read_text(encoding="utf-8")
    lines, suffix = text.splitlines(), Path(path).suffix
    if BAD_NAMES.search(Path(path).name):
        yield f"{path}: name it by what it holds"
    if len(lines) > MAX_FILE:
        yield f"{path}: {len(lines)} lines, at most {MAX_FILE}"
    if suffix == ".h" and "#pragma once" not in lines[:3]:
        yield f"{path}:1: a header starts with #pragma once"
    for number, line in enumerate(lines, 1):
        if LEFT_OVERS.search(line):
            yield f"{path}:{number}: finish it or leave it out: {line.strip()}"
        if SHARED_FOLDER.search(line) and path.startswith("tests/") and suffix in CPP and path != OWN_FOLDER:
            yield f"{path}:{number}: files of a test lie in a folder of its own, {OWN_FOLDER}"
        # clang-format sees to code and leaves comments alone: it would break their tables.
        if len(line) > MAX_COLUMN and (
                suffix in SCRIPTS or is_build_file(Path(path)) or line.lstrip().startswith("//")):
            yield f"{path}:{number}: {len(line)} columns, at most {MAX_COLUMN}"
        if line != line.rstrip() or "\t" in line:
            yield f"{path}:{number}: trailing blank or tab"
    for number, name, parameters in wide_ops(text) if path.startswith("kernels/ops/") and suffix == ".h" else ():
        yield (f"{path}:{number}: {name} takes {parameters} parameters, at most {MAX_OP_PARAMETERS}; join those that "
               "belong together in a struct")
    functions = cpp_functions(text) if suffix in CPP else python_functions(text) if suffix == ".py" else ()
    for first, length in functions:
        if length > MAX_FUNCTION:
            yield f"{path}:{first}: a function of {length} lines, at most {MAX_FUNCTION}"


def check_format(root, paths):
    if not shutil.which(CLANG_FORMAT):
        yield f"{CLANG_FORMAT} is missing, so that formatting cannot be checked: apt-get install {CLANG_FORMAT}"
        return
    for begin in range(0, len(paths), 50):
        run = subprocess.run([CLANG_FORMAT, "--dry-run", "--Werror", *paths[begin:begin + 50]], cwd=root, text=True,
                             stderr=subprocess.PIPE, check=False)
        seen = set()
        for line in run.stderr.splitlines():
            match = re.match(r"([^:]+):(\d+):\d+: error:", line)
            if match and match[1] not in seen:
                seen.add(match[1])
                yield f"{match[1]}:{match[2]}: not formatted; run {CLANG_FORMAT} -i {match[1]}"
        if run.returncode != 0 and not seen:
            yield f"{CLANG_FORMAT} failed: {run.stderr.strip()[:500]}"


def without_words(source):
    """Comments without their words, so that the formatter does not break code for the room that these take."""
    return TEXT.sub(lambda m: "//" if m.group().startswith("//") and not KEPT.match(m.group()) else m.group(), source)


def check_comments(root, paths):
    """Code that its own trailing comment splits across lines: the comment belongs above it."""
    if not shutil.which(CLANG_FORMAT):
        return  # check_format tells
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(root / ".clang-format", folder)
        bare = {path: without_words((root / path).read_text(encoding="utf-8")) for path in paths}
        for path, text in bare.items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_text(text, encoding="utf-8")
        for begin in range(0, len(paths), 50):
            subprocess.run([CLANG_FORMAT, "-i", *paths[begin:begin + 50]], cwd=folder, check=True)
        for path, text in bare.items():
            ours, theirs = ([re.sub(r"\s*//.*", "", line) for line in source.splitlines()]
                            for source in (text, (Path(folder) / path).read_text(encoding="utf-8")))
            if ours != theirs:
                first = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(theirs))
                yield f"{path}:{first + 1}: split by its own trailing comment; put that above it"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().root
    files = sorted(str(p.relative_to(root))
                   for p in [root / "CMakeLists.txt", *(p for folder in FOLDERS for p in (root / folder).rglob("*"))]
                   if p.is_file() and (p.suffix in CPP | SCRIPTS or is_build_file(p)))
    if not files:
        sys.exit(f"check_style: no sources under {root}")
    problems = [problem for path in files for problem in check_file(root, path)]
    sources = [path for path in files if Path(path).suffix in CPP]
    problems += check_format(root, sources)
    problems += check_comments(root, sources)
    print("\n".join(problems) if problems else f"check_style: {len(files)} files")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
