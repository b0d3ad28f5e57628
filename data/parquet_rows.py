"""Rows of a Parquet file as JSON lines: of each the chosen columns alone, a few rows in memory at a time."""

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


def object_of(names, values):
    """A JSON object of values that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in zip(names, values, strict=True)) + "}"


def lines_of(path, key, also):
    """A JSON record {key: value, ...} of each row, of the columns `also` those that there are."""
    pyarrow = import_parquet()
    row, column = 0, key

    def no_json(value):
        raise BadInput(f"{path}, row {row}: '{column}' holds a value of type {type(value).__name__}, expected a text; "
                       "write the column anew as text, for example with pyarrow: column.cast('string')")

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if names.count(key) != 1:
                raise BadInput(f"{path}: has {names.count(key) or 'no'} column{'s' * (key in names)} '{key}', its "
                               f"columns are: {', '.join(names[:8])}; name the right one with --key")
            columns = [key, *(name for name in also if names.count(name) == 1 and name != key)]
            for batch in file.iter_batches(batch_size=ROWS, columns=columns, use_threads=False):
                found = [batch.column(batch.schema.get_field_index(name)) for name in columns]
                for values in zip(*found, strict=True):
                    said = []
                    for column, value in zip(columns, values, strict=True):
                        said.append(json.dumps(value.as_py(), ensure_ascii=False, default=no_json))
                    yield object_of(columns, said).encode()
                    row += 1
    except BadInput:
        raise
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}, row {row}: '{column}' is not UTF-8 ({e.reason}); write the column anew as "
                       "text") from None
    except Exception as e:  # noqa: BLE001  of a damaged file the package throws what it comes upon
        if isinstance(e, OSError) and e.errno is not None:  # of the system; the package's own have no number
            raise
        raise BadInput(f"{path}: its Parquet data is damaged, cut short or of a kind that is not read "
                       f"({' '.join(str(e).split())[:200]})") from None


def row_blocks(path, key, also, block_bytes, most_bytes):
    """(JSON lines, number of the first row, about how many bytes of the file) of a few rows at a time."""
    lines, filled, first, row, size = [], 0, 0, 0, os.path.getsize(path)
    told, rows = 0, rows_in(path)
    for line in lines_of(path, key, also):
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
