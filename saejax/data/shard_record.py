"""The record of a finished shard: a small binary file that is written when the files of the shard are on the disk.

    32 bytes       SHA-256 of what follows
    one line       JSON: shard, contexts, kept_rows, spec_sha256, bins (of every hookpoint, how many pairs below)
    crcs           crc32c of every chunk of every array, uint32: the piece of `crcs.bin` that belongs to this shard
    sums           of every hookpoint D + 2 numbers, float64: sum of x, of ||x||, of ||x||^2 over the kept rows
    norms          of every hookpoint pairs of a bin of norms and the number of kept rows in it, int64
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError
from saejax.base.keys import Keys
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shards import AGAIN
from saejax.data.statistics import BINS, ShardSums

_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard."""

    shard: int
    contexts: int
    kept_rows: int
    crcs: bytes
    sums: dict[str, ShardSums]

    def to_bytes(self, spec: StoreSpec) -> bytes:
        head = {"shard": self.shard, "contexts": self.contexts, "kept_rows": self.kept_rows,
                "spec_sha256": mf.spec_digest(spec)}
        sums = [self.sums[name] for name, _ in spec.hookpoints]
        head["bins"] = [len(each.bins) for each in sums]
        line = json.dumps(head, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        arrays = [each.array() for each in sums] + [each.bins for each in sums]
        body = line + self.crcs + b"".join(array.tobytes() for array in arrays)
        return hashlib.sha256(body).digest() + body


def read_record(path: Path, spec: StoreSpec, shard: int, *, digest: str | None = None) -> ShardRecord:
    """The record of a shard, validated against the spec. Raises `StoreCorruptError`. digest: `spec_digest(spec)`."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise StoreCorruptError(f"{path}: {'missing' if isinstance(e, FileNotFoundError) else e.strerror}; {AGAIN}") from e
    body = memoryview(data)[_DIGEST:]
    if hashlib.sha256(body).digest() != data[:_DIGEST]:
        raise StoreCorruptError(f"{path}: altered since it was written (its digest does not verify); {AGAIN}")
    start = data.find(b"\n", _DIGEST) + 1
    try:
        f = Keys(json.loads(data[_DIGEST:start]), path, StoreCorruptError)
    except (ValueError, RecursionError) as e:
        raise StoreCorruptError(f"{path}: not a shard record; {AGAIN}") from e
    if f.hex("spec_sha256") != (digest or mf.spec_digest(spec)):
        raise StoreCorruptError(f"{path}: belongs to another store")
    f.one_of("shard", (shard,))
    contexts = f.count("contexts", least=1, most=spec.shard_contexts)
    kept = f.count("kept_rows", most=contexts * spec.context)
    names, widths = [name for name, _ in spec.hookpoints], [width + 2 for _, width in spec.hookpoints]
    n_bins = f.checked("bins", None, lambda value: isinstance(value, list) and len(value) == len(names)
                       and all(type(n) is int and 0 <= n <= BINS for n in value), f"not a number for each of {names}", [])
    f.refuse_unread()
    numbers = start + spec.crc_bytes
    bins = numbers + 8 * sum(widths)
    if len(data) != bins + 16 * sum(n_bins):
        f.refuse(f"{len(data)} bytes, expected {bins + 16 * sum(n_bins)}")
    sums = np.split(np.frombuffer(data[numbers:bins], "<f8"), np.cumsum(widths[:-1]))
    used = np.split(np.frombuffer(data[bins:], "<i8").reshape(-1, 2), np.cumsum(n_bins[:-1]))
    try:
        return ShardRecord(shard, contexts, kept, data[start:numbers], {
            name: ShardSums.of(values, pairs, kept) for name, values, pairs in zip(names, sums, used, strict=True)})
    except ValueError as e:
        raise StoreCorruptError(f"{path}: {e}; {AGAIN}") from e
