"""Data packed with zstd as a file. The package's own one takes an end within a frame for the end of the data."""

import io

from command_line import BadUsage, missing_package

INPUT_BYTES = 4096        # at a time: they may unpack to many thousand times as much
LARGEST_WINDOW = 1 << 31  # of zstd --long=31; by default less than what --long makes is taken


class DamagedZstd(Exception):
    """What zstd cannot unpack."""


class Frames(io.RawIOBase):
    """Frames of zstd one behind the other, for reading from the beginning."""

    def __init__(self, packed, zstandard):
        super().__init__()
        self.packed, self.zstandard = packed, zstandard
        self.seek(0)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        if (offset, whence) == (0, io.SEEK_CUR):  # where one is
            return self.place
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("of packed data only the beginning can be sought")
        self.packed.seek(0)
        self.frame, self.rest, self.ready, self.place = None, b"", memoryview(b""), 0
        return 0

    def readinto(self, buffer):
        while not self.ready:
            if not self.unpack():
                return 0
        count = min(len(buffer), len(self.ready))
        buffer[:count] = self.ready[:count]
        self.ready, self.place = self.ready[count:], self.place + count
        return count

    def unpack(self):
        """Whether there was something left to unpack; what came of it may be nothing yet."""
        data = self.rest or self.packed.read(INPUT_BYTES)
        if not data:
            if self.frame is not None:
                raise DamagedZstd("it ends within a frame")
            return False
        if self.frame is None:
            self.frame = self.zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
        try:
            self.ready = memoryview(self.frame.decompress(data))
        except self.zstandard.ZstdError as e:
            raise DamagedZstd(str(e)) from None
        self.rest = b""
        if self.frame.eof:
            self.rest, self.frame = self.frame.unused_data, None
        return True


def open_zstd(packed):
    try:
        import zstandard
    except ImportError as e:
        raise BadUsage(missing_package(e)) from None
    return io.BufferedReader(Frames(packed, zstandard))
