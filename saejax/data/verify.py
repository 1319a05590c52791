"""Verification of every byte of a store, in several threads."""

import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError
from saejax.base.storage import file_sha256, inside, json_bytes
from saejax.base.threads import in_order, processors
from saejax.data import token_store
from saejax.data.manifest import StoreSpec
from saejax.data.shard_record import read_record
from saejax.data.shards import AGAIN, ArrayReader, ShardTruth
from saejax.data.store import (
    CRCS,
    MANIFEST,
    SPEC,
    STATISTICS,
    TEXT,
    Store,
    finished_shards,
    is_complete,
    read_spec,
    record_file,
    spec_file,
)
from saejax.data.token_store import TokenStore

_MOST_THREADS = 8


@dataclass(frozen=True)
class Check:
    """A file, what raises `StoreCorruptError` unless every byte of it is right, and the shard that it belongs to."""

    file: Path
    run: Callable[[], object]
    shard: int | None = None


def checks(store: Store) -> Iterator[Check]:
    """Checks of all files of a finished store but the manifest, which was checked when it was read."""
    path, spec = store.path, store.spec
    yield Check(path / CRCS, lambda: _same_digest(path / CRCS, store.manifest["crcs"]["sha256"]))
    yield Check(path / STATISTICS, lambda: store.totals)
    yield Check(path / SPEC, lambda: _same_bytes(path / SPEC, json_bytes(spec_file(spec))))
    for name, array in spec.arrays().items():
        yield Check(path / name / "zarr.json", functools.partial(_check_metadata, path, name, array.metadata(store.rows)))
    for shard in range(store.n_shards):
        yield Check(path / record_file(shard), functools.partial(_check_record, store, shard), shard)
        for name, array in spec.arrays().items():
            yield Check(path / array.shard_file(shard), functools.partial(store.check_shard, name, shard), shard)


def unfinished_checks(path: Path, spec: StoreSpec) -> Iterator[Check]:
    """Checks of the finished shards of a store that has no manifest yet: of their records, and of their files against these."""
    words = spec.crc_words()
    for shard in finished_shards(path):
        record = functools.cache(functools.partial(read_record, path / record_file(shard), spec, shard))
        yield Check(path / record_file(shard), record, shard)
        for name, array in spec.arrays().items():
            def truth(_, record=record, array=array, place=words[name]) -> ShardTruth:
                rows = record().contexts * spec.context
                return ShardTruth(rows, np.frombuffer(record().crcs, "<u4")[place][:array.chunks(rows)])
            reader = ArrayReader(path, array, spec.target_contexts * spec.context, truth, None)
            yield Check(path / array.shard_file(shard), functools.partial(reader.check_shard, shard), shard)


def outcomes(these: Iterable[Check]) -> Iterator[tuple[Check, StoreCorruptError | None]]:
    """Runs checks side by side; each with its error, in their order."""
    return in_order(lambda check: (check, _error_of(check)), these, processors(_MOST_THREADS))


def verify(store: Store) -> None:
    """Raises the first `StoreCorruptError` of a store."""
    for _, error in outcomes(checks(store)):
        if error is not None:
            raise error


def mend(path: Path) -> list[str]:
    """Takes away what does not verify of a store, finished or not, so that a harvest writes it again: records of bad shards, the
    manifest where anything is wrong or missing, the token store. Returns the files that were wrong, relative to the store.
    """
    path, bad = Path(path), []
    if is_complete(path):
        try:
            store = Store.open(path)
            bad = _bad(path, (check for check in checks(store) if check.shard is None))
            bad += [record_file(shard) for shard in sorted(set(range(store.n_shards)) - set(finished_shards(path)))]
        except StoreCorruptError:
            bad = [MANIFEST]
    if (path / SPEC).is_file() and SPEC not in bad:
        bad += _bad(path, unfinished_checks(path, read_spec(path)))
    if bad:
        (path / MANIFEST).unlink(missing_ok=True)
    if token_store.is_complete(path / TEXT):
        try:
            TokenStore.open(path / TEXT).verify()
        except StoreCorruptError:
            shutil.rmtree(path / TEXT)
            bad.append(TEXT)
    return bad


def _bad(path: Path, these: Iterable[Check]) -> list[str]:
    """Files that do not verify, of a shard the first; the record of such a shard is taken away."""
    bad, shards = [], set()
    for check, error in outcomes(these):
        if error is not None and check.shard not in shards:
            bad.append(check.file.relative_to(path).as_posix())
            if check.shard is not None:
                shards.add(check.shard)
                (path / record_file(check.shard)).unlink(missing_ok=True)
    return bad


def _error_of(check: Check) -> StoreCorruptError | None:
    try:
        check.run()
    except StoreCorruptError as error:
        return error
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else error.strerror
        return StoreCorruptError(f"{check.file}: {reason}; {AGAIN}")
    return None


def _same_digest(path: Path, expected: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise StoreCorruptError(f"{path}: altered since the manifest was written (sha256 {found[:12]}, expected "
                                f"{expected[:12]}); {AGAIN}")


def _same_bytes(path: Path, expected: bytes) -> None:
    if path.read_bytes() != expected:
        raise StoreCorruptError(f"{path}: altered, it does not say what the manifest says; {AGAIN}")


def _check_metadata(root: Path, array: str, expected: dict) -> None:
    _same_bytes(inside(root, f"{array}/zarr.json", StoreCorruptError), json_bytes(expected))


def _check_record(store: Store, shard: int) -> None:
    path = store.path / record_file(shard)
    record = read_record(path, store.spec, shard)
    if record.contexts != store.spec.contexts_of(shard, store.n_contexts):
        raise StoreCorruptError(f"{path}: is of {record.contexts} contexts, the manifest says otherwise; {AGAIN}")
    if record.crcs != store.checksums.row(shard):
        raise StoreCorruptError(f"{path}: its checksums are not those of {CRCS} (stale file); {AGAIN}")
