"""Files that each hold a range of an SAE's features, read as one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import FormatError
from saejax.base.ranges import Range
from saejax.formats.arrays import FLOATS, ArrayFile, Entry
from saejax.sae.params import SHARED


@dataclass(frozen=True)
class Held:
    """A file, and which features of the whole it holds: first to stop - 1."""

    file: ArrayFile
    first: int
    stop: int


class FeatureFiles:
    """Features of one or more files as one `ArrayFile` that holds these only. What has no feature axis is read from the first."""

    def __init__(self, held: Sequence[Held], features: range, columns: tuple[str, ...]):
        """held: in order, without holes, with all of `features`. columns: tensors whose features are their columns."""
        self.held, self.features, self._columns = held, features, columns
        self.path = held[0].file.path

    @property
    def entries(self) -> dict[str, Entry]:
        """Of the first file."""
        return self.held[0].file.entries

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = (),
              dtypes: tuple[str, ...] = FLOATS) -> None:
        """`ArrayFile.check` of every file. expected: the shapes for all of the features."""
        for held in self.held:
            held.file.check({name: self._resized(name, shape, held.stop - held.first) for name, shape in expected.items()},
                            ignored, dtypes)

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that must be there with `dims` dimensions, of these features."""
        return self._resized(name, self.held[0].file.shape(name, dims), len(self.features))

    def scalar(self, name: str) -> float:
        """The one number of a tensor."""
        return self.held[0].file.scalar(name)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a slice of it, as float32; only those bytes are read."""
        shape, axis = self.entries[name].shape, self._axis(name, self.entries[name].shape)
        if axis is None:
            return self.held[0].file.read(name, index)
        shape = self._resized(name, shape, len(self.features))
        index = index or tuple(slice(0, n) for n in shape)
        bounds = [slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True)]
        first, stop = (self.features.start + at for at in (bounds[axis].start, bounds[axis].stop))
        parts = [held for held in self.held if held.first < stop and first < held.stop]

        def local(held: Held) -> tuple[slice, ...]:
            return tuple(slice(max(first, held.first) - held.first, min(stop, held.stop) - held.first) if n == axis else bound
                         for n, bound in enumerate(bounds))

        if len(parts) == 1:
            return parts[0].file.read(name, local(parts[0]))
        out = np.empty([bound.stop - bound.start for bound in bounds], np.float32)
        for held in parts:
            here = [slice(None)] * len(bounds)
            here[axis] = slice(max(first, held.first) - first, min(stop, held.stop) - first)
            out[tuple(here)] = held.file.read(name, local(held))
        return out

    def _axis(self, name: str, shape: Sequence[int]) -> int | None:
        return None if name in SHARED or not shape else int(name in self._columns)

    def _resized(self, name: str, shape: Sequence[int], n: int) -> tuple[int, ...]:
        axis = self._axis(name, shape)
        return tuple(n if at == axis else size for at, size in enumerate(shape))


def named(directory: Path, listed: Sequence, d_sae: int, pattern: str) -> dict[str, tuple[Range, str]]:
    """{file: (its features, sha256)} of the list in a cfg.json. pattern: of the names.

    Raises `FormatError` naming the first file that is not what its place in the list asks for, or leaves a hole or an overlap.
    """
    source = directory / "cfg.json"
    found, expected = {}, 0
    for number, entry in enumerate(listed, 1):
        name = pattern.format(number, len(listed))
        good = isinstance(entry, dict) and set(entry) == {"file", "first", "last", "sha256"} and isinstance(entry["sha256"], str)
        if not good or entry["file"] != name:
            raise FormatError(f"{source}: entry {number} of metadata.saejax.files does not describe {name}; release it again")
        first, last = entry["first"], entry["last"]
        if type(first) is not int or type(last) is not int or first != expected or not first <= last < d_sae:
            raise FormatError(f"{directory / name}: features {first} to {last} of {d_sae} in cfg.json, expected from {expected} "
                              "on: an overlap or a hole; release it again")
        found[name], expected = (Range(first, last + 1), entry["sha256"]), last + 1
    if expected != d_sae:
        raise FormatError(f"{source}: the last of metadata.saejax.files ends at feature {expected - 1} of {d_sae}: a hole; "
                          "release it again")
    return found
