"""A disk that writes down what reaches it, and what a power cut at any moment would leave on it.

The disk is one file of a FUSE file system that lives in this process, behind a loop device: so each write and each
flush of the file system on it passes through here, in its order, and an image can be made for the moment after any of
them. What was written before the last flush is on the disk; of what came after it a disk with a cache of its own may
have kept all, nothing or any part, and have cut the last write in two at a sector.

Needs root, /dev/fuse and loop devices. Mounts lie in a mount namespace of this process and go with it.
"""

import ctypes
import errno
import os
import struct
import subprocess
import threading
from pathlib import Path

SECTOR = 4096  # what a disk writes whole
FLUSH = None  # in the list of requests, among (offset, bytes)
CLONE_NEWNS, MNT_DETACH = 0x20000, 2
# Requests of the FUSE protocol (linux/fuse.h); any other is told ENOSYS.
FORGET, GETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH_FILE, INIT = 2, 3, 14, 15, 16, 17, 18, 20, 25, 26
INTERRUPT, DESTROY, FALLOCATE, BATCH_FORGET = 36, 38, 43, 42
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
LIBC = ctypes.CDLL(None, use_errno=True)


class CannotRecord(Exception):
    """This machine or this user lacks what it takes."""


def system(result, what):
    if result != 0:
        raise CannotRecord(f"{what}: {os.strerror(ctypes.get_errno())}")


def command(*words):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRecord(f"{words[0]} ended with {done.returncode}: {done.stderr.strip()}")


def enter_own_namespace():
    """Of mounts, for this thread and those that it starts."""
    if os.geteuid() != 0:
        raise CannotRecord("only root can mount")
    system(LIBC.unshare(CLONE_NEWNS), "a mount namespace")
    command("mount", "--make-rprivate", "/")


class RecordedDisk:
    """`content` behind `mount_point`, which is a file system's folder until unmount()."""

    def __init__(self, folder, content, options):
        self.content, self.requests = bytearray(content), []
        self.device_file, self.mount_point = Path(folder) / "device", Path(folder) / "disk"
        self.device_file.touch()
        self.mount_point.mkdir(exist_ok=True)
        try:
            self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise CannotRecord(f"/dev/fuse: {e.strerror}") from None
        system(LIBC.mount(b"recorded", os.fsencode(self.device_file), b"fuse", 0,
                          f"fd={self.fuse},rootmode=100000,user_id=0,group_id=0".encode()), "mounting FUSE")
        self.server = threading.Thread(target=self.serve, daemon=True)
        self.server.start()
        try:
            command("mount", "-t", "ext4", "-o", f"loop,{options}", self.device_file, self.mount_point)
        except CannotRecord:
            self.detach()
            raise

    def settle(self):
        """Lets the file system write what it still holds back."""
        command("sync", "-f", self.mount_point)

    def unmount(self):
        command("umount", self.mount_point)
        self.detach()

    def detach(self):
        LIBC.umount2(os.fsencode(self.device_file), MNT_DETACH)
        self.server.join(timeout=30)
        os.close(self.fuse)

    def serve(self):
        while True:
            try:
                self.serve_one()
            except OSError as e:
                if e.errno != errno.ENOENT:  # ENOENT: the request was taken back
                    return  # ENODEV: unmounted

    def serve_one(self):
        request = os.read(self.fuse, (1 << 20) + 4096)
        _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        error, answer = self.answer(opcode, memoryview(request)[IN_HEADER.size:])
        os.write(self.fuse, OUT_HEADER.pack(OUT_HEADER.size + len(answer), -error, unique) + answer)

    def answer(self, opcode, body):
        if opcode == INIT:  # protocol 7.31; writes of up to 128 KiB (bit 5)
            return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 1 << 5, 16, 12, 1 << 17, 1, 32, 0, 0)
        if opcode == GETATTR:
            size = len(self.content)
            return 0, struct.pack("<QII6Q10I", 3600, 0, 0, 1, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0,
                                  0, 4096, 0)
        if opcode == OPEN:
            return 0, struct.pack("<QII", 0, 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, bytes(self.content[offset:offset + size])
        if opcode == WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            written = bytes(body[40:40 + size])
            self.content[offset:offset + size] = written
            self.requests.append((offset, written))
            return 0, struct.pack("<II", size, 0)
        if opcode == FSYNC:
            self.requests.append(FLUSH)
            return 0, b""
        if opcode in (RELEASE, FLUSH_FILE, DESTROY):
            return 0, b""
        return (errno.EOPNOTSUPP if opcode == FALLOCATE else errno.ENOSYS), b""


def after_cut(content, requests, count, draw, kept):
    """The image that a cut after `count` requests leaves of a disk that began as `content`. Writes since the last flush
    are kept with the probability `kept`; with less than 1 the last one kept may be torn."""
    image = bytearray(content)
    flushed = max((i + 1 for i in range(count) if requests[i] is FLUSH), default=0)
    for i, request in enumerate(requests[:count]):
        if request is FLUSH or (i >= flushed and draw.random() >= kept):
            continue
        offset, written = request
        if i == count - 1 and kept < 1:
            written = written[:SECTOR * draw.randint(0, len(written) // SECTOR)]
        image[offset:offset + len(written)] = written
    return image
