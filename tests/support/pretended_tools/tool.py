#!/usr/bin/env python3
"""The tools that launch/setup.sh calls (apt-get, dpkg, cmake, ninja, python3, ...), pretended, for setup_test.py.

usage: tool.py NAME ARGUMENT... What is installed, configured and built is kept as files under PRETENDED; each call is a
line of its log. The call of number KILL_AT does half of its work and kills its whole process group, as a power cut or
Ctrl-C would.
"""

import json
import os
import signal
import sys
from pathlib import Path

STATE = Path(os.environ["PRETENDED"])
NAME, ARGUMENTS = sys.argv[1], sys.argv[2:]


def fail(words, status=1):
    print(words, file=sys.stderr)
    sys.exit(status)


def read(name):
    path = STATE / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(name, value):
    (STATE / name).write_text(json.dumps(value), encoding="utf-8")


def log_call():
    with (STATE / "log").open("a", encoding="utf-8") as log:
        log.write(f"{NAME} {' '.join(ARGUMENTS)}\n")
    number = len((STATE / "log").read_text(encoding="utf-8").splitlines())
    return number == int(os.environ.get("KILL_AT", "0"))


def killed():
    os.killpg(0, signal.SIGKILL)
    signal.pause()


def half_or_whole(path, text, half):
    """What a tool writes: all of it, or the first half before it is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text[:len(text) // 2] if half else text, encoding="utf-8")
    if half:
        killed()


def listed_version(package):
    lines = Path(os.environ["PACKAGES"]).read_text(encoding="utf-8").splitlines()
    return next(line.split()[1] for line in lines if line.split()[0] == package).rstrip("*")


def apt_get(half):
    if read("other_apt").get("turns", 0) > 0:
        write("other_apt", {"turns": read("other_apt")["turns"] - 1})
        fail("E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)", 100)
    if "update" in ARGUMENTS:
        write("lists", {"fresh": True})
    if "install" not in ARGUMENTS or "--fix-broken" in ARGUMENTS:
        if half:
            killed()
        return
    installed = read("installed")
    if "half-configured" in installed.values():
        fail("E: dpkg was interrupted, you must manually run 'dpkg --configure -a' to correct the problem.", 100)
    if not read("lists").get("fresh"):
        if half:
            killed()
        fail("E: Failed to fetch: 404  Not Found", 100)
    names = [argument.split("=")[0] for argument in ARGUMENTS if "=" in argument and not argument.startswith("-")]
    for number, name in enumerate(names):
        installed[name] = "half-configured" if half and number == len(names) // 2 else "installed"
        write("installed", installed)
        if installed[name] != "installed":
            killed()


def dpkg(half):
    if half:
        killed()
    if ARGUMENTS == ["--configure", "-a"]:
        write("installed", {name: "installed" for name in read("installed")})


def dpkg_query(_):
    installed = read("installed")
    for name in ARGUMENTS[3:]:
        if name in installed:
            print(name, installed[name], listed_version(name))
    if not all(name in installed for name in ARGUMENTS[3:]):
        fail("dpkg-query: no packages found matching ...")


def apt_cache(_):
    for name in ARGUMENTS[1:]:
        print(f"{name:>25} | {listed_version(name)}-1 | somewhere bookworm/main amd64 Packages")
        print(f"{'source-of-' + name:>25} | {listed_version(name)}-1 | somewhere bookworm/main Sources")


def cmake(half):
    build = Path("build/release")
    (build / "CMakeCache.txt").write_text(
        "\n".join(f"{a[2:].replace('=', ':STRING=')}" for a in ARGUMENTS if a.startswith("-D")), encoding="utf-8")
    half_or_whole(build / "build.ninja", "rules, and all of them", half)


def ninja(half):
    build = Path(ARGUMENTS[ARGUMENTS.index("-C") + 1])
    if (build / "build.ninja").read_text(encoding="utf-8") != "rules, and all of them":
        fail("ninja: error: build.ninja:1: unexpected EOF")
    if "-n" in ARGUMENTS:
        if half:
            killed()
        return
    half_or_whole(build / "upmoe", "#!/bin/sh\nexit 0\n", half)
    (build / "upmoe").chmod(0o755)


def python3(half):
    if ARGUMENTS == ["-V"]:
        print("Python 3.11.2")
    elif ARGUMENTS[:2] == ["-m", "venv"]:
        target = Path(ARGUMENTS[2]) / "bin" / "python"
        target.parent.mkdir(parents=True)
        target.symlink_to(os.environ["UPMOE_SYSTEM_PYTHON"])
        half_or_whole(Path(ARGUMENTS[2]) / "pyvenv.cfg", "home = /usr/bin", half)
    elif ARGUMENTS[:3] == ["-m", "pip", "install"]:
        half_or_whole(Path(os.environ["PRETENDED_AS"]).parent.parent / "packages", "all packages", half)


def compiler(_):
    print(f"c++ of a {os.environ.get('PROCESSOR', 'processor')}")


TOOLS = {"apt-get": apt_get, "apt-cache": apt_cache, "dpkg": dpkg, "dpkg-query": dpkg_query, "cmake": cmake,
         "ninja": ninja, "python3": python3, "c++": compiler}
# Questions leave nothing behind that a kill could cut in two.
QUESTIONS = {"apt-cache", "dpkg-query", "c++"}

if __name__ == "__main__":
    TOOLS[NAME](NAME not in QUESTIONS and ARGUMENTS != ["-V"] and log_call())
