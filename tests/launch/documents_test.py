"""What the documents tell a reader to type exists: files, presets, build options, tests, environment variables, and the
options of every command of the project, in README.md, CONTRIBUTING.md, docs/ and headers of scripts and CMake files."""

import ast
import json
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
UPMOE, BUILD = os.environ["UPMOE"], os.environ["UPMOE_BINARY_DIR"]
FOLDERS = "launch|tests|configs|docs|data|kernels|parallel|trainer|upcycle|cmake"
NOT_OURS = re.compile(r".*/x(_test)?\.\w+")  # CONTRIBUTING.md tells how to make an op x


def listed(*patterns):
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())


def header(path):
    """The comment or doc string that a script or a CMake file begins with, and its comments with commands."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text), clean=False) or ""
    return "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


def documents():
    for path in listed("*.md", "docs/*.md", "tests/golden/README.md"):
        yield path, path.read_text(encoding="utf-8")
    for path in listed("launch/*.*", ".ci/run", "tests/*.*", "tests/bench/*.*", "tests/*/CMakeLists.txt"):
        if path.suffix in {".sh", ".py", ".def", ".sbatch", ".txt", ""}:
            yield path, header(path)


def braces(word):
    match = re.search(r"\{([^{}]*)\}", word)
    if not match:
        return [word]
    return [w for part in match[1].split(",") for w in braces(word[:match.start()] + part + word[match.end():])]


def commands(text):
    """Words of each command line: indented blocks with their continuation lines, and what stands in backticks."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", joined)
    for line in lines:
        line = re.split(r"\s#\s|\s{3,}#", line)[0]
        for part in re.split(r"&&|;|\|\|| \| ", line):
            yield part.split()


class Documents(unittest.TestCase):
    def each(self, pattern):
        count = 0
        for path, text in documents():
            for match in re.finditer(pattern, text):
                count += 1
                yield f"{path.relative_to(ROOT)}: {match[0]}", match
        self.assertGreater(count, 0, f"nothing in the documents looks like {pattern}; this test has gone blind")

    def test_files(self):
        lost = []
        for where, match in self.each(rf"(?<![\w/.$}}-])(?:\./)?((?:{FOLDERS})/[\w./{{}},*-]*\w[}}*]?)"):
            for word in braces(match[1]):
                if not NOT_OURS.fullmatch(word) and not any(ROOT.glob(word)) and not any(ROOT.glob(word + ".cpp")):
                    lost.append(where)
        self.assertEqual(lost, [])

    def test_headers_are_doc_strings_alone(self):
        for path in listed("launch/*.py", "tests/*.py", "tests/bench/*.py"):
            begin = header(path).split("\n", 1)[0]
            self.assertTrue(begin, path)
            self.assertIn(begin, path.read_text(encoding="utf-8").split('"""', 2)[1], path)
            self.assertNotRegex(header(path), r"(?m)^(import|from|def) ", path)

    def test_presets(self):
        presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
        names = {kind: {preset["name"] for preset in presets[kind] if not preset.get("hidden")}
                 for kind in ("configurePresets", "buildPresets", "testPresets")}
        kinds = {"cmake --preset": "configurePresets", "cmake --build --preset": "buildPresets",
                 "ctest --preset": "testPresets"}
        for where, match in self.each(r"((?:cmake|cmake --build|ctest) --preset)[ =](\w[\w-]*)"):
            self.assertIn(match[2], names[kinds[match[1]]], where)

    def test_build_options(self):
        files = "\n".join(path.read_text(encoding="utf-8") for path in
                          listed("CMakeLists.txt", "*/CMakeLists.txt", "tests/*/CMakeLists.txt", "cmake/*.cmake"))
        options = set(re.findall(r"option\((UPMOE_\w+)", files))
        options |= set(re.findall(r"set\((UPMOE_\w+)[^)]*CACHE", files)) | {"CMAKE_BUILD_TYPE", "CMAKE_CXX_FLAGS"}
        for where, match in self.each(r"-D(UPMOE_\w+)="):
            self.assertIn(match[1], options, where)
        presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
        for preset in presets["configurePresets"]:
            for name in preset.get("cacheVariables", {}):
                self.assertTrue(name in options or name.startswith("CMAKE_"), f"{preset['name']}: {name}")

    def test_environment_variables(self):
        sources = "\n".join(path.read_text(encoding="utf-8") for path in listed(
            "launch/*.*", "tests/*.sh", "tests/**/*.cpp", "tests/**/*.h", "tests/**/*.py", "tests/**/*.sh", "*/*.cpp",
            "*/*/*.cpp", "**/CMakeLists.txt", "cmake/*.cmake", "kernels/**/*.cu", "kernels/**/*.cpp", "data/*.py")
            if "build" not in path.parts and path != Path(__file__))
        uses = {name for name in re.findall(r"\bUPMOE_[A-Z_]+\b", sources)}
        code = re.sub(r"(?m)^\s*(#|//).*$", "", sources)
        for where, match in self.each(r"\bUPMOE_[A-Z_]+\b"):
            self.assertIn(match[0], uses, where)
            self.assertRegex(code, rf"\b{match[0]}\b", f"{where}: nothing reads it")

    def test_tests(self):
        # From a folder of its own: ctest empties the log of the folder that it is asked about, even for a list.
        with tempfile.TemporaryDirectory() as aside:
            (Path(aside) / "CTestTestfile.cmake").write_text(f'subdirs("{BUILD}")\n', encoding="utf-8")
            shown = subprocess.run(["ctest", "--test-dir", aside, "-N"], capture_output=True, text=True,
                                   check=True).stdout
        names = set(re.findall(r"Test +#\d+: (\S+)", shown))
        self.assertIn("documents_test", names)
        # And those of other builds: without CUDA or under a sanitizer some are not there.
        for path in listed("tests/*/CMakeLists.txt"):
            text = path.read_text(encoding="utf-8")
            names |= set(re.findall(r"(?:upmoe_\w*test\(|add_test\(NAME )(\w+)", text))
            for name, orders in re.findall(r"upmoe_pretended_gpu_test\((\w+)[^)]*ORDERS ([\d ]+)", text):
                names |= {f"{name}_on_gpu_{order}" for order in orders.split()}
        for where, match in self.each(r"`((?:\w+_)?test(?:_on_gpu)?[\w*]*|\*_on_gpu_\*)`"):
            pattern = re.compile(match[1].replace("*", ".*") + r"(_\w+)?$")
            self.assertTrue(any(pattern.match(name) for name in names), where)

    def test_options_of_our_commands(self):
        helps, count, wrong = {}, 0, []
        for path, text in documents():
            for words in commands(text):
                program = None
                for at, word in enumerate(words):
                    own = re.fullmatch(rf"(?:\./)?((?:{FOLDERS})/[\w/.-]+\.(?:sh|py|sbatch))", word)
                    if own and (ROOT / own[1]).is_file():
                        program = (ROOT / own[1]).read_text(encoding="utf-8")
                    elif re.fullmatch(r"(build/release/)?upmoe(\.sif)?", word) and at + 1 < len(words):
                        program = self.help_of(helps, words[at + 1])
                    elif word.startswith("--") and len(word) > 3 and program is not None:
                        option = re.match(r"--[\w-]+", word)[0]
                        count += 1
                        if not re.search(rf"{option}\b(?!-)", program):
                            wrong.append(f"{path.relative_to(ROOT)}: {' '.join(words)}: {option}")
        self.assertGreater(count, 20)
        self.assertEqual(wrong, [])

    def help_of(self, helps, command):
        if command not in helps:
            done = subprocess.run([UPMOE, command, "--help"], capture_output=True, text=True, check=False)
            helps[command] = done.stdout if done.returncode == 0 else None
        return helps[command]


if __name__ == "__main__":
    unittest.main()
