"""Writing an activation store: whole shards, each by one process in one write per array, then the manifest."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from saejax.base import lease
from saejax.base.errors import NonFiniteError, StoreCorruptError, StoreError
from saejax.base.records import OUTLIER_FACTOR
from saejax.base.storage import disk_errors, file_sha256, write_json
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shards import check_layout, write_shard_files
from saejax.data.store import MANIFEST, RECORDS, SPEC, Store, read_record, read_spec, record_file, spec_digest, spec_file

_F32_MAX = float(np.finfo(np.float32).max)
_ROWS_AT_ONCE = 256


class StoreWriter:
    """Fills a store directory shard by shard; any number of processes may fill different shards of the same directory.

    A directory that was made for another spec but holds no finished shard is taken over. Raises `StoreError` when it
    holds one (listing the differences) or is not a store.
    """

    def __init__(self, path: str | Path, spec: StoreSpec):
        self.path, self.spec = Path(path), spec
        with disk_errors(self.path):
            # Listed before looking for spec.json: another process may be making the same store at this moment.
            there = list(self.path.iterdir()) if self.path.exists() else []
            foreign = [p for p in there if SPEC not in p.name and p.name not in (RECORDS, lease.FILE)]
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
        used = (self.path / MANIFEST).exists() or any((self.path / RECORDS).glob("*.json"))
        found = read_spec(self.path)
        differences = found.differences(self.spec)
        if not differences:
            return
        if used:
            raise StoreError(f"{self.path}: belongs to another config ({'; '.join(differences)}); choose another "
                             "config.harvest.store or delete this one")
        for name in found.arrays().keys() - self.spec.arrays().keys():
            shutil.rmtree(self.path / name, ignore_errors=True)
        write_json(self.path / SPEC, spec_file(self.spec))

    def record(self, shard: int) -> dict | None:
        """The record of a finished shard; None where the shard is missing, or where its files are not as recorded."""
        path = self.path / record_file(shard)
        if not path.is_file():
            return None
        try:
            record = read_record(path, self.spec)
            for array in self.spec.arrays().values():
                check_layout(self.path, array, shard, record["contexts"] * self.spec.context)
        except StoreCorruptError:
            return None
        return record

    def missing_shards(self, process: int = 0, n_processes: int = 1) -> list[int]:
        """Shards that this process still has to write (fewer exist where the text ends early)."""
        return [s for s in range(process, self.spec.target_shards, n_processes) if self.record(s) is None]

    def write_shard(self, shard: int, acts: dict[str, np.ndarray], tokens_NT: np.ndarray, keep_NT: np.ndarray,
                    text_state: dict) -> None:
        """Writes one shard: `acts[hookpoint]` bfloat16 [N, T, D] or [N * T, D]; `text_state` is where the text stands
        behind it.

        Raises `NonFiniteError` with the count and the first rows (nothing is written) and `DiskError` (nothing is
        left).
        """
        n = len(tokens_NT)
        rows = n * self.spec.context
        if not 0 < n <= self.spec.shard_contexts or set(acts) != {h for h, _ in self.spec.hookpoints}:
            raise ValueError(f"shard {shard}: {n} contexts of {sorted(acts)} do not fit the spec")
        keep = np.ascontiguousarray(keep_NT, np.uint8).reshape(rows)
        values = {"tokens": np.ascontiguousarray(tokens_NT, np.int32).reshape(rows), "keep": keep}
        sums = {}
        for name, width in self.spec.hookpoints:
            x = np.ascontiguousarray(acts[name]).reshape(rows, width)
            norms, sums[name] = row_statistics(x, keep.astype(bool))
            check_finite(x, norms, name, shard * self.spec.shard_contexts, self.spec.context)
            values[f"acts/{name}"], values[f"norms/{name}"] = x, norms
        arrays = self.spec.arrays()
        record = self.path / record_file(shard)
        lease.confirm()
        with disk_errors(record):
            record.unlink(missing_ok=True)
        files = write_shard_files(self.path, shard, {arrays[name]: v for name, v in values.items()})
        write_json(record, {"contexts": n, "kept_rows": int(keep.sum()), "files": files, "sums": sums,
                            "text_state": text_state, "spec_sha256": spec_digest(self.spec)})

    def finalize(self, n_contexts: int) -> Store:
        """Writes the array metadata and, last, the manifest. One process calls it, when every shard is there.

        Raises `StoreError` naming missing shards.
        """
        sizes = mf.shard_contexts(self.spec, n_contexts)
        entries, missing, kept = [], [], 0
        sums = {name: Sums(width) for name, width in self.spec.hookpoints}
        for shard, contexts in enumerate(sizes):
            record = self.record(shard)
            if record is None or record["contexts"] != contexts:
                missing.append(shard)
                continue
            entries.append(self._entry(shard, record))
            kept += record["kept_rows"]
            for name, total in sums.items():
                total.add(record["sums"][name])
        if missing or not sizes:
            raise StoreError(f"{self.path}: shards {missing[:8]} of {len(sizes)} are not written yet; run the "
                             "harvest again")
        if kept == 0:
            raise StoreError(f"{self.path}: every token is masked; set config.text.mask=('first',)")
        self._write_manifest(n_contexts, kept, entries, sums)
        return Store.open(self.path)

    def _write_manifest(self, n_contexts: int, kept: int, entries: list[dict], sums: dict[str, "Sums"]) -> None:
        rows = n_contexts * self.spec.context
        arrays = self.spec.arrays()
        for name, array in arrays.items():
            write_json(self.path / name / "zarr.json", array.metadata(rows))
        values = {
            "kind": mf.KIND, "schema_version": mf.SCHEMA_VERSION, "spec": self.spec.to_json(), "n_contexts": n_contexts,
            "rows": rows, "kept_rows": kept, "spec_file_sha256": file_sha256(self.path / SPEC),
            "arrays": {name: {"zarr_json_sha256": file_sha256(self.path / name / "zarr.json")} for name in arrays},
            "shards": entries, "stats": {}, "sha256": "0" * 64}
        draft = Store(self.path, values, self.spec)
        for name in sums:
            values["stats"][name] = _statistics(draft, name, sums[name], kept)
        values["sha256"] = mf.self_digest(values)
        self._remove_leftovers()
        lease.confirm()
        write_json(self.path / MANIFEST, values)

    def _entry(self, shard: int, record: dict) -> dict:
        arrays = self.spec.arrays()
        return {"contexts": record["contexts"], "record_sha256": file_sha256(self.path / record_file(shard)),
                "files": {name: {"file": arrays[name].shard_file(shard), "bytes": f["bytes"], "sha256": f["sha256"]}
                          for name, f in record["files"].items()}}

    def _remove_leftovers(self) -> None:
        """Lock and temporary files of processes that were killed."""
        locks = [file for file in self.path.rglob("*.__lock") if not file.name.startswith(lease.FILE)]
        for file in [*locks, *self.path.rglob(".*.tmp-*")]:
            file.unlink(missing_ok=True)


def row_statistics(x_ND: np.ndarray, keep_N: np.ndarray) -> tuple[np.ndarray, dict]:
    """float32 norms of bfloat16 rows, and {"x": sum of kept rows, "norm": sum ||x||, "sq_norm": sum ||x||^2}.

    x is summed in float32 over 256 rows at a time and in float64 over these parts; ||x||^2 of a row is float32 (float64
    where that overflows), its sums are float64. Sums run in one fixed order, so that a shard's record does not depend
    on threads or on what ran before.
    """
    bits = x_ND.view(np.uint16)
    squares = np.empty(len(x_ND), np.float64)
    total = np.zeros(x_ND.shape[1], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for a in range(0, len(x_ND), _ROWS_AT_ONCE):
            rows = slice(a, a + _ROWS_AT_ONCE)
            # bfloat16 is the upper half of float32: shifting is the exact cast, and many times faster than astype.
            y = np.left_shift(bits[rows].astype(np.uint32), np.uint32(16)).view(np.float32)
            sq = np.square(y).sum(axis=1)
            if not np.isfinite(sq).all():
                sq = np.square(y, dtype=np.float64).sum(axis=1)
            squares[rows] = sq
            kept = keep_N[rows]
            total += (y if kept.all() else y[kept]).sum(axis=0)
        norms = np.sqrt(squares)
        np.minimum(norms, _F32_MAX, out=norms, where=np.isfinite(norms))
        sums = {"x": total.tolist(), "norm": float(norms[keep_N].sum()), "sq_norm": float(squares[keep_N].sum())}
    return norms.astype(np.float32), sums


def check_finite(x_ND: np.ndarray, norms_N: np.ndarray, hookpoint: str, first_context: int, context: int) -> None:
    """Raises `NonFiniteError` with the number of bad rows and the first (context, token) of them."""
    bad = np.flatnonzero(~np.isfinite(norms_N))
    if bad.size:
        raise NonFiniteError(non_finite_message(hookpoint, bad.size, len(x_ND), [
            (first_context + int(r) // context, int(r) % context) for r in bad[:5]]))


def non_finite_message(hookpoint: str, bad: int, of: int, places: list[tuple[int, int]]) -> str:
    where = ", ".join(f"({c}, {t})" for c, t in places)
    return (f"{hookpoint}: {bad} of {of} activation rows hold NaN or Inf, first at (context, token) {where}; check "
            "the weights, or use config.lm.dtype='float32'")


class Sums:
    """The sums of one hookpoint over all shards, added in the order of the shards."""

    def __init__(self, width: int):
        self.x_D, self.norm, self.sq_norm = np.zeros(width, np.float64), 0.0, 0.0

    def add(self, part: dict) -> None:
        """Adds the sums of a shard's record."""
        self.x_D += np.array(part["x"], np.float64)
        self.norm += part["norm"]
        self.sq_norm += part["sq_norm"]


def _statistics(store: Store, hookpoint: str, sums: Sums, kept: int) -> dict:
    median = exact_median(lambda: kept_norms(store, hookpoint), kept)
    outliers = sum(int((n > OUTLIER_FACTOR * median).sum()) for n in kept_norms(store, hookpoint))
    return {"mean": (sums.x_D / kept).tolist(), "mean_norm": sums.norm / kept, "mean_sq_norm": sums.sq_norm / kept,
            "median_norm": median, "outliers": outliers}


def kept_norms(store: Store, hookpoint: str) -> Iterator[np.ndarray]:
    """The norms of the kept rows, shard by shard."""
    step = store.spec.shard_rows
    for a in range(0, store.rows, step):
        b = min(a + step, store.rows)
        yield store.norms(hookpoint, a, b)[store.keep(a, b)]


def exact_median(parts: Callable[[], Iterable[np.ndarray]], count: int) -> float:
    """Median of `count` non-negative float32 values that `parts()` yields in pieces, in bounded memory.

    The bits of non-negative floats order as integers: one pass counts their upper halves, a second one the lower halves
    in the one or two buckets that hold the middle. All values may lie in one bucket, as norms behind a layer norm do.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in parts():
        upper += np.bincount(part.view(np.uint32) >> 16, minlength=1 << 16)
    places = [_bucket(upper, rank) for rank in ((count - 1) // 2, count // 2)]
    lower = {bucket: np.zeros(1 << 16, np.int64) for bucket, _ in places}
    for part in parts():
        bits = part.view(np.uint32)
        for bucket, histogram in lower.items():
            histogram += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    middle = np.array([bucket << 16 | _bucket(lower[bucket], rank)[0] for bucket, rank in places], np.uint32)
    return float(middle.view(np.float32).astype(np.float64).mean())


def _bucket(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that holds the value of this rank, and the rank of that value inside it."""
    ends = np.cumsum(histogram)
    bucket = int(np.searchsorted(ends, rank, side="right"))
    return bucket, rank - int(ends[bucket] - histogram[bucket])
