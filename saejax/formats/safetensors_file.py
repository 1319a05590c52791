"""The directory of a safetensors file: checked in full before anything is allocated for a tensor, and made."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from saejax.base.errors import FormatError
from saejax.formats.arrays import DTYPES, ArrayFile, Entry

HEADER_CAP = 16 << 20
TENSOR_CAP = 10_000
_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> ArrayFile:
    """The tensors of a safetensors file. Raises `FormatError` unless header and file fit each other exactly.

    Checked: header length against the cap and the file, one JSON object without repeated names, known dtypes, shapes of
    non-negative whole numbers, byte ranges of the length that dtype and shape say, in order, without holes, overlaps or rest.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(HEADER_CAP, size - 8):
                raise FormatError(f"{path}: not a readable safetensors file (header of {length:,} bytes in a file of {size:,}); "
                                  "download it again")
            header = json.loads(f.read(length), object_pairs_hook=_no_repeats)
    except OSError as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
    if not isinstance(header, dict) or len(header) > TENSOR_CAP:
        raise FormatError(f"{path}: not a readable safetensors file (its header is no table of at most {TENSOR_CAP:,} tensors)")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise FormatError(f"{path}: not a readable safetensors file (tensor {name!r} begins at byte {entry.offset:,}, "
                              f"expected {end:,}: overlap or hole)")
        end += entry.nbytes
    if end != size:
        raise FormatError(f"{path}: not a readable safetensors file ({size:,} bytes, its header describes {end:,}); download "
                          "it again")
    return ArrayFile(path, entries)


def layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, Entry]]:
    """(the bytes before the first tensor, where each float32 tensor lies) of a file as the safetensors library writes it."""
    header, entries, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name in sorted(shapes):
        entries[name] = Entry("F32", tuple(shapes[name]), end)
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [end, end := end + entries[name].nbytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: replace(entry, offset=len(start) + entry.offset) for name, entry in entries.items()}


def _no_repeats(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _entry(path: Path, name: str, value, base: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [begin, end, *shape]
        good = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) and len(shape) <= 8 and set(value) == {
            "dtype", "shape", "data_offsets"}
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: not a readable safetensors file (malformed entry for tensor {name!r})") from error
    if dtype not in _SIZES:
        raise FormatError(f"{path}: tensor {name!r} has dtype {dtype!r}; only {', '.join(_SIZES)} can be read without loss")
    if not good or end - begin != math.prod(shape) * _SIZES[dtype]:
        raise FormatError(f"{path}: not a readable safetensors file (tensor {name!r}: {dtype} {shape} in bytes {begin} to {end})")
    return Entry(dtype, tuple(shape), base + begin)
