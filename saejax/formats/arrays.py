"""Tensors that lie in a file as plain bytes (safetensors, torch zip, npz), read slice by slice after everything is checked."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import FormatError

# Name as safetensors spells it -> numpy dtype of the bytes. BF16 is read as uint16 and widened.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U8": "u1", "BOOL": "?"}
FLOATS = ("F32", "F16", "BF16", "F64")
_BLOCK = 1 << 24  # bytes of a file that are held while they are converted


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: absolute `offset` in the file, row-major, or column-major when `columns` (2-D only)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    columns: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class ArrayFile:
    """A file and where its tensors lie. Nothing but the directory of the file has been read; every entry lies inside it."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], values: Mapping | None = None):
        """values: what a pickle holds besides tensors (strings, numbers, dicts), by key."""
        self.path, self.entries, self.values = path, dict(entries), dict(values or {})
        size = path.stat().st_size
        for name, entry in self.entries.items():
            if entry.offset < 0 or entry.offset + entry.nbytes > size:
                raise FormatError(f"{path}: tensor {name!r} reaches beyond the end of the file ({size:,} bytes); download it "
                                  "again")

    def subset(self, prefix: str) -> "ArrayFile":
        """The tensors and values whose names begin with `prefix`, without it."""
        cut = len(prefix)
        return ArrayFile(self.path, {n[cut:]: e for n, e in self.entries.items() if n.startswith(prefix)},
                         {n[cut:]: v for n, v in self.values.items() if n.startswith(prefix)})

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = (),
              dtypes: tuple[str, ...] = FLOATS) -> None:
        """Raises one `FormatError` for every tensor that is missing, unexpected, or of another shape or dtype."""
        found = self.entries
        wrong = [f"{name}: missing" for name in expected if name not in found]
        wrong += [f"{name}: unexpected" for name in found if name not in expected and name not in ignored]
        for name, shape in expected.items():
            if name in found and (found[name].shape != tuple(shape) or found[name].dtype not in dtypes):
                wrong.append(f"{name}: {found[name].dtype} {found[name].shape}, expected {' or '.join(dtypes)} {tuple(shape)}")
        if wrong:
            raise FormatError(f"{self.path}: {'; '.join(wrong[:20])}")

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there with `dims` dimensions, none of them empty."""
        if name not in self.entries:
            raise FormatError(f"{self.path}: {name}: missing")
        shape = self.entries[name].shape
        if len(shape) != dims or not all(shape):
            raise FormatError(f"{self.path}: {name}: shape {shape}, expected {dims} dimensions that are not empty")
        return shape

    def scalar(self, name: str) -> float:
        """The one number of a tensor of shape () or (1,), as a Python float."""
        entry = self.entries[name]
        if math.prod(entry.shape) != 1:
            raise FormatError(f"{self.path}: {name}: shape {entry.shape}, expected one number")
        with open(self.path, "rb") as f:
            value = float(_widened(np.frombuffer(_bytes(f, entry.offset, entry.nbytes), DTYPES[entry.dtype]), entry.dtype)[0])
        if not math.isfinite(value):
            raise FormatError(f"{self.path}: tensor {name} holds NaN or Inf")
        return value

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a slice of it, as float32; only those bytes are read, and at most 16 MiB more are held.

        Raises `FormatError` for NaN or Inf, and for float64 values that float32 cannot hold.
        """
        entry = self.entries[name]
        whole = tuple(slice(0, n) for n in entry.shape)
        index = whole if index is None else tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, entry.shape, strict=True))
        if entry.columns:
            flipped = Entry(entry.dtype, entry.shape[::-1], entry.offset)
            return self._read(name, flipped, index[::-1]).T
        return self._read(name, entry, index)

    def _read(self, name: str, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        if len(entry.shape) > 2:
            raise FormatError(f"{self.path}: {name}: {len(entry.shape)} dimensions, at most 2 are expected")
        rows, columns = ((slice(0, 1), slice(0, 1)), (slice(0, 1), *index), index)[len(index)]
        width = entry.shape[-1] if entry.shape else 1
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
        item = np.dtype(DTYPES[entry.dtype]).itemsize
        whole_rows = out.shape[1] == width
        step = max(1, _BLOCK // max(1, width * item)) if whole_rows else 1
        with open(self.path, "rb", buffering=0) as f:
            for row in range(0, out.shape[0], step):
                n = min(step, out.shape[0] - row)
                at = entry.offset + ((rows.start + row) * width + columns.start) * item
                raw = np.frombuffer(_bytes(f, at, n * out.shape[1] * item), DTYPES[entry.dtype]).reshape(n, -1)
                self._convert(name, raw, entry.dtype, out[row:row + n])
        return out.reshape(tuple(i.stop - i.start for i in index))

    def _convert(self, name: str, raw: np.ndarray, dtype: str, out: np.ndarray) -> None:
        wide = _widened(raw, dtype)
        if not np.isfinite(wide).all():
            raise FormatError(f"{self.path}: tensor {name} holds NaN or Inf")
        with np.errstate(over="ignore"):
            out[...] = wide
        if dtype == "F64" and not (out == wide).all():
            raise FormatError(f"{self.path}: tensor {name} is float64 and would lose values in float32; store it as float32")


def _bytes(f, offset: int, count: int) -> bytes:
    data = os.pread(f.fileno(), count, offset)
    while len(data) < count:  # pread returns at most 2 GiB at a time
        more = os.pread(f.fileno(), count - len(data), offset + len(data))
        if not more:
            raise FormatError(f"{f.name}: ends before its last tensor; download it again")
        data += more
    return data


def _widened(raw: np.ndarray, dtype: str) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw
