"""The activation store: bf16 activation rows on disk with their tokens and masks, and a manifest written last.

    manifest.json                     spec, counts, digests of the two files below; its presence means "complete"
    crcs.bin                          the crc32c of every chunk of every array, at places that follow from the spec
    statistics.npz                    sums and a histogram of norms of every hookpoint
    spec.json                         what decides the bytes; a directory made for another spec is refused
    shards/00000.bin                  record of a finished shard: checksums and partial sums
    acts/<hookpoint>/  [N, D] bf16    tokens/ [N] int32, ids; -1 - id where a row is masked

N = contexts x context length: row r is token r % T of context r // T. Every row is stored, masked ones too. Equal inputs give
equal bytes, whichever process wrote which shard. docs/reference/store_format.md has the details.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from saejax.base.errors import StoreCorruptError, StoreError
from saejax.base.records import OUTLIER_FACTOR, UNKNOWN, ActivationStats
from saejax.base.storage import inside
from saejax.base.threads import processors
from saejax.data import checksums, statistics
from saejax.data import manifest as mf
from saejax.data.checksums import Checksums
from saejax.data.manifest import StoreSpec
from saejax.data.shards import AGAIN, ArrayReader, ArraySpec, ShardTruth, Span

MANIFEST, SPEC, RECORDS, TEXT = "manifest.json", "spec.json", "shards", "text"
CRCS, STATISTICS = checksums.FILE, "statistics.npz"
_MOST_THREADS = 8  # that read large parts side by side; more than processors only wait for each other


def record_file(shard: int) -> str:
    """Path of a shard's record relative to the store."""
    return f"{RECORDS}/{shard:05d}.bin"


def finished_shards(path: Path) -> list[int]:
    """Shards of a store, finished or not, that have a record, in order."""
    return sorted(int(file.stem) for file in (Path(path) / RECORDS).glob("*.bin") if file.stem.isdecimal())


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
        self.n_shards = spec.shards(self.n_contexts)
        self.checksums = Checksums(path, values, spec)
        pool = ThreadPoolExecutor(processors(_MOST_THREADS), "saejax-read")
        self._readers = {name: ArrayReader(path, array, self.rows, functools.partial(self._truth, name, array), pool)
                         for name, array in spec.arrays().items()}
        self._folder = functools.cache(functools.partial(inside, path, error=StoreCorruptError))

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {self.rows:,} rows of {', '.join(self.hookpoints)})"[:150]

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a finished store. Reads the manifest only; `data.verify.verify` reads every byte of every file.

        Raises `StoreError` (no store, not finished, another schema) or `StoreCorruptError` (naming the file).
        """
        path = Path(path)
        if not is_complete(path):
            raise StoreError(_unfinished(path))
        return cls(path, *mf.read_manifest(path / MANIFEST))

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
        return self.totals[hookpoint].stats()

    @functools.cached_property
    def totals(self) -> dict[str, statistics.ShardSums]:
        """What `statistics.npz` holds, by hookpoint."""
        path = self.path / STATISTICS
        try:
            data = path.read_bytes()
        except OSError as e:
            raise StoreCorruptError(f"{path}: {e.strerror or 'missing'}; {AGAIN}") from e
        if hashlib.sha256(data).hexdigest() != self.manifest["statistics_sha256"]:
            raise StoreCorruptError(f"{path}: altered since the manifest was written; {AGAIN}")
        return statistics.from_npz(data, path, self.spec.hookpoints, self.kept_rows)

    def outlier_bound(self, hookpoint: str) -> float:
        """Norm above which a row is an outlier: 10 x the median norm."""
        return OUTLIER_FACTOR * self.stats(hookpoint).median_norm

    def read(self, hookpoint: str, start: int, stop: int) -> np.ndarray:
        """bfloat16 [stop - start, D] activations as harvested."""
        self.width(hookpoint)
        return self._readers[f"acts/{hookpoint}"].read(start, stop)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 token ids of these rows."""
        ids = self._readers[mf.TOKENS].read(start, stop)
        return np.maximum(ids, ~ids)

    def keep(self, start: int, stop: int) -> np.ndarray:
        """bool, False at rows that are masked."""
        return self._readers[mf.TOKENS].read(start, stop) >= 0

    def keep_of(self, spans: Sequence[Span]) -> np.ndarray:
        """`keep` of the rows of these spans, side by side."""
        ids = np.empty(sum(stop - start for start, stop in spans), np.int32)
        self._readers[mf.TOKENS].read_into(spans, ids)
        return ids >= 0

    def scatter(self, array: str, spans: Iterable[Span], slot_R: np.ndarray, out: np.ndarray) -> None:
        """Reads the R rows of some spans; row r goes to `out[slot_R[r]]`, those with -1 to its last row. In several threads."""
        self._readers[array].scatter(spans, slot_R, out)

    def announce(self, array: str, spans: Iterable[Span]) -> None:
        """Says that these rows of an array are read soon."""
        self._readers[array].announce(spans)

    def check_shard(self, array: str, shard: int) -> None:
        """Reads all of a shard of an array. Raises `StoreCorruptError` unless every byte of it is right."""
        self._readers[array].check_shard(shard)

    def _truth(self, name: str, array: ArraySpec, shard: int) -> ShardTruth:
        self._folder(name)
        rows = self.spec.contexts_of(shard, self.n_contexts) * self.context
        return ShardTruth(rows, self.checksums.of(name, shard, array.chunks(rows)))


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
    done = len(finished_shards(path))
    return (f"{path / MANIFEST}: missing, so the harvest has not finished ({done} of "
            f"{read_spec(path).target_shards} shards "
            "are there); run `saejax harvest` again, it resumes")


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
