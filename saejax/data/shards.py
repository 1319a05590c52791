"""One array of the activation store: a zarr3 array whose shard files have a size and an order known to the byte.

A shard file (`<array>/c/<s>/0`, or `<array>/c/<s>` for one number per row) is what zarr3's `sharding_indexed` codec
writes for one outer chunk: its inner chunks in order, each followed by its crc32c, then the index (offset and size of
every inner chunk) and the index's crc32c. There is no compression, so every offset is arithmetic. That is used twice:
the size and index of a file are checked against what they must be, and the crc32c words beside the chunks that a read
touches are compared with those the writer recorded. tensorstore checks each chunk against its word, we check the word
against the record: a shard that is valid but stale or swapped cannot pass, and nothing is read twice.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.errors import StoreCorruptError
from saejax.storage import disk_errors, file_sha256

_CRC = 4
_INDEX_ENTRY = 16
_SIDE_CHUNK_ROWS = 2048
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int32": np.dtype(np.int32), "uint8": np.dtype(np.uint8),
           "float32": np.dtype(np.float32)}
Span = tuple[int, int]
# The fix of every damaged store: a harvest opens one that has its manifest, and would fail in the same place.
AGAIN = "delete this store and run `saejax harvest` again"


def side_chunk_rows(chunk_rows: int, shard_rows: int) -> int:
    """Rows of a checksummed chunk for the arrays with one number per row: `chunk_rows` doubled while it stays small."""
    while chunk_rows * 2 <= _SIDE_CHUNK_ROWS and shard_rows % (chunk_rows * 2) == 0:
        chunk_rows *= 2
    return chunk_rows


@dataclass(frozen=True)
class ArraySpec:
    """Name (its path inside the store), type and chunking of one array; `width` is None for one number per row."""

    name: str
    dtype: str
    width: int | None
    shard_rows: int
    chunk_rows: int

    @property
    def numpy_dtype(self) -> np.dtype:
        return _DTYPES[self.dtype]

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * (self.width or 1) * self.numpy_dtype.itemsize

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    def shard_file(self, shard: int) -> str:
        """Path of a shard file relative to the store."""
        return f"{self.name}/c/{shard}" + ("" if self.width is None else "/0")

    def chunks(self, rows: int) -> int:
        """Chunks that a shard of `rows` rows holds; the last is padded with the fill value."""
        return -(-rows // self.chunk_rows)

    def shard_bytes(self, rows: int) -> int:
        """Exact size of the file of a shard that holds `rows` rows."""
        slots = self.shard_rows // self.chunk_rows
        return self.chunks(rows) * (self.chunk_bytes + _CRC) + slots * _INDEX_ENTRY + _CRC

    def index(self, rows: int) -> bytes:
        """Exact shard index of a shard that holds `rows` rows, without its checksum."""
        slots, used = self.shard_rows // self.chunk_rows, self.chunks(rows)
        index = np.full((slots, 2), 2**64 - 1, "<u8")
        index[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(self.chunk_bytes + _CRC)
        index[:used, 1] = self.chunk_bytes + _CRC
        return index.tobytes()

    def metadata(self, rows: int) -> dict:
        """The array's `zarr.json`."""
        tail = [] if self.width is None else [self.width]
        inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        return {
            "zarr_format": 3, "node_type": "array", "attributes": {}, "shape": [rows, *tail], "data_type": self.dtype,
            "fill_value": "NaN" if self.numpy_dtype.kind not in "iu" else 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *tail]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": {
                "chunk_shape": [self.chunk_rows, *tail], "codecs": inner, "index_codecs": inner,
                "index_location": "end"}}],
        }

    def open(self, root: Path, rows: int, context: ts.Context) -> ts.TensorStore:
        """The array as if it had `rows` rows; `zarr.json` is neither read nor written."""
        return ts.open({
            "driver": "zarr3", "kvstore": {"driver": "file", "path": str(root / self.name)}, "open": True,
            "assume_metadata": True, "metadata": self.metadata(rows), "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True, "recheck_cached_data": False}, context=context).result()


def new_context(cache_bytes: int = 64 << 20) -> ts.Context:
    """Threads and cache of one store. The cache spares re-reading shard indices; chunks pass through it."""
    return ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})


def write_shard_files(root: Path, shard: int, arrays: dict[ArraySpec, np.ndarray]) -> dict[str, dict]:
    """Writes one shard of every array, each with one write, side by side, and flushes them to the disk.

    Returns {array name: {"bytes", "sha256", "crcs"}}. Raises `DiskError`; then no file of this shard is left.
    """
    files = [root / spec.shard_file(shard) for spec in arrays]
    context, pending = new_context(0), []
    try:
        with disk_errors(root):
            for file in files:
                file.unlink(missing_ok=True)
            for spec, values in arrays.items():
                start = shard * spec.shard_rows
                target = spec.open(root, start + len(values), context)[start:start + len(values)]
                pending.append(target.write(values, can_reference_source_data_indefinitely=True))
            for write in pending:
                write.result()
        return {spec.name: _written(root, spec, shard, len(values)) for spec, values in arrays.items()}
    except BaseException:
        for write in pending:
            write.exception()   # a write still under way would put its file back
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _written(root: Path, spec: ArraySpec, shard: int, rows: int) -> dict:
    path = root / spec.shard_file(shard)
    check_layout(root, spec, shard, rows)
    words = read_words(path, spec, 0, spec.chunks(rows))
    return {"bytes": spec.shard_bytes(rows), "sha256": file_sha256(path), "crcs": words.hex()}


def check_layout(root: Path, spec: ArraySpec, shard: int, rows: int) -> None:
    """Raises `StoreCorruptError` unless the shard file has exactly the size and the index that `rows` rows give."""
    path = root / spec.shard_file(shard)
    expected = spec.shard_bytes(rows)
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            if size != expected:
                raise StoreCorruptError(f"{path}: {size} bytes, the manifest says {expected}; {AGAIN}")
            index = spec.index(rows)
            f.seek(size - _CRC - len(index))
            if f.read(len(index)) != index:
                raise StoreCorruptError(f"{path}: its chunk index is altered; {AGAIN}")
    except OSError as e:
        raise StoreCorruptError(f"{path}: {_reason(e)}; {AGAIN}") from e


def read_words(path: str | Path, spec: ArraySpec, first: int, last: int) -> bytes:
    """The crc32c words beside the chunks first..last-1 of a shard file, 4 bytes each."""
    stride = spec.chunk_bytes + _CRC
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise StoreCorruptError(f"{path}: {_reason(e)}; {AGAIN}") from e
    try:
        return b"".join(os.pread(fd, _CRC, c * stride + spec.chunk_bytes) for c in range(first, last))
    finally:
        os.close(fd)


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))


@dataclass(frozen=True)
class ShardTruth:
    """What the records say of one shard of one array."""

    rows: int
    crcs: bytes


class ArrayReader:
    """Checked reads of one array. `truth(s)` gives the recorded `ShardTruth` of shard s."""

    def __init__(self, root: Path, spec: ArraySpec, rows: int, truth, context: ts.Context):
        self.spec, self.rows = spec, rows
        self._root, self._truth = root, truth
        self._store = spec.open(root, rows, context)
        self._checked: set[int] = set()
        self._known: dict[int, tuple[str, bytes]] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1. Raises `StoreCorruptError` naming the shard file; never returns an unchecked value."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.spec.name}: rows {start}:{stop} of {self.rows}")
        out = np.empty(self.spec.shape(stop - start), self.spec.numpy_dtype)
        self.start([(start, stop)], out).wait()
        return out

    def start(self, spans: Iterable[Span], out: np.ndarray) -> "PendingRead":
        """Starts reading the spans, one behind the other, into `out` (all at once, in tensorstore's threads)."""
        target, parts, at = ts.array(out), [], 0
        for shard, a, b in self._parts(spans):
            if shard not in self._checked:
                check_layout(self._root, self.spec, shard, self._truth(shard).rows)
                self._checked.add(shard)
            parts.append((shard, a, b, target[at:at + b - a].write(self._store[a:b])))
            at += b - a
        return PendingRead(self, parts)

    def _parts(self, spans: Iterable[Span]) -> Iterator[tuple[int, int, int]]:
        for start, stop in spans:
            while start < stop:
                shard = start // self.spec.shard_rows
                end = min(stop, (shard + 1) * self.spec.shard_rows)
                yield shard, start, end
                start = end

    def check_words(self, shard: int, start: int, stop: int) -> None:
        """Compares the checksum words of the chunks that hold these rows with the recorded ones."""
        path, crcs = self._words(shard)
        first = (start - shard * self.spec.shard_rows) // self.spec.chunk_rows
        last = -(-(stop - shard * self.spec.shard_rows) // self.spec.chunk_rows)
        if read_words(path, self.spec, first, last) != crcs[first * _CRC:last * _CRC]:
            raise StoreCorruptError(f"{path}: its checksums are not the ones recorded when it was written (stale "
                                    f"or swapped file); {AGAIN}")

    def _words(self, shard: int) -> tuple[str, bytes]:
        """Path and recorded checksums of a shard file, looked up once: this runs for every block of every window."""
        if shard not in self._known:
            self._known[shard] = (str(self._root / self.spec.shard_file(shard)), self._truth(shard).crcs)
        return self._known[shard]

    def failure(self, shard: int, error: ValueError) -> StoreCorruptError:
        path = self._root / self.spec.shard_file(shard)
        reason = str(error).split(" [", 1)[0].splitlines()[0]
        return StoreCorruptError(f"{path}: does not read back ({reason}); {AGAIN}")


class PendingRead:
    """Reads under way; `wait()` returns when the values are there and checked."""

    def __init__(self, reader: ArrayReader, parts: list):
        self._reader, self._parts = reader, parts

    def wait(self) -> None:
        first: StoreCorruptError | None = None
        for shard, start, stop, future in self._parts:
            try:
                future.result()
                if first is None:
                    self._reader.check_words(shard, start, stop)
            except ValueError as e:
                first = first or self._reader.failure(shard, e)
            except StoreCorruptError as e:
                first = e
        self._parts = []
        if first is not None:
            raise first

    def abandon(self) -> None:
        """Waits for the reads to let go of their buffer; their values and errors are of no interest."""
        for _, _, _, future in self._parts:
            future.exception()
        self._parts = []
