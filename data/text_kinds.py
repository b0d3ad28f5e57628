"""What a file of text is, by its bytes: plain text, JSON lines, a JSON array, Parquet, compressed, or no text at all.

A name says nothing for sure, and a packed file read as text gives tokens of rubbish. What Python's standard library and
zstandard unpack is read as what it is inside; anything else that is not text is refused with what to do about it.
"""

import bz2
import codecs
import gzip
import json
import lzma
import zlib

from command_line import BadInput
from zstd_file import DamagedZstd, open_zstd

HEAD_BYTES = 1 << 16
DEEPEST = 3  # compressed within compressed
LARGEST_JSON = 1 << 30  # of a JSON file that is one value
MAX_LINE = 64 << 20     # of JSON lines

# first bytes, what it is, what to do
COMPRESSED = [(b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file, mode="rb")),
              (b"BZh", "bzip2", bz2.BZ2File),
              (b"\xfd7zXZ\0", "xz", lzma.LZMAFile),
              (b"\x28\xb5\x2f\xfd", "zstd", open_zstd),
              # A frame to be skipped, with which pzstd begins.
              *((bytes([mark]) + b"\x2a\x4d\x18", "zstd", open_zstd) for mark in range(0x50, 0x60))]
BZIP2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
AS_LINES = ("write its text column as JSON lines, for example with pandas: read_{}(...).to_json(..., "
            "orient='records', lines=True)")
REFUSED = [
    (0, b"\x04\x22\x4d\x18", "is compressed with lz4", "unpack it first: lz4 -d"),
    (0, b"\x02\x21\x4c\x18", "is compressed with lz4", "unpack it first: lz4 -d"),
    (0, b"\x1f\x9d", "is compressed with compress", "unpack it first: uncompress"),
    (0, b"\xff\x06\0\0sNaPpY", "is compressed with snappy", "unpack it first"),
    (0, b"\x5d\0\0", "is compressed with lzma", "unpack it first: unlzma"),
    (0, b"LZIP", "is compressed with lzip", "unpack it first: lzip -d"),
    (0, b"PK\x03\x04", "is a zip archive (.docx, .epub and .npz are such, too)", "give the text in it"),
    (0, b"PK\x05\x06", "is an empty zip archive", "leave it out"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "is a rar archive", "unpack it first"),
    (257, b"ustar", "is a tar archive", "unpack it first: tar -x"),
    (0, b"PARE", "is an encrypted Parquet file", AS_LINES.format("parquet")),
    (0, b"ARROW1", "is an Arrow file", AS_LINES.format("feather")),
    (0, b"\xff\xff\xff\xff", "is an Arrow stream", "write its text as JSON lines"),
    (0, b"ORC", "is an ORC file", AS_LINES.format("orc")),
    (0, b"Obj\x01", "is an Avro file", "write its text as JSON lines"),
    (0, b"%PDF-", "is a PDF", "take the text out first: pdftotext"),
    (0, b"{\\rtf", "is a Rich Text file", "save it as plain text"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file (a token file needs no tokenizing)", "give the text itself"),
    (0, b"\x93NUMPY", "is a NumPy array", "give text"),
    (0, b"GGUF", "is a GGUF model", "give text"),
    (0, b"SQLite format 3\0", "is an SQLite database", "write its text as JSON lines"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a Microsoft Office file", "save it as plain text"),
    (0, b"\x80\x02", "is a Python pickle", "write its text as JSON lines"),
    (0, b"\x80\x03", "is a Python pickle", "write its text as JSON lines"),
    (0, b"\x80\x04", "is a Python pickle", "write its text as JSON lines"),
    (0, b"\x80\x05", "is a Python pickle", "write its text as JSON lines"),
    (0, b"\x7fELF", "is a program", "give text"),
    (0, b"\x89PNG", "is a picture", "give text"),
    (0, b"\xff\xd8\xff", "is a picture", "give text"),
    (0, b"GIF8", "is a picture", "give text"),
    (0, b"\xff\xfe\0\0", "is UTF-32", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
    (0, b"\0\0\xfe\xff", "is UTF-32", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8"),
    (0, b"\xff\xfe", "is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    (0, b"\xfe\xff", "is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
]
# What the decompressors raise for damaged data.
UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, DamagedZstd)
PARQUET = b"PAR1"


def is_clean(head):
    """Whether these first bytes can be text: UTF-8 without zero bytes; a character may be cut at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return 0 not in head


def compression_of(head):
    for mark, name, opener in COMPRESSED:
        if head.startswith(mark) and (mark != b"BZh" or head[4:10] in BZIP2_BLOCKS):
            return name, opener
    return None


def refuse_what_is_no_text(path, head):
    clean = is_clean(head)
    for at, mark, what, cure in REFUSED:
        # A text may begin with the letters GIF8; a picture has other bytes, too.
        if head[at:at + len(mark)] == mark and not (clean and mark.isalnum()):
            raise BadInput(f"{path}: {what}; {cure}")
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 27:
        raise BadInput(f"{path}: is a safetensors file; give text")
    for offset, codec in ((1, "UTF-16LE"), (0, "UTF-16BE")):  # without a mark: every other byte of ASCII is zero
        zeros, others = head[offset::2].count(0), head[1 - offset::2].count(0)
        if len(head) >= 4 and zeros > 0.4 * len(head) and others < 0.1 * len(head):
            raise BadInput(f"{path}: is UTF-16; convert it to UTF-8: iconv -f {codec} -t UTF-8")
    zero = head.find(0)
    if zero >= 0:
        raise BadInput(f"{path}: is not text: byte {zero} is zero; if it is text all the same, remove those: "
                       "tr -d '\\000'")


class Opened:
    """A file, unpacked where it is compressed. `raw` is the file on disk, whose place tells how far one has come."""

    def __init__(self, path):
        self.path, self.raw = path, open(path, "rb")
        self.file, self.compressed = self.raw, False
        try:
            for _ in range(DEEPEST + 1):
                head = self.head()
                found = compression_of(head)
                if found is None:
                    return
                self.compressed = found[0]
                self.file = found[1](self.file)
            raise BadInput(f"{path}: is compressed more than {DEEPEST} times over; unpack it first")
        except BaseException:
            self.raw.close()
            raise

    def head(self):
        head = self.read(HEAD_BYTES)
        self.file.seek(0)
        return head

    def read(self, count=-1):
        try:
            return self.file.read(count)
        except UNPACKING_ERRORS as e:
            raise BadInput(f"{self.path}: its {self.compressed} data is damaged or cut short ({e})") from None
        except OSError as e:
            if not self.compressed or e.errno is not None:
                raise
            raise BadInput(f"{self.path}: its {self.compressed} data is damaged ({e})") from None

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.file.close()
        self.raw.close()


def first_lines(head, whole):
    """The first two lines that are not blank; the last line of `head` counts only where it is `whole`."""
    lines = head.split(b"\n")
    if not whole:
        lines = lines[:-1]
    return [line.strip() for line in lines if line.strip()][:2]


def parsed(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def first_line_of(opened):
    line = opened.read(MAX_LINE).removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0]
    opened.file.seek(0)
    return line


def parquet_kind(path, opened, chosen):
    if opened.compressed:  # its index stands at its end
        raise BadInput(f"{path}: is a Parquet file packed with {opened.compressed}; unpack it first")
    if chosen != "auto":
        raise BadInput(f"{path}: is a Parquet file, which is not read as {chosen}; leave out --as {chosen}")
    return "parquet"


def kind_of(path, opened, chosen):
    """'text', 'jsonl', 'json' (one value) or 'parquet' of a file that holds text, 'empty' of one that holds nothing;
    `chosen` is that of --as, or 'auto'."""
    head = opened.head()
    if not head:
        return "empty"
    if head.startswith(PARQUET) and not is_clean(head):
        return parquet_kind(path, opened, chosen)
    refuse_what_is_no_text(path, head)
    if chosen != "auto":
        return chosen
    name = path.lower()
    for suffix in (".gz", ".bz2", ".xz", ".zst", ".zstd"):
        name = name.removesuffix(suffix)
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    start = head.removeprefix(codecs.BOM_UTF8)
    lines = first_lines(start, len(head) < HEAD_BYTES)
    if not lines and start.lstrip()[:1] == b"{" and not name.endswith(".json"):
        lines = [first_line_of(opened)]  # longer than what was looked at, as of a book in one record
    records = [parsed(line) for line in lines]
    if records and all(isinstance(record, dict) for record in records):
        return "jsonl"
    if name.endswith(".json"):
        # A first line longer than what was looked at is one record of several, or a value on one line.
        return "jsonl" if not lines and start.lstrip()[:1] == b"{" else "json"
    begins = start.lstrip()[:200]
    if begins[:1] == b"[" and begins[1:].lstrip()[:1] == b"{":
        value = parsed(whole_of(path, opened))
        if isinstance(value, list) and all(isinstance(record, dict) for record in value):
            return "json"
    return "text"


def require_small(path, size):
    if size > LARGEST_JSON:
        raise BadInput(f"{path}: one JSON value of more than {LARGEST_JSON} bytes; write it as JSON lines: jq -c '.[]'")


def whole_of(path, opened):
    data = opened.read(LARGEST_JSON + 1)
    opened.file.seek(0)
    require_small(path, len(data))
    return data
