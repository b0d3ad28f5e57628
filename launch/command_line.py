"""How the Python tools end: one line for what is wrong, never a traceback, and the exit statuses of upmoe.

0 done, 1 unexpected failure, 2 usage or configuration (also a Python without the packages of a tool), 3 bad input (a
file's content, or a file that cannot be read or written), 130 stopped from the keyboard. Output into a closed pipe
(`tool | head`) is no error. UPMOE_TRACEBACK=1 shows where an unexpected failure came from.
"""

import os
import signal
import sys
import traceback

# Loading the libraries of a tool takes a second; Ctrl-C then ends it without a word.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse  # noqa: E402
import difflib  # noqa: E402
from datetime import datetime  # noqa: E402


class ToolParser(argparse.ArgumentParser):
    """Names the nearest option where one is unknown, as upmoe does, before it asks for what is missing."""

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in words[:words.index("--")] if "--" in words else words:
            name = word.split("=", 1)[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name, known, 1)
                self.error(f"unknown option '{name}'; " +
                           (f"did you mean '{near[0]}'?" if near else "--help lists everything"))
        return super().parse_args(words, namespace)


class BadInput(Exception):
    """Wrong or missing files: exit status 3."""


class BadUsage(Exception):
    """A wrong configuration or command line: exit status 2."""


def line_time():
    """What a line of progress begins with: nothing on a terminal; in a file, which is read later, the time."""
    return "" if sys.stderr.isatty() else f"{datetime.now().astimezone().isoformat(timespec='seconds')} "


def words_of(error):
    """An operating system's error without its number."""
    name = "" if error.filename is None else f"{display(error.filename)}: "
    return f"{name}{error.strerror or error}"


def display(path):
    """A path that can be written anywhere, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "replace")


def missing_package(error):
    """The sentence about an ImportError of a package of launch/requirements.txt."""
    return (f"{sys.executable} cannot import {error.name}; run launch/setup.sh, or set UPMOE_PYTHON to a Python that "
            "has the packages of launch/requirements.txt")


def own_python(error):
    """The same of a tool that no command of upmoe starts, only people."""
    return f"{sys.executable} cannot import {error.name}; start it with .venv/bin/python, which launch/setup.sh makes"


def end_without_package(name, words):
    """For a tool whose packages are missing while it loads: ends as main()'s BadUsage would."""
    print(f"{name}: error: {words}", file=sys.stderr)
    sys.exit(2)


def unexpected(error):
    if os.environ.get("UPMOE_TRACEBACK"):
        traceback.print_exc()
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}{place}; UPMOE_TRACEBACK=1 shows more"


def run_tool(name, main):
    """main()'s exit status, or that of what it threw; `name` begins the line about it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # names of files are bytes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except BadInput as e:
        status, text = 3, str(e)
    except BadUsage as e:
        status, text = 2, str(e)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 0
    except OSError as e:
        status, text = 3, words_of(e)
    except KeyboardInterrupt:
        status, text = 130, "stopped"
    except MemoryError:
        status, text = 1, "out of memory"
    except SystemExit:
        raise
    except BaseException as e:  # noqa: BLE001  the one place that turns the rest into a line; panics of tokenizers too
        status, text = 1, unexpected(e)
    print(f"{name}: error: {text}" if status != 130 else f"\n{name}: {text}", file=sys.stderr)
    return status
