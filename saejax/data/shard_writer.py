"""Writing the files of one shard: statistics, checksums and bytes come out of one pass over the activations.

The rows of a hookpoint are cut into pieces whose size follows from the spec. The threads of a pool take one piece after
another: its statistics, its chunks' checksums and its write, while it is in the cache. Sums of pieces are added in their
order, so that nothing depends on the number of threads.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from saejax.base.errors import DiskError
from saejax.base.storage import disk_errors
from saejax.base.threads import processors
from saejax.data.manifest import TOKENS
from saejax.data.shards import ArraySpec, write_fully
from saejax.data.statistics import ShardSums, check_finite, norm_bins, norms_of, row_statistics

_PIECE_ROWS = 256
_PIECE_BYTES = 1 << 20
_MOST_THREADS = 16


class ShardFile:
    """A shard file under way. Its chunks may be written in any order and by any thread; `finish` or `abandon` ends it.

    Every method raises `DiskError`.
    """

    def __init__(self, root: Path, spec: ArraySpec, shard: int, rows: int):
        self.path, self.crcs = root / spec.shard_file(shard), np.zeros(spec.slots, "<u4")
        self._spec, self._rows = spec, rows
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, first_chunk: int, values: np.ndarray) -> None:
        """Chunks from `first_chunk` on; what is missing of a last one is filled up."""
        spec, buffers = self._spec, []
        for chunk, a in enumerate(range(0, len(values), spec.chunk_rows), first_chunk):
            part = values[a:a + spec.chunk_rows]
            if len(part) < spec.chunk_rows:
                whole = np.full(spec.shape(spec.chunk_rows), spec.fill_value, spec.numpy_dtype)
                whole[:len(part)] = part
                part = whole
            data = part.reshape(-1).view(np.uint8)
            self.crcs[chunk] = google_crc32c.value(data)
            buffers += [data, self.crcs[chunk:chunk + 1]]
        with disk_errors(self.path):
            write_fully(self._fd, buffers, first_chunk * spec.stride)

    def finish(self) -> None:
        """Writes the index behind the chunks, looks at the size, and flushes the file to the disk."""
        end = self._spec.index(self._rows)
        size = self._spec.shard_bytes(self._rows)
        with disk_errors(self.path):
            write_fully(self._fd, [end], size - len(end))
            found = os.fstat(self._fd).st_size
            if found != size:
                raise DiskError(f"{self.path}: {found} bytes of {size} were written; free space or choose another directory")
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)

    def abandon(self) -> None:
        """Removes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)


def write_shard_files(root: Path, shard: int, arrays: dict[str, ArraySpec], acts: dict[str, np.ndarray],
                      tokens_N: np.ndarray, keep_N: np.ndarray, *, context: int,
                      threads: int | None = None) -> tuple[dict[str, np.ndarray], dict[str, ShardSums]]:
    """Writes all arrays of a shard, flushed to the disk. Returns the checksums of every array and the sums of every hookpoint.

    acts: {hookpoint: bfloat16 [N, D]}. Raises `DiskError` and `NonFiniteError`; then no file of this shard is left.
    """
    rows, files, sums = len(tokens_N), {}, {}
    pool = ThreadPoolExecutor(threads or processors(_MOST_THREADS), "saejax-write")
    flushing = ThreadPoolExecutor(min(_MOST_THREADS, len(arrays)), "saejax-flush")
    try:
        for name, spec in arrays.items():
            files[name] = ShardFile(root, spec, shard, rows)
        pieces = {name: list(_submit(pool, files[f"acts/{name}"], arrays[f"acts/{name}"], x, keep_N))
                  for name, x in acts.items()}
        flushed = [flushing.submit(_write_whole, files[TOKENS], np.where(keep_N, tokens_N, ~tokens_N))]
        for name, x in acts.items():
            norms_N, sums[name] = _collect(pieces.pop(name), x.shape[1], keep_N)
            check_finite(x, norms_N, name, shard * arrays[TOKENS].shard_rows // context, context)
            flushed.append(flushing.submit(files[f"acts/{name}"].finish))
        for each in flushed:
            each.result()
    except BaseException:
        for each in (pool, flushing):
            each.shutdown(cancel_futures=True)  # a write still under way would come after the file is removed
        for file in files.values():
            file.abandon()
        raise
    finally:
        pool.shutdown()
        flushing.shutdown()
    return {name: file.crcs for name, file in files.items()}, sums


def piece_rows(spec: ArraySpec) -> int:
    """Rows of a piece: whole chunks, about a megabyte."""
    return spec.chunk_rows * max(-(-_PIECE_ROWS // spec.chunk_rows), _PIECE_BYTES // spec.chunk_bytes)


def _submit(pool: ThreadPoolExecutor, file: ShardFile, spec: ArraySpec, x_ND: np.ndarray,
            keep_N: np.ndarray) -> Iterator[Future]:
    step = piece_rows(spec)
    for a in range(0, len(x_ND), step):
        yield pool.submit(_piece, file, a // spec.chunk_rows, x_ND[a:a + step], keep_N[a:a + step])


def _piece(file: ShardFile, first_chunk: int, x_ND: np.ndarray, keep_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = row_statistics(x_ND, keep_N)
    file.write(first_chunk, x_ND)
    return found


def _collect(pieces: list[Future], width: int, keep_N: np.ndarray) -> tuple[np.ndarray, ShardSums]:
    """Norms and sums of a hookpoint, of its pieces in their order."""
    total, squares = np.zeros(width, np.float64), []
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            squares_N, x_D = piece.result()
            squares.append(squares_N)
            total += x_D
        squares_N = np.concatenate(squares)
        norms_N = norms_of(squares_N)
        return norms_N, ShardSums(total, float(norms_N[keep_N].sum()), float(squares_N[keep_N].sum()),
                                  norm_bins(norms_N[np.isfinite(norms_N) & keep_N]))


def _write_whole(file: ShardFile, values: np.ndarray) -> None:
    file.write(0, values)
    file.finish()


def crc_row(arrays: dict[str, ArraySpec], crcs: dict[str, np.ndarray]) -> bytes:
    """The checksums of a shard as `crcs.bin` and its record hold them."""
    return np.concatenate([crcs[name] for name in arrays]).tobytes()
