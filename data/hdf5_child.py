"""HDF5 in a process of its own.

The library does not outlive a failed read or write: what it could not put on the disk it tries again while it closes
and while Python ends, and then it may well end the process by a signal. So it works in a child, which tells its first
error and ends without Python's tidying; its parent has an OSError of it, or of its silent end.
"""

import ctypes
import errno
import json
import os
import re
import signal

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def die_with(parent):
    """For a process just forked: a parent that is killed alone would leave it working, or waiting for ever."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def in_child(path, work):
    """work(), which reads and writes the HDF5 file `path` and whose result goes nowhere."""
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(reader)
        work_and_end(parent, writer, work)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            told = pipe.read()
    except BaseException:  # a signal that ends the parent
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if told:
        number, text = json.loads(told)
        raise OSError(number, text, path)
    if status != 0:
        end = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise OSError(errno.EIO, f"the HDF5 library ended {end} at it, without a word; is the disk full?", path)


def work_and_end(parent, writer, work):
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # h5py prints what it can raise no more
    try:
        work()
    except BaseException as e:
        os.write(writer, json.dumps(errno_and_text(e)).encode())
        os._exit(1)
    os._exit(0)


def errno_and_text(e):
    """h5py has an error of its own kind for each of its functions; the number, if there is one, stands in the text."""
    if isinstance(e, OSError) and e.errno is not None:
        return e.errno, e.strerror
    text = " ".join(str(e).split())
    number = re.search(r"errno = (\d+)", text)
    return int(number[1]) if number else errno.EIO, f"{type(e).__name__}: {text}"
