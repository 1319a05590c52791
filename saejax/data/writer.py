"""Writing an activation store: whole shards, each by one process in one write per array, then the manifest."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shards import check_layout, write_shard_files
from saejax.data.store import (
    MANIFEST,
    RECORDS,
    SPEC,
    Store,
    read_record,
    read_spec,
    record_file,
    spec_digest,
    spec_file,
)
from saejax.errors import NonFiniteError, StoreCorruptError, StoreError
from saejax.records import OUTLIER_FACTOR
from saejax.storage import disk_errors, file_sha256, write_json

_F32_MAX = float(np.finfo(np.float32).max)
_ROWS_AT_ONCE = 256


class StoreWriter:
    """Fills a store directory shard by shard; any number of processes may fill different shards of the same directory.

    Raises `StoreError` when the directory belongs to another spec (listing the differences) or is not a store.
    """

    def __init__(self, path: str | Path, spec: StoreSpec):
        self.path, self.spec = Path(path), spec
        with disk_errors(self.path):
            # Listed before looking for spec.json: another process may be making the same store at this moment.
            there = list(self.path.iterdir()) if self.path.exists() else []
            foreign = [p for p in there if SPEC not in p.name and p.name != RECORDS]
            if (self.path / SPEC).is_file():
                differences = read_spec(self.path).differences(spec)
                if differences:
                    raise StoreError(f"{self.path}: belongs to another config ({'; '.join(differences)}); choose "
                                     "another "
                                     "config.harvest.store or delete this one")
            elif foreign:
                raise StoreError(f"{self.path}: is not empty and not an activation store; choose another "
                                 "config.harvest.store")
            else:
                write_json(self.path / SPEC, spec_file(spec))
            (self.path / RECORDS).mkdir(parents=True, exist_ok=True)

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
        records = [self.record(s) for s in range(len(sizes))]
        missing = [s for s, (r, n) in enumerate(zip(records, sizes, strict=True)) if r is None or r["contexts"] != n]
        if missing or not sizes:
            raise StoreError(f"{self.path}: shards {missing[:8]} of {len(sizes)} are not written yet; run the "
                             "harvest again")
        kept = sum(r["kept_rows"] for r in records)
        if kept == 0:
            raise StoreError(f"{self.path}: every token is special and masked; set config.harvest.mask_special=False")
        rows = n_contexts * self.spec.context
        arrays = self.spec.arrays()
        for name, array in arrays.items():
            write_json(self.path / name / "zarr.json", array.metadata(rows))
        values = {
            "kind": mf.KIND, "schema_version": mf.SCHEMA_VERSION, "spec": self.spec.to_json(), "n_contexts": n_contexts,
            "rows": rows, "kept_rows": kept, "spec_file_sha256": file_sha256(self.path / SPEC),
            "arrays": {name: {"zarr_json_sha256": file_sha256(self.path / name / "zarr.json")} for name in arrays},
            "shards": [self._entry(s, r) for s, r in enumerate(records)], "stats": {}}
        values["sha256"] = "0" * 64
        draft = Store(self.path, values, self.spec)
        for name, _ in self.spec.hookpoints:
            values["stats"][name] = _statistics(draft, name, [r["sums"][name] for r in records], kept)
        values["sha256"] = mf.self_digest(values)
        self._remove_leftovers()
        write_json(self.path / MANIFEST, values)
        return Store.open(self.path)

    def _entry(self, shard: int, record: dict) -> dict:
        arrays = self.spec.arrays()
        return {"contexts": record["contexts"], "record_sha256": file_sha256(self.path / record_file(shard)),
                "files": {name: {"file": arrays[name].shard_file(shard), "bytes": f["bytes"], "sha256": f["sha256"]}
                          for name, f in record["files"].items()}}

    def _remove_leftovers(self) -> None:
        """Lock and temporary files of processes that were killed."""
        for file in [*self.path.rglob("*.__lock"), *self.path.rglob(".*.tmp-*")]:
            file.unlink(missing_ok=True)


def row_statistics(x_ND: np.ndarray, keep_N: np.ndarray) -> tuple[np.ndarray, dict]:
    """float32 norms of bfloat16 rows, and {"x": sum of kept rows, "norm": sum ||x||, "sq_norm": sum ||x||^2} in
    float64.

    Sums run in one fixed order, so that a shard's record does not depend on threads or on what ran before.
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
            "the weights, "
            "or use config.lm.dtype='float32'")


def _statistics(store: Store, hookpoint: str, sums: list[dict], kept: int) -> dict:
    mean = np.zeros(store.width(hookpoint), np.float64)
    norm = sq_norm = 0.0
    for part in sums:
        mean += np.array(part["x"], np.float64)
        norm += part["norm"]
        sq_norm += part["sq_norm"]
    median = exact_median(lambda: kept_norms(store, hookpoint), kept)
    outliers = sum(int((n > OUTLIER_FACTOR * median).sum()) for n in kept_norms(store, hookpoint))
    return {"mean": (mean / kept).tolist(), "mean_norm": norm / kept, "mean_sq_norm": sq_norm / kept,
            "median_norm": median, "outliers": outliers}


def kept_norms(store: Store, hookpoint: str) -> Iterator[np.ndarray]:
    """The norms of the kept rows, shard by shard."""
    step = store.spec.shard_rows
    for a in range(0, store.rows, step):
        b = min(a + step, store.rows)
        yield store.norms(hookpoint, a, b)[store.keep(a, b)]


def exact_median(parts, count: int) -> float:
    """Median of `count` non-negative float32 values that `parts()` yields in pieces, in bounded memory.

    The bits of non-negative floats order as integers: one pass counts their upper halves, a second one collects the few
    values in the bucket of the middle.
    """
    histogram = np.zeros(1 << 16, np.int64)
    for part in parts():
        histogram += np.bincount(part.view(np.uint32) >> 16, minlength=1 << 16)
    below = np.concatenate([[0], np.cumsum(histogram)])
    ranks = ((count - 1) // 2, count // 2)
    low, high = (int(np.searchsorted(below, r, side="right")) - 1 for r in ranks)
    middle = np.sort(np.concatenate([p[((bits := p.view(np.uint32) >> 16) >= low) & (bits <= high)] for p in parts()]))
    first, second = (float(middle[r - below[low]]) for r in ranks)
    return (first + second) / 2
