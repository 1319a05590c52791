"""One array of the activation store: a zarr3 array whose shard files have a size and an order known to the byte.

A shard file (`<array>/c/<s>/0`, or `<array>/c/<s>` for one number per row) is what zarr3's `sharding_indexed` codec
writes for one outer chunk: its inner chunks in order, each followed by its crc32c, then the index (offset and size of
every inner chunk) and the index's crc32c. There is no compression, so every offset is arithmetic. That is used twice:
the size and index of a file are checked against what they must be, and chunks are read without a look at the index. Each
is checked against the crc32c that the writer recorded, not only against the word beside it: a shard that is valid but
stale or swapped cannot pass. tensorstore writes the files; any zarr v3 reader reads them.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.base.errors import StoreCorruptError
from saejax.base.storage import disk_errors, file_sha256, plain_path

_CRC = 4
_INDEX_ENTRY = 16
_SIDE_CHUNK_ROWS = 2048
_PART_CHUNKS = 256  # of one system call: two buffers each, of which the kernel takes 1024
_TASK_BYTES = 1 << 20
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int32": np.dtype(np.int32), "uint8": np.dtype(np.uint8),
           "float32": np.dtype(np.float32)}
Span = tuple[int, int]
# The fix of every damaged store: a harvest opens one that has its manifest, and would fail in the same place.
AGAIN = "delete this store and run `saejax harvest` again"


def chunk_rows_of(shard_rows: int) -> int:
    """Rows of a checksummed chunk of activations: the largest divisor of a shard's rows that is at most 256."""
    return max(n for n in range(1, min(256, shard_rows) + 1) if shard_rows % n == 0)


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


def write_shard_files(root: Path, shard: int, arrays: dict[ArraySpec, np.ndarray]) -> dict[str, dict]:
    """Writes one shard of every array, each with one write, side by side, and flushes them to the disk.

    Returns {array name: {"bytes", "sha256", "crcs"}}. Raises `DiskError`; then no file of this shard is left.
    """
    files = [root / spec.shard_file(shard) for spec in arrays]
    context, pending = ts.Context(), []
    try:
        with disk_errors(root), plain_path(root) as place:
            for file in files:
                file.unlink(missing_ok=True)
            for spec, values in arrays.items():
                start = shard * spec.shard_rows
                target = spec.open(place, start + len(values), context)[start:start + len(values)]
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
    return {"bytes": spec.shard_bytes(rows), "sha256": file_sha256(path), "crcs": _words(path, spec, rows).hex()}


def _words(path: Path, spec: ArraySpec, rows: int) -> bytes:
    """The crc32c words beside the chunks of a shard file, 4 bytes each."""
    stride = spec.chunk_bytes + _CRC
    with open(path, "rb") as f:
        return b"".join(os.pread(f.fileno(), _CRC, c * stride + spec.chunk_bytes) for c in range(spec.chunks(rows)))


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


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))


@dataclass(frozen=True)
class ShardTruth:
    """What the records say of one shard of one array."""

    rows: int
    crcs: bytes


class ArrayReader:
    """Checked reads of one array, in the threads of `pool`. `truth(s)` gives the recorded `ShardTruth` of shard s.

    Offsets are arithmetic, so the bytes of the chunks go from the file straight into the caller's array, where their crc32c is
    computed: one copy and a third of the processor time that a general zarr reader takes.
    """

    def __init__(self, root: Path, spec: ArraySpec, rows: int, truth: Callable[[int], ShardTruth], pool: ThreadPoolExecutor):
        self.spec, self.rows = spec, rows
        self._root, self._truth, self._pool = root, truth, pool
        self._known: dict[int, tuple[str, np.ndarray]] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1. Raises `StoreCorruptError` naming the shard file; never returns an unchecked value."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.spec.name}: rows {start}:{stop} of {self.rows}")
        out = np.empty(self.spec.shape(stop - start), self.spec.numpy_dtype)
        self.read_into([(start, stop)], out)
        return out

    def read_into(self, spans: Iterable[Span], out: np.ndarray) -> None:
        """Reads the spans side by side into `out` (C-contiguous), one behind the other. Raises when no read is under way."""
        flat, at, first = out.reshape(len(out), self.spec.width or 1).view(np.uint8), 0, 0
        parts, reads = [], []
        try:
            for shard, a, b in self._parts(spans):
                parts.append((self._shard(shard), a, b, flat[at:at + b - a]))
                at += b - a
                if (at - first) * flat.shape[1] >= _TASK_BYTES:
                    reads.append(self._pool.submit(self._read_parts, parts))
                    parts, first = [], at
            self._read_parts(parts)
        finally:
            wait(reads)
        for read in reads:
            read.result()

    def scatter(self, spans: Iterable[Span], slot_R: np.ndarray, out: np.ndarray) -> None:
        """Reads the R rows of the spans; row r goes to `out[slot_R[r]]`, nowhere where that is -1. A part is read, checked and
        placed while it is in the cache of a thread. Raises when no read is under way.
        """
        at, reads = 0, []
        chunks = max(1, _TASK_BYTES // self.spec.chunk_bytes)
        parts = list(self._parts(spans, chunks))
        try:
            for n, (shard, a, b) in enumerate(parts):
                task = (self._shard(shard), a, b, slot_R[at:at + b - a], out)
                at += b - a
                if n + 1 < len(parts):
                    reads.append(self._pool.submit(self._place_part, *task))
                else:
                    self._place_part(*task)
        finally:
            wait(reads)
        for read in reads:
            read.result()

    def _place_part(self, shard: tuple[str, np.ndarray], start: int, stop: int, slot_R: np.ndarray, out: np.ndarray) -> None:
        wanted = np.flatnonzero(slot_R >= 0)
        if len(wanted):
            rows = np.empty((stop - start, out.shape[1]), out.dtype)
            self._read_part(*shard, start, stop, rows.view(np.uint8))
            out[slot_R[wanted]] = rows if len(wanted) == len(rows) else rows[wanted]

    def _parts(self, spans: Iterable[Span], chunks: int = _PART_CHUNKS) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, last row + 1), rows counted from the start of the shard; at most so many chunks each."""
        step = chunks * self.spec.chunk_rows
        for start, stop in spans:
            while start < stop:
                shard, a = divmod(start, self.spec.shard_rows)
                b = min(stop - start + a, self.spec.shard_rows, (a // step + 1) * step)
                yield shard, a, b
                start += b - a

    def _read_parts(self, parts: list) -> None:
        for (path, crcs), start, stop, out in parts:
            self._read_part(path, crcs, start, stop, out)

    def _shard(self, shard: int) -> tuple[str, np.ndarray]:
        """Path and recorded checksum words of a shard file whose size and index are right; looked up once."""
        if shard not in self._known:
            truth = self._truth(shard)
            check_layout(self._root, self.spec, shard, truth.rows)
            self._known[shard] = (str(self._root / self.spec.shard_file(shard)), np.frombuffer(truth.crcs, "<u4"))
        return self._known[shard]

    def _read_part(self, path: str, crcs: np.ndarray, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop-1 of a shard, as bytes [rows, row bytes], into `out`."""
        size = self.spec.chunk_rows
        first, last = start // size, -(-stop // size)
        whole = start == first * size and stop == last * size
        target = out if whole else np.empty(((last - first) * size, out.shape[1]), np.uint8)
        chunks = target.reshape(last - first, self.spec.chunk_bytes)
        words = np.empty(last - first, "<u4")
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                buffers = [part for i in range(last - first) for part in (chunks[i], words[i:i + 1])]
                stride = self.spec.chunk_bytes + _CRC
                if os.preadv(fd, buffers, first * stride) != (last - first) * stride:
                    raise StoreCorruptError(f"{path}: ends in the middle of a chunk; {AGAIN}")
            finally:
                os.close(fd)
        except OSError as e:
            raise StoreCorruptError(f"{path}: {_reason(e)}; {AGAIN}") from e
        if not np.array_equal(words, crcs[first:last]):
            raise StoreCorruptError(f"{path}: its checksums are not the ones recorded when it was written (stale "
                                    f"or swapped file); {AGAIN}")
        for i, chunk in enumerate(chunks, first):
            if google_crc32c.value(chunk) != crcs[i]:
                raise StoreCorruptError(f"{path}: does not read back (rows from {i * size} of this shard do not match their "
                                        f"checksum); {AGAIN}")
        if not whole:
            out[:] = target[start - first * size:stop - first * size]
