"""Safetensors files, by their format: a length, JSON, and the bytes that it speaks of."""

import json
import struct


def read_safetensors(path):
    """({name: (dtype, shape, bytes)}, metadata)"""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    metadata = header.pop("__metadata__", {})
    return {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
            for name, entry in header.items()}, metadata
