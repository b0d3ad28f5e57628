"""Writes indexed data sets of Megatron-LM, by `struct` alone: PREFIX.bin and PREFIX.idx.

    python tests/support/megatron_set.py PREFIX    writes the set that tests/data/from_megatron.* are
"""

import struct
import sys
from pathlib import Path

MARK, VERSION = b"MMIDIDX\0\0", 1
# type: its number in the header, how `struct` writes it
TYPES = {"uint8": (1, "B"), "int8": (2, "b"), "int16": (3, "h"), "int32": (4, "i"), "int64": (5, "q"),
         "float64": (6, "d"), "float32": (7, "f"), "uint16": (8, "H"), "uint32": (9, "I")}


def write_megatron_set(prefix, documents, dtype="uint16"):
    """`documents`: lists of sequences, which are lists of tokens. Returns the path of the tokens."""
    code, letter = TYPES[dtype]
    sequences = [sequence for document in documents for sequence in document]
    tokens = [token for sequence in sequences for token in sequence]
    lengths = [len(sequence) for sequence in sequences]
    begins = [struct.calcsize(letter) * sum(lengths[:i]) for i in range(len(lengths))]
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    Path(f"{prefix}.idx").write_bytes(
        MARK + struct.pack("<QBQQ", VERSION, code, len(lengths), len(boundaries)) +
        struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(begins)}q", *begins) +
        struct.pack(f"<{len(boundaries)}q", *boundaries))
    return Path(f"{prefix}.bin")


if __name__ == "__main__":
    # A document of two sequences, one without a token, an empty document, and one of 300 tokens.
    write_megatron_set(sys.argv[1], [[[5, 6, 7], [], [8, 9]], [], [[(11 * i) % 60000 for i in range(300)]]])
