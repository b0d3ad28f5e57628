"""Rows of a Parquet file as JSON lines: of each the chosen column alone, a few rows of the file in memory at a time."""

import json
import os

from command_line import BadInput, BadUsage, missing_package

ROWS = 512               # of a batch
BUFFER_BYTES = 1 << 20   # of the file, for each column


def import_parquet():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise BadUsage(missing_package(e)) from None
    return pyarrow


def lines_of(path, key):
    """A JSON record {key: value} of each row."""
    pyarrow = import_parquet()
    row = 0

    def no_json(value):
        raise BadInput(f"{path}, row {row}: '{key}' holds a value of type {type(value).__name__}, expected a text; "
                       "write the column anew as text, for example with pyarrow: column.cast('string')")

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if names.count(key) != 1:
                raise BadInput(f"{path}: has {names.count(key) or 'no'} column{'s' * (key in names)} '{key}', its "
                               f"columns are: {', '.join(names[:8])}; name the right one with --key")
            for batch in file.iter_batches(batch_size=ROWS, columns=[key], use_threads=False):
                for value in batch.column(batch.schema.get_field_index(key)):
                    yield json.dumps({key: value.as_py()}, ensure_ascii=False, default=no_json).encode()
                    row += 1
    except BadInput:
        raise
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}, row {row}: '{key}' is not UTF-8 ({e.reason}); write the column anew as text") from None
    except Exception as e:  # noqa: BLE001  of a damaged file the package throws what it comes upon
        if isinstance(e, OSError) and e.errno is not None:  # of the system; the package's own have no number
            raise
        raise BadInput(f"{path}: its Parquet data is damaged, cut short or of a kind that is not read "
                       f"({' '.join(str(e).split())[:200]})") from None


def row_blocks(path, key, block_bytes, most_bytes):
    """(JSON lines, number of the first row, about how many bytes of the file) of a few rows at a time."""
    lines, filled, first, row, size = [], 0, 0, 0, os.path.getsize(path)
    told, rows = 0, rows_in(path)
    for line in lines_of(path, key):
        if len(line) > most_bytes:
            raise BadInput(f"{path}, row {row}: a text of {len(line)} bytes, at most {most_bytes}")
        lines.append(line)
        filled, row = filled + len(line), row + 1
        if filled >= block_bytes:
            now = size * row // max(rows, 1)
            yield b"\n".join(lines), first, now - told
            lines, filled, first, told = [], 0, row, now
    if lines:
        yield b"\n".join(lines), first, size - told


def rows_in(path):
    pyarrow = import_parquet()
    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except Exception:  # noqa: BLE001  reading the rows says what is wrong
        return 0
