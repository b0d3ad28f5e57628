"""A token file in HDF5, as data/token_file_format.h has it."""

import errno
import os
import zlib

import h5py
import numpy

FORMAT = "upmoe-tokens-1"
COPY_TOKENS = 4 << 20
CHUNK_TOKENS = 16384  # one checksum each (data/token_file_format.h); divides COPY_TOKENS


def checksum_of(attributes, count, ends, chunks, mask_chunks):
    """Of what a token file says, as in data/token_file_format.h."""
    summary = (f"{attributes['format']} vocab_size {attributes['vocab_size']} eos_id {attributes['eos_id']} "
               f"tokenizer_sha256 {attributes['tokenizer_sha256']} tokens {count} documents {len(ends)}\n")
    tokens = zlib.crc32(chunks.tobytes(), zlib.crc32(ends.tobytes(), zlib.crc32(summary.encode())))
    return zlib.crc32(mask_chunks.tobytes(), tokens)


def read_numbers(raw, dtype, begin, end):
    size = numpy.dtype(dtype).itemsize
    with open(raw, "rb") as file:
        file.seek(size * begin)
        content = file.read(size * (end - begin))
    if len(content) != size * (end - begin):
        raise OSError(errno.EIO, "has lost its end", raw)
    return numpy.frombuffer(content, dtype=dtype)


def write_column(out, name, raw, dtype, count):
    """A number for each token out of the file `raw`; returns the checksums of its chunks."""
    column, chunks = out.create_dataset(name, shape=(count,), dtype=dtype), []
    for begin in range(0, count, COPY_TOKENS):
        end = min(count, begin + COPY_TOKENS)
        block = read_numbers(raw, dtype, begin, end)
        column[begin:end] = block
        chunks += [zlib.crc32(block[i:i + CHUNK_TOKENS].tobytes()) for i in range(0, len(block), CHUNK_TOKENS)]
    return numpy.asarray(chunks, dtype="<u4")


def write_token_file(path, raw, count, document_ends, attributes, raw_mask=None):
    """`raw`: the tokens as they came, in a file; `raw_mask`: which of them count, or None. A contiguous dataset needs
    its size first, hence two files."""
    ends, mask_chunks = numpy.asarray(document_ends, dtype="<i8"), numpy.empty(0, dtype="<u4")
    columns = ["tokens", "document_ends"]
    with h5py.File(path, "w") as out:
        chunks = write_column(out, "tokens", raw, "<u4", count)
        out.create_dataset("document_ends", data=ends)
        out.create_dataset("checksums", data=chunks)
        if raw_mask is not None:
            mask_chunks = write_column(out, "loss_mask", raw_mask, "u1", count)
            out.create_dataset("loss_mask_checksums", data=mask_chunks)
            columns.append("loss_mask")
        for name, value in attributes.items():
            # Texts of fixed length: others lie in a heap of the file that the HDF5 library reads without checking.
            out.attrs[name] = numpy.bytes_(value.encode()) if isinstance(value, str) else value
        out.attrs["checksum"] = checksum_of(attributes, count, ends, chunks, mask_chunks)
    # A full disk can pass the library without an error.
    with h5py.File(path, "r") as made:
        whole = all(d.id.get_offset() is not None and
                    d.id.get_offset() + d.size * d.dtype.itemsize <= os.path.getsize(path)
                    for d in (made[name] for name in columns))
        if not whole or made["tokens"].shape != (count,) or made["document_ends"][-1] != count:
            raise OSError(errno.ENOSPC, "was not written whole; is the disk full?", str(path))
