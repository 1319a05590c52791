"""The activation store: bf16 activation rows on disk with their tokens, masks and norms, and a manifest written last.

    manifest.json                     everything below, its digests and the statistics; its presence means "complete"
    spec.json                         what decides the bytes; a directory made for another spec is refused
    shards/00000.json                 record of a finished shard: checksums, partial statistics, where the text stood
    acts/<hookpoint>/  [N, D] bf16    tokens/ [N] int32    keep/ [N] uint8    norms/<hookpoint>/ [N] float32 ||x||

N = contexts x context length: row r is token r % T of context r // T. Every row is stored; `keep` is 0 at masked
special tokens. Equal inputs give equal bytes, whichever process wrote which shard. docs/reference/store_format.md has the
details.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.records import OUTLIER_FACTOR, UNKNOWN, ActivationStats
from saejax.base.storage import file_sha256, inside, text_sha256
from saejax.data import manifest as mf
from saejax.data.manifest import StoreSpec
from saejax.data.shards import AGAIN, ArrayReader, ShardTruth, Span, check_layout

MANIFEST, SPEC, RECORDS = "manifest.json", "spec.json", "shards"
_READ_THREADS = 2  # one is enough for the page cache, two keep a disk busy


def record_file(shard: int) -> str:
    """Path of a shard's record relative to the store."""
    return f"{RECORDS}/{shard:05d}.json"


def is_complete(path: str | Path) -> bool:
    """True where a manifest says that the harvest finished."""
    return (Path(path) / MANIFEST).is_file()


class Store:
    """A complete activation store. Reads never return a value that does not match what was written.

    Every error is a `StoreCorruptError` that names the file.
    """

    def __init__(self, path: Path, values: dict, spec: StoreSpec):
        self.path, self.manifest, self.spec = path, values, spec
        self.context, self.n_contexts, self.rows = spec.context, values["n_contexts"], values["rows"]
        self.kept_rows: int = values["kept_rows"]
        self.hookpoints = tuple(name for name, _ in spec.hookpoints)
        self.digest: str = values["sha256"]
        self.has_tokens: bool = spec.text.get("tokens", True)
        self._contexts = mf.shard_contexts(spec, self.n_contexts)
        self._crcs = functools.cache(self._read_crcs)
        pool = ThreadPoolExecutor(_READ_THREADS, "saejax-read")
        self._readers = {name: ArrayReader(path, array, self.rows, functools.partial(self._truth, name), pool)
                         for name, array in spec.arrays().items()}

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {self.rows:,} rows of {', '.join(self.hookpoints)})"[:150]

    @classmethod
    def open(cls, path: str | Path, *, full: bool = False) -> "Store":
        """Opens a finished store. Checks the manifest and the size of every file, with `full` also every digest.

        Raises `StoreError` (no store, not finished, newer schema) or `StoreCorruptError` (naming the file).
        """
        path = Path(path)
        if not is_complete(path):
            raise StoreError(_unfinished(path))
        store = cls(path, *mf.read_manifest(path / MANIFEST))
        store._verify(full)
        return store

    def width(self, hookpoint: str) -> int:
        """d_in of a hookpoint. Raises `StoreError` when the store does not hold it."""
        widths = dict(self.spec.hookpoints)
        if hookpoint not in widths:
            raise StoreError(f"{self.path}: holds {', '.join(widths)}, not {hookpoint!r}; add it to "
                             "config.harvest.hookpoints "
                             "and harvest into a new directory")
        return widths[hookpoint]

    def stats(self, hookpoint: str) -> ActivationStats:
        """Statistics of the kept rows, raw units."""
        self.width(hookpoint)
        s = self.manifest["stats"][hookpoint]
        return ActivationStats(self.kept_rows, np.array(s["mean"], np.float64), s["mean_norm"], s["mean_sq_norm"],
                               s["median_norm"])

    def outlier_bound(self, hookpoint: str) -> float:
        """Norm above which a row is an outlier: 10 x the median norm."""
        return OUTLIER_FACTOR * self.stats(hookpoint).median_norm

    def read(self, hookpoint: str, start: int, stop: int) -> np.ndarray:
        """bfloat16 [stop - start, D] activations as harvested."""
        self.width(hookpoint)
        return self._readers[f"acts/{hookpoint}"].read(start, stop)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 token ids of these rows."""
        return self._readers["tokens"].read(start, stop)

    def keep(self, start: int, stop: int) -> np.ndarray:
        """bool, False at masked special tokens."""
        return self._readers["keep"].read(start, stop).astype(bool)

    def norms(self, hookpoint: str, start: int, stop: int) -> np.ndarray:
        """float32 Euclidean norms of these rows."""
        self.width(hookpoint)
        return self._readers[f"norms/{hookpoint}"].read(start, stop)

    def read_into(self, array: str, spans: Iterable[Span], out: np.ndarray) -> None:
        """Reads row spans of an array ("tokens", "acts/<hookpoint>", ...) into `out`, in several threads."""
        self._readers[array].read_into(spans, out)

    def scatter(self, array: str, spans: Iterable[Span], slot_R: np.ndarray, out: np.ndarray) -> None:
        """Reads the R rows of some spans; row r goes to `out[slot_R[r]]`, nowhere where that is -1. In several threads."""
        self._readers[array].scatter(spans, slot_R, out)

    def _verify(self, full: bool) -> None:
        arrays = self.spec.arrays()
        for name, array in arrays.items():
            meta = inside(self.path, f"{name}/zarr.json", StoreCorruptError)
            _same_digest(meta, self.manifest["arrays"][name]["zarr_json_sha256"])
            for shard, contexts in enumerate(self._contexts):
                file = self.path / array.shard_file(shard)
                _same_size(file, array.shard_bytes(contexts * self.context))
                if full:
                    check_layout(self.path, array, shard, contexts * self.context)
                    _same_digest(file, self.manifest["shards"][shard]["files"][name]["sha256"])
        for shard in range(len(self._contexts) if full else 0):
            self._crcs(shard)
        if full:
            _same_digest(self.path / SPEC, self.manifest["spec_file_sha256"])

    def _read_crcs(self, shard: int) -> dict[str, bytes]:
        """The checksum words of a shard by array; the rest of its record, D sums per hookpoint, is not kept."""
        path = self.path / record_file(shard)
        _same_digest(path, self.manifest["shards"][shard]["record_sha256"])
        files = read_record(path, self.spec, self._contexts[shard])["files"]
        return {name: bytes.fromhex(entry["crcs"]) for name, entry in files.items()}

    def _truth(self, name: str, shard: int) -> ShardTruth:
        return ShardTruth(self._contexts[shard] * self.context, self._crcs(shard)[name])


def read_record(path: Path, spec: StoreSpec, contexts: int | None = None) -> dict:
    """A shard record, validated against the spec. Raises `StoreCorruptError`."""
    f = mf.file_keys(path)
    n = f.count("contexts", least=contexts or 1, most=contexts or spec.shard_contexts)
    if f.hex("spec_sha256") != spec_digest(spec):
        raise StoreCorruptError(f"{path}: belongs to another store")
    f.count("kept_rows")
    f.get("text_state", dict)
    for name, array in spec.arrays().items():
        entry = f.section("files").section(name)
        entry.hex("sha256")
        entry.hex("crcs", 8 * array.chunks(n * spec.context))
        entry.one_of("bytes", (array.shard_bytes(n * spec.context),))
    for name, width in spec.hookpoints:
        sums = f.section("sums").section(name)
        sums.numbers("x", width), sums.number("norm"), sums.number("sq_norm")
    return f.values


def spec_digest(spec: StoreSpec) -> str:
    """SHA-256 of the spec in canonical JSON."""
    return text_sha256(json.dumps(spec.to_json(), sort_keys=True, separators=(",", ":")))


def spec_file(spec: StoreSpec) -> dict:
    """What `spec.json` holds."""
    return {"kind": mf.KIND, "schema_version": mf.SCHEMA_VERSION, "spec": spec.to_json()}


def read_spec(path: Path) -> StoreSpec:
    """The spec a directory was made for, finished or not."""
    f = mf.file_keys(path / SPEC)
    mf.check_version(f)
    return mf.read_spec(f)


def _unfinished(path: Path) -> str:
    if not (path / SPEC).is_file():
        return f"{path}: no activation store here; run `saejax harvest` with this config first"
    done = len(list((path / RECORDS).glob("*.json")))
    return (f"{path / MANIFEST}: missing, so the harvest has not finished ({done} of "
            f"{read_spec(path).target_shards} shards "
            "are there); run `saejax harvest` again, it resumes")


def _same_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as e:
        raise StoreCorruptError(f"{path}: missing; {AGAIN}") from e
    if size != expected:
        raise StoreCorruptError(f"{path}: {size} bytes, the manifest says {expected}; {AGAIN}")


def _same_digest(path: Path, expected: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as e:
        raise StoreCorruptError(f"{path}: missing; {AGAIN}") from e
    if found != expected:
        raise StoreCorruptError(f"{path}: altered since the manifest was written (sha256 {found[:12]}, expected "
                                f"{expected[:12]}); {AGAIN}")


def model_name(model: str) -> str:
    """`config.lm.model` as a store names it: of a local file or directory the last component, so that no path is kept."""
    return Path(model).name if Path(model).expanduser().exists() else model


def check_matches(store: Store, *, hookpoints: Sequence[str] = (), d_in: int | None = None, model: str | None = None,
                  context: int | None = None, batch: int | None = None) -> None:
    """Raises one `StoreError` that lists every config key which the store contradicts, with both values."""
    missing = [hookpoint for hookpoint in hookpoints if hookpoint not in store.hookpoints]
    problems = []
    if missing:
        problems.append(f"config.sae reads {', '.join(map(repr, missing))}, the store holds {', '.join(store.hookpoints)}")
    if hookpoints and not missing and d_in is not None and d_in != store.width(hookpoints[0]):
        problems.append(f"config.sae.d_in is {d_in}, the store's {hookpoints[0]} is {store.width(hookpoints[0])} wide")
    if model is not None and model_name(model) != store.spec.model and store.spec.model == UNKNOWN:
        problems.append(f"config.lm.model is {model_name(model)!r}, the store does not say which it is of: set 'unknown'")
    elif model is not None and model_name(model) != store.spec.model:
        problems.append(f"config.lm.model is {model_name(model)!r}, the store was harvested from {store.spec.model!r}")
    if context is not None and context != store.context:
        problems.append(f"config.text.context is {context}, the store's contexts have {store.context} tokens")
    if batch is not None and batch > store.kept_rows:
        problems.append(f"config.train.batch is {batch} rows, the store has {store.kept_rows} that are not masked")
    if problems:
        raise StoreError(f"{store.path / MANIFEST}: does not match the config: {'; '.join(problems)}; change the "
                         "config or harvest into another directory")
