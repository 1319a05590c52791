"""Writing an activation store: whole shards, each by one process, then what is gathered of them and the manifest."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.base import lease
from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.storage import disk_errors, replacing, write_bytes, write_json
from saejax.base.threads import in_order
from saejax.base.verified import digests
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shard_record import ShardRecord, read_record
from saejax.data.shard_writer import crc_row, write_shard_files
from saejax.data.statistics import ShardSums, to_npz
from saejax.data.store import CRCS, MANIFEST, RECORDS, SPEC, STATISTICS, TEXT, Store, read_spec, record_file, spec_file

_LOOK_UP_THREADS = 8


class StoreWriter:
    """Fills a store directory shard by shard; any number of processes may fill different shards of the same directory.

    A directory that was made for another spec but holds no finished shard is taken over, and one with fewer contexts grows:
    its shards stay as they are. Raises `StoreError` when it holds a shard of another spec (listing the differences) or is not a
    store.
    threads: that write a shard; no byte depends on it.
    """

    def __init__(self, path: str | Path, spec: StoreSpec, *, threads: int | None = None):
        self.path, self.spec = Path(path), spec
        self._threads, self._arrays, self._digest = threads, spec.arrays(), mf.spec_digest(spec)
        with disk_errors(self.path):
            # Listed before looking for spec.json: another process may be making the same store at this moment.
            there = list(self.path.iterdir()) if self.path.exists() else []
            foreign = [p for p in there if SPEC not in p.name and p.name not in (RECORDS, TEXT, lease.FILE)]
            if (self.path / SPEC).is_file():
                self._take_over()
            elif foreign:
                raise StoreError(f"{self.path}: is not empty and not an activation store; choose another "
                                 "config.harvest.store")
            else:
                write_json(self.path / SPEC, spec_file(spec))
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)

    def _take_over(self) -> None:
        """Nothing for a store of this spec; one of another spec becomes this one's as long as nothing is lost by it."""
        # Looked for before the spec is read: another process of this same harvest writes the spec before its first shard.
        used = (self.path / MANIFEST).exists() or any((self.path / RECORDS).glob("*.bin"))
        found = read_spec(self.path)
        differences = found.differences(self.spec)
        if not differences:
            return
        if used and not found.grows_to(self.spec):
            raise StoreError(f"{self.path}: belongs to another config ({'; '.join(differences)}); choose another "
                             "config.harvest.store or delete this one")
        (self.path / MANIFEST).unlink(missing_ok=True)  # it speaks of fewer shards
        for name in found.arrays().keys() - self.spec.arrays().keys():
            shutil.rmtree(self.path / name, ignore_errors=True)
        write_json(self.path / SPEC, spec_file(self.spec))

    def record(self, shard: int) -> ShardRecord | None:
        """The record of a finished shard; None where the shard is missing, or where its files have not their exact sizes."""
        path = self.path / record_file(shard)
        if not path.is_file():
            return None
        try:
            record = read_record(path, self.spec, shard, digest=self._digest)
            rows = record.contexts * self.spec.context
            if any(os.stat(self.path / array.shard_file(shard)).st_size != array.shard_bytes(rows)
                   for array in self._arrays.values()):
                return None
        except (StoreCorruptError, OSError):
            return None
        return record

    def _records(self, shards: Sequence[int]) -> Iterator[ShardRecord | None]:
        """`record` of many shards. What takes time is the storage, so that threads help beyond the number of processors."""
        return in_order(self.record, shards, _LOOK_UP_THREADS)

    def missing_shards(self, process: int = 0, n_processes: int = 1, *, contexts: int | None = None) -> list[int]:
        """Shards of so many contexts (all of the spec) that this process still has to write, for the first time or longer."""
        n_contexts = self.spec.target_contexts if contexts is None else contexts
        mine = range(process, self.spec.shards(n_contexts), n_processes)
        return [shard for shard, record in zip(mine, self._records(mine), strict=True)
                if record is None or record.contexts != self.spec.contexts_of(shard, n_contexts)]

    def write_shard(self, shard: int, acts: dict[str, np.ndarray], tokens_NT: np.ndarray,
                    keep_NT: np.ndarray) -> None:
        """Writes one shard: `acts[hookpoint]` bfloat16 [N, T, D] or [N * T, D].

        Raises `NonFiniteError` with the count and the first rows, and `DiskError`; nothing is left then.
        """
        n = len(tokens_NT)
        rows = n * self.spec.context
        if not 0 < n <= self.spec.shard_contexts or set(acts) != {h for h, _ in self.spec.hookpoints}:
            raise ValueError(f"shard {shard}: {n} contexts of {sorted(acts)} do not fit the spec")
        keep_N = np.ascontiguousarray(keep_NT).reshape(rows).astype(bool)
        record = self.path / record_file(shard)
        lease.confirm()
        with disk_errors(record):
            record.unlink(missing_ok=True)
        crcs, sums = write_shard_files(
            self.path, shard, self._arrays,
            {name: np.ascontiguousarray(acts[name]).reshape(rows, width) for name, width in self.spec.hookpoints},
            np.ascontiguousarray(tokens_NT, np.int32).reshape(rows), keep_N, context=self.spec.context, threads=self._threads)
        written = ShardRecord(shard, n, int(keep_N.sum()), crc_row(self._arrays, crcs), sums)
        write_bytes(record, written.to_bytes(self.spec))

    def finalize(self, n_contexts: int) -> Store:
        """Gathers the records and writes, last, the manifest. One process calls it, when every shard is there.

        Raises `StoreError` naming missing shards.
        """
        n_shards, missing, kept = self.spec.shards(n_contexts), [], 0
        sums = {name: ShardSums.zero(width) for name, width in self.spec.hookpoints}
        with replacing(self.path / CRCS) as crcs:
            for shard, record in enumerate(self._records(range(n_shards))):
                if record is None or record.contexts != self.spec.contexts_of(shard, n_contexts):
                    missing.append(shard)
                    continue
                crcs.write(record.crcs)
                kept += record.kept_rows
                for name, total in sums.items():
                    total.add(record.sums[name])
            if missing or not n_shards:
                raise StoreError(f"{self.path}: shards {missing[:8]} of {n_shards} are not written yet; run the "
                                 "harvest again")
            if kept == 0:
                raise StoreError(f"{self.path}: every token is masked; set config.text.mask=('first',)")
        self._write_manifest(n_contexts, kept, sums)
        return Store.open(self.path)

    def _write_manifest(self, n_contexts: int, kept: int, sums: dict[str, ShardSums]) -> None:
        for name, array in self._arrays.items():
            write_json(self.path / name / "zarr.json", array.metadata(n_contexts * self.spec.context))
        crcs = digests(self.path / CRCS, block=mf.crc_block(self.spec, n_contexts))
        found = to_npz(sums)
        write_bytes(self.path / STATISTICS, found)
        self._remove_leftovers()
        lease.confirm()
        write_json(self.path / MANIFEST,
                   mf.manifest_of(self.spec, n_contexts, kept, crcs, hashlib.sha256(found).hexdigest()))

    def _remove_leftovers(self) -> None:
        """Temporary files of processes that were killed."""
        for folder in (".", RECORDS, *self._arrays):
            for file in (self.path / folder).glob(".*.tmp-*"):
                file.unlink(missing_ok=True)
