"""Zip archives of plain bytes: torch's `.pt` / `.pth` files and numpy's `.npz`. No torch, no pickle, no path from a name."""

import ast
import math
import zipfile
from pathlib import Path

import numpy as np

from saejax.base.errors import FormatError
from saejax.formats.arrays import DTYPES, ArrayFile, Entry
from saejax.formats.pickled import SIZE_CAP, StoredTensor, extent, read_pickle

MEMBER_CAP = 100_000
_HEADER_CAP = 1 << 16
_NPY = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}


def open_torch(path: Path) -> ArrayFile:
    """Tensors and plain values of a file that `torch.save` wrote (torch >= 1.6): a dict, whose nested dicts become `outer.inner`.

    Values that are neither a tensor nor a dict are in `.values`. Raises `FormatError` for whatever is not plain data.
    """
    path = Path(path)
    with _Archive(path) as archive:
        roots = [name for name in archive.members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise FormatError(f"{path}: a zip archive, but not one that torch.save wrote (no data.pkl)")
        prefix = roots[0].removesuffix("data.pkl")
        if prefix + "byteorder" in archive.members and archive.small(prefix + "byteorder", 16) != b"little":
            raise FormatError(f"{path}: byteorder {archive.small(prefix + 'byteorder', 16)!r}; only little-endian files are read")
        tree = read_pickle(archive.small(roots[0], SIZE_CAP), path)
        if not isinstance(tree, dict):
            raise FormatError(f"{path}: holds a {type(tree).__name__}, expected a dict of tensors (a state dict)")
        entries, values = {}, {}
        for name, value in _flat(tree).items():
            if isinstance(value, StoredTensor):
                entries[name] = _torch_entry(path, name, value, archive, prefix)
            else:
                values[name] = value
        return ArrayFile(path, entries, values)


def open_npz(path: Path) -> ArrayFile:
    """Arrays of an uncompressed `.npz` file (`np.savez`); object arrays, which would be pickles, are refused."""
    path = Path(path)
    with _Archive(path) as archive:
        entries = {}
        for member in archive.members:
            if member.endswith(".npy"):
                entries[member.removesuffix(".npy")] = _npy_entry(path, member, archive)
        return ArrayFile(path, entries)


def _flat(tree: dict, depth: int = 3) -> dict:
    """Nested dicts as one, keys joined by dots; below `depth`, values as they are."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and depth > 1:
            out |= {f"{key}.{inner}": v for inner, v in _flat(value, depth - 1).items()}
        else:
            out[str(key)] = value
    return out


def _torch_entry(path: Path, name: str, tensor: StoredTensor, archive: "_Archive", prefix: str) -> Entry:
    member = f"{prefix}data/{tensor.storage.key}"
    itemsize = np.dtype(DTYPES[tensor.storage.dtype]).itemsize
    offset, size = archive.place(member)
    if tensor.storage.count * itemsize != size or extent(tensor) > tensor.storage.count:
        raise FormatError(f"{path}: tensor {name!r} does not fit its storage ({size:,} bytes)")
    columns = _contiguous(tensor.shape[::-1], tensor.strides[::-1])
    if not columns and not _contiguous(tensor.shape, tensor.strides):
        raise FormatError(f"{path}: tensor {name!r} of shape {tensor.shape} has strides {tensor.strides}; save it contiguous")
    columns = columns and len(tensor.shape) == 2 and not _contiguous(tensor.shape, tensor.strides)
    return Entry(tensor.storage.dtype, tensor.shape, offset + tensor.start * itemsize, columns)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are those of a row-major array (those of axes of length 1 do not matter)."""
    expected = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    return all(n == 1 or s == e for n, s, e in zip(shape, strides, expected, strict=True))


def _npy_entry(path: Path, member: str, archive: "_Archive") -> Entry:
    offset, size = archive.place(member)
    head = archive.at(offset, min(size, _HEADER_CAP))
    if head[:6] != b"\x93NUMPY" or head[6] not in (1, 2, 3):
        raise FormatError(f"{path}: {member} is not a numpy array")
    wide = 2 if head[6] == 1 else 4
    begin = 8 + wide
    length = int.from_bytes(head[8:begin], "little")
    try:
        text = ast.literal_eval(head[begin:begin + length].decode("latin1")) if length + begin <= len(head) else None
        dtype, columns, shape = np.dtype(text["descr"]), text["fortran_order"], text["shape"]
        good = dtype in _NPY and type(columns) is bool and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    except (ValueError, TypeError, KeyError, SyntaxError, MemoryError, RecursionError):
        good = False
    if not good:
        raise FormatError(f"{path}: {member} is no plain array of numbers (object arrays are pickles and are not read)")
    entry = Entry(_NPY[dtype], tuple(shape), offset + begin + length, columns and len(shape) == 2)
    if begin + length + entry.nbytes != size:
        raise FormatError(f"{path}: {member} has {size - begin - length:,} bytes for shape {shape}; download it again")
    return entry


class _Archive:
    """A zip archive whose members are stored as they are."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "_Archive":
        try:
            self._zip = zipfile.ZipFile(self.path)
            self.members = {info.filename: info for info in self._zip.infolist()}
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError) as error:
            raise FormatError(f"{self.path}: not a readable zip archive ({error}); a half-downloaded file, or one written by "
                              "torch < 1.6: save it again with a newer torch") from error
        if len(self.members) != len(self._zip.infolist()) or len(self.members) > MEMBER_CAP:
            raise FormatError(f"{self.path}: an archive with a name twice, or with more than {MEMBER_CAP:,} members")
        return self

    def __exit__(self, *_) -> None:
        self._zip.close()

    def place(self, member: str) -> tuple[int, int]:
        """(offset in the file, length) of a member. Its name is looked up in the archive, never used as a path."""
        info = self.members.get(member)
        if info is None:
            raise FormatError(f"{self.path}: {member} is missing in the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise FormatError(f"{self.path}: {member} is compressed or encrypted; only plain members are read (np.savez and "
                              "torch.save write those)")
        header = self.at(info.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise FormatError(f"{self.path}: {member} is not where the archive says")
        name, extra = (int.from_bytes(header[i:i + 2], "little") for i in (26, 28))
        return info.header_offset + 30 + name + extra, info.file_size

    def at(self, offset: int, count: int) -> bytes:
        with open(self.path, "rb") as f:
            f.seek(offset)
            data = f.read(count)
        if len(data) != count:
            raise FormatError(f"{self.path}: ends too early; download it again")
        return data

    def small(self, member: str, cap: int) -> bytes:
        """A small member's bytes."""
        offset, size = self.place(member)
        if size > cap:
            raise FormatError(f"{self.path}: {member} has {size:,} bytes, at most {cap:,} are read")
        return self.at(offset, size)
