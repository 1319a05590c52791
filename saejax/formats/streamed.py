"""Writing the features of an SAE into safetensors files block by block: no host holds more than a block beside the file."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.ranges import Range, Shard
from saejax.base.storage import is_writer, reserve
from saejax.formats.assembling import Part, Tensors, expected_shapes, piece
from saejax.formats.safetensors_file import layout
from saejax.sae import SAEParams, SAESpec, param_shapes, tensors
from saejax.sae.params import SHARED

BLOCK = 1 << 26  # bytes of a parameter that are in host memory at a time


@dataclass(frozen=True)
class Source:
    """Where parameters come from. rows(name, first, stop): their rows, float32, by feature or of what has no feature axis.
    shards: how the features are held, in order.
    """

    rows: Callable[[str, int, int], np.ndarray]
    shards: Sequence[Shard]


def of_params(params: SAEParams) -> Source:
    """The pieces that the devices of this process hold."""
    values = tensors(params)
    return Source(lambda name, first, stop: sharding.rows_here(values[name], first, stop), sharding.row_shards(params.W_dec))


def gathered(params: SAEParams) -> Source:
    """All of them in the memory of the process that writes: for small SAEs that no process holds whole. A collective."""
    values = {}
    for name, value in tensors(params).items():
        whole = sharding.to_host(value)
        if is_writer():
            values[name] = whole
    return Source(lambda name, first, stop: values[name][first:stop], [(0, len(params.b_enc), frozenset({0}))])


def of_files(file: Tensors, spec: SAESpec, parts: Mapping[str, Part]) -> Source:
    """The tensors of files, block by block."""
    shapes = tensors(param_shapes(spec, folded=True))

    def rows(name: str, first: int, stop: int) -> np.ndarray:
        return piece(file, parts[name], shapes[name], (slice(first, stop), *(slice(0, n) for n in shapes[name][1:])))

    return Source(rows, [(0, spec.d_sae, frozenset({0}))])


def tensor_bytes(spec: SAESpec, features: int) -> int:
    """Bytes of the parameters of so many features, and of what has no feature axis."""
    return 4 * sum(math.prod(shape) for shape in tensors(param_shapes(replace(spec, d_sae=features), folded=True)).values())


def write_file(f: BinaryIO, path: Path, source: Source, spec: SAESpec, parts: Mapping[str, Part], of: Range,
               advance: Callable[[int], object]) -> None:
    """Fills the file with the parameters of a range of features; `path` is its name once it is whole.

    Raises `FormatError` for NaN or Inf, and `DiskError` before anything is written where there is no room for it.
    """
    start, entries = layout(expected_shapes(replace(spec, d_sae=of.stop - of.first), parts))
    reserve(f.name, len(start) + sum(entry.nbytes for entry in entries.values()))
    room, bad = np.memmap(f.name, np.uint8, "r+"), []
    room[:len(start)] = np.frombuffer(start, np.uint8)
    for name, part in parts.items():
        entry = entries[part.tensor]
        out = room[entry.offset:entry.offset + entry.nbytes].view(np.float32).reshape(entry.shape)
        out = out.T if part.transposed else out
        base = 0 if name in SHARED else of.first
        for first, stop in blocks(out.shape):
            value = source.rows(name, base + first, base + stop)
            if not np.isfinite(value).all() and part.tensor not in bad:
                bad.append(part.tensor)
            out[first:stop] = value
            advance(value.nbytes)
    if bad:
        raise FormatError(f"{path}: not released, {', '.join(bad)} hold NaN or Inf")
    room.flush()


def blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, stop) of the blocks of rows of a float32 array."""
    step = max(1, BLOCK // (4 * math.prod(shape[1:])))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])
