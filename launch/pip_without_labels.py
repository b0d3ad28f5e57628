#!/usr/bin/env python3
"""Installs packages whose own requirements name a build by its label, as torch==2.13.0+cpu is one of torch==2.13.0.

    VENV/bin/python launch/pip_without_labels.py PACKAGE==VERSION...

A registry takes no labelled builds, so pip finds none there; the one without a label takes its place. Into the
environment of the Python that runs this.
"""

import email
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from command_line import BadInput, BadUsage, run_tool


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", *words, "--disable-pip-version-check"], check=True)


def unlabelled(requirement):
    """`torch==2.13.0+cpu; sys_platform == "linux"` without its label."""
    name, mark, condition = requirement.partition(";")
    return re.sub(r"(==\s*[^\s,+]+)\+[\w.]+", r"\1", name) + mark + condition


def requirements_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        if len(names) != 1:
            raise BadInput(f"{wheel}: a wheel has its requirements in one file, this has {len(names)}")
        words = email.message_from_bytes(archive.read(names[0]))
    return [unlabelled(requirement) for requirement in words.get_all("Requires-Dist") or []]


def install(packages, install_with=pip):
    with tempfile.TemporaryDirectory() as folder:
        install_with("download", "--no-deps", "--only-binary=:all:", "--dest", folder, *packages)
        wheels = sorted(Path(folder).glob("*.whl"))
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("".join(f"{line}\n" for wheel in wheels for line in requirements_of(wheel)), encoding="utf-8")
        install_with("install", "-r", str(wanted))
        install_with("install", "--no-deps", *map(str, wheels))


def main():
    packages = sys.argv[1:]
    if packages in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    if not packages or any(not re.fullmatch(r"[\w.-]+==[\w.]+", package) for package in packages):
        raise BadUsage("expected PACKAGE==VERSION...")
    try:
        install(packages)
    except subprocess.CalledProcessError as e:
        return e.returncode
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("pip_without_labels", main))
