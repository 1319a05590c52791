"""One array of the activation store: a zarr3 array whose shard files have a size and an order known to the byte.

A shard file (`<array>/c/<s>/0`, or `<array>/c/<s>` for one number per row) is what zarr3's `sharding_indexed` codec
writes for one outer chunk: its inner chunks in order, each followed by its crc32c, then the index (offset and size of
every inner chunk) and the index's crc32c. There is no compression, so every offset is arithmetic. That is used twice:
the size and index of a file are checked against what they must be, and chunks are read without a look at the index. Each
is checked against the crc32c that the writer recorded, not only against the word beside it: a shard that is valid but
stale or swapped cannot pass. `saejax.data.shard_writer` writes the files; any zarr v3 reader reads them.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.base.errors import StoreCorruptError

CRC = 4  # bytes of a checksum
_INDEX_ENTRY = 16
_SIDE_CHUNK_ROWS = 2048
_PART_CHUNKS = 256  # of one read: two buffers each
_MOST_BUFFERS = 1024  # of one system call
_KNOWN_SHARDS = 1 << 14  # whose checksums an array keeps in memory
_TASK_BYTES = 1 << 20
_ALONE_BYTES = 8 << 20  # of a read for which it is not worth while to wake other threads
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "int32": np.dtype(np.int32)}
Span = tuple[int, int]
AGAIN = "mend the store with `saejax harvest` and its option repair, or make it again"


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
    def slots(self) -> int:
        """Chunks of a full shard."""
        return self.shard_rows // self.chunk_rows

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
        return self.chunks(rows) * self.stride + self.slots * _INDEX_ENTRY + CRC

    @property
    def stride(self) -> int:
        """Bytes from one chunk of a shard file to the next."""
        return self.chunk_bytes + CRC

    def index(self, rows: int) -> bytes:
        """Exact end of the file of a shard that holds `rows` rows: its chunk index and the index's checksum."""
        used = self.chunks(rows)
        index = np.full((self.slots, 2), 2**64 - 1, "<u8")
        index[:used, 0] = np.arange(used, dtype=np.uint64) * np.uint64(self.stride)
        index[:used, 1] = self.stride
        return index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(CRC, "little")

    @property
    def fill_value(self) -> float | int:
        """What the last chunk of a shard is filled up with."""
        return np.nan if self.numpy_dtype.kind not in "iu" else 0

    def metadata(self, rows: int) -> dict:
        """The array's `zarr.json`."""
        tail = [] if self.width is None else [self.width]
        inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        return {
            "zarr_format": 3, "node_type": "array", "attributes": {}, "shape": [rows, *tail], "data_type": self.dtype,
            "fill_value": 0 if self.fill_value == 0 else "NaN",
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


def check_layout(root: Path, spec: ArraySpec, shard: int, rows: int) -> None:
    """Raises `StoreCorruptError` unless the shard file has exactly the size and the index that `rows` rows give."""
    path = root / spec.shard_file(shard)
    expected = spec.shard_bytes(rows)
    try:
        with open(path, "rb", buffering=0) as f:
            size = os.fstat(f.fileno()).st_size
            if size != expected:
                raise StoreCorruptError(f"{path}: {size} bytes, the manifest says {expected}; {AGAIN}")
            index = spec.index(rows)
            if read_fully(f.fileno(), [found := bytearray(len(index))], size - len(index)) < len(index) or found != index:
                raise StoreCorruptError(f"{path}: its chunk index is altered; {AGAIN}")
    except OSError as e:
        raise StoreCorruptError(f"{path}: {_reason(e)}; {AGAIN}") from e


def read_fully(fd: int, buffers: Sequence, offset: int) -> int:
    """Fills the buffers from a place of a file, one behind the other. Returns the bytes read: fewer only where the file ends.

    A system call may give less than it was asked for: never more than 2 GB, on network file systems anything.
    """
    views, done = [memoryview(buffer).cast("B") for buffer in buffers], 0
    while views:
        got = os.preadv(fd, views[:_MOST_BUFFERS], offset + done)
        if got == 0:
            break
        done += got
        views = _rest(views, got)
    return done


def write_fully(fd: int, buffers: Sequence, offset: int) -> None:
    """Writes the buffers to a place of a file, one behind the other."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    while views:
        put = os.pwritev(fd, views[:_MOST_BUFFERS], offset)
        offset += put
        views = _rest(views, put)


def _rest(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers behind their first `done` bytes."""
    first = 0
    while first < len(views) and done >= len(views[first]):
        done -= len(views[first])
        first += 1
    return [views[first][done:], *views[first + 1:]] if done else views[first:]


def _reason(error: OSError) -> str:
    return "missing" if isinstance(error, FileNotFoundError) else (error.strerror or str(error))


@dataclass(frozen=True)
class ShardTruth:
    """What is recorded of one shard of one array: its rows, and the checksum of every chunk (uint32)."""

    rows: int
    crcs: np.ndarray


class ArrayReader:
    """Checked reads of one array, in the threads of `pool`. `truth(s)` gives the recorded `ShardTruth` of shard s.

    Offsets are arithmetic, so the bytes of the chunks go from the file straight into the caller's array, where their crc32c is
    computed: one copy and a third of the processor time that a general zarr reader takes.
    """

    def __init__(self, root: Path, spec: ArraySpec, rows: int, truth: Callable[[int], ShardTruth], pool: ThreadPoolExecutor):
        self.spec, self.rows = spec, rows
        self._root, self._truth, self._pool = root, truth, pool
        self._shard = functools.lru_cache(_KNOWN_SHARDS)(self._look_up)

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
        """Reads the R rows of the spans; row r goes to `out[slot_R[r]]`, those with -1 to the last one. A part is read, checked
        and placed while it is in the cache of a thread; a few parts in the calling one. Raises when no read is under way.
        """
        at, reads = 0, []
        chunks = max(1, _TASK_BYTES // self.spec.chunk_bytes)
        alone = len(slot_R) * self.spec.chunk_bytes // self.spec.chunk_rows <= _ALONE_BYTES
        try:
            for shard, a, b in self._parts(spans, chunks):
                task = (self._shard(shard), a, b, slot_R[at:at + b - a], out)
                at += b - a
                if alone:
                    self._place_part(*task)
                else:
                    reads.append(self._pool.submit(self._place_part, *task))
        finally:
            wait(reads)
        for read in reads:
            read.result()

    def announce(self, spans: Iterable[Span]) -> None:
        """Says that these rows are read soon: a system that can do so fetches them meanwhile."""
        for shard, a, b in self._parts(spans, 1 << 30) if hasattr(os, "posix_fadvise") else ():
            first = a // self.spec.chunk_rows * self.spec.stride
            last = -(-b // self.spec.chunk_rows) * self.spec.stride
            with contextlib.suppress(OSError):  # reading them says what is wrong
                fd = os.open(self._root / self.spec.shard_file(shard), os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(fd)

    def _place_part(self, shard: tuple[str, np.ndarray], start: int, stop: int, slot_R: np.ndarray, out: np.ndarray) -> None:
        if (slot_R >= 0).any():
            rows = np.empty((stop - start, out.shape[1]), out.dtype)
            self._read_part(*shard, start, stop, rows.view(np.uint8))
            out[slot_R] = rows

    def _parts(self, spans: Iterable[Span], chunks: int = _PART_CHUNKS) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, last row + 1), rows counted from the start of the shard; at most so many chunks each."""
        step = chunks * self.spec.chunk_rows
        for start, stop in spans:
            while start < stop:
                shard, a = divmod(start, self.spec.shard_rows)
                b = min(stop - start + a, self.spec.shard_rows, a - a % self.spec.chunk_rows + step)
                yield shard, a, b
                start += b - a

    def _read_parts(self, parts: list) -> None:
        for (path, crcs), start, stop, out in parts:
            self._read_part(path, crcs, start, stop, out)

    def check_shard(self, shard: int) -> None:
        """Reads all of a shard, in the calling thread. Raises `StoreCorruptError` unless every byte of it is right."""
        path, crcs = self._look_up(shard)
        rows = max(1, _TASK_BYTES // self.spec.chunk_bytes) * self.spec.chunk_rows
        total = len(crcs) * self.spec.chunk_rows  # what fills the last chunk up, too
        out = np.empty((min(rows, total), self.spec.chunk_bytes // self.spec.chunk_rows), np.uint8)
        for a in range(0, total, rows):
            b = min(a + rows, total)
            self._read_part(path, crcs, a, b, out[:b - a])

    def _look_up(self, shard: int) -> tuple[str, np.ndarray]:
        """Path and recorded checksum words of a shard file whose size and index are right."""
        truth = self._truth(shard)
        check_layout(self._root, self.spec, shard, truth.rows)
        return str(self._root / self.spec.shard_file(shard)), truth.crcs

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
                if read_fully(fd, buffers, first * self.spec.stride) != (last - first) * self.spec.stride:
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
