"""Store -> batches in a deterministic shuffled order: every kept row exactly once per epoch, state of three integers.

Epoch e permutes the blocks of the store (a block is `block_contexts` whole contexts, read sequentially) with key
(seed, e). Consecutive blocks of that order fill a window of at most `window_rows` rows; the kept rows of window w are
permuted with key (seed, e, w) and handed out. The order depends on the seed, the epoch, the store and `StreamOptions`
only: not on the batch size, the number of processes, the prefetching or any timing. `ORDER_VERSION` names the order;
changing it breaks resuming.

While one window is handed out, the store's threads read the next one into the other of two buffers.
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from saejax.base.errors import NonFiniteError, StoreError
from saejax.base.records import ActivationBatch, StreamState
from saejax.config import StreamOptions
from saejax.data.permutation import Permutation, derive_key
from saejax.data.statistics import non_finite_message
from saejax.data.store import Store

ORDER_VERSION = 1
_BLOCK_ORDER, _ROW_ORDER = 1, 2
_QUEUE_BYTES = 64 << 20
_PIECE_BYTES = 2 << 20
_EXPONENT = 0x7F80  # bits of +Inf


@dataclass
class _Window:
    """A window that was read: `rows[i]` is the store row whose values land in slot i of the buffers, one `x` per hookpoint."""

    order: np.ndarray
    rows: np.ndarray
    x: list[np.ndarray]
    tokens: np.ndarray


class RowOrder:
    """Which rows come when: the arithmetic of the stream, without any reading of activations."""

    def __init__(self, store: Store, hookpoints: Sequence[str], options: StreamOptions):
        self.block_rows = options.block_contexts * store.context
        self.rows = store.rows
        self.n_blocks = -(-store.rows // self.block_rows)
        self.window_blocks = min(self.n_blocks, max(1, options.window_rows // self.block_rows))
        self.n_windows = -(-self.n_blocks // self.window_blocks)
        self._bits, self._kept = self._masks(store, hookpoints, options)
        self.rows_per_epoch = int(self._kept.sum())
        if self.rows_per_epoch == 0:
            raise StoreError(f"{store.path}: every row of {', '.join(hookpoints)} is masked; nothing to stream")

    def _masks(self, store: Store, hookpoints: Sequence[str], options: StreamOptions) -> tuple[np.ndarray, np.ndarray]:
        """One bit per row (1: handed out), and kept rows per block. Reads `keep` and, for outliers, `norms` once."""
        step = self.block_rows * max(1, (1 << 20) // self.block_rows) * 8
        bits, kept = [], []
        for a in range(0, store.rows, step):
            b = min(a + step, store.rows)
            mask = store.keep(a, b)
            for hookpoint in hookpoints if options.mask_outliers else ():
                mask &= store.norms(hookpoint, a, b) <= store.outlier_bound(hookpoint)
            bits.append(np.packbits(mask))
            kept.append(np.add.reduceat(mask, np.arange(0, b - a, self.block_rows), dtype=np.int64))
        return np.concatenate(bits), np.concatenate(kept)

    def window(self, seed: int, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks in reading order, order of hand-out as slots of the rows read)."""
        first, last = window * self.window_blocks, min((window + 1) * self.window_blocks, self.n_blocks)
        blocks = Permutation(self.n_blocks, derive_key(seed, epoch, _BLOCK_ORDER))(np.arange(first, last))
        mask = np.concatenate([self._mask(*self.span(b)) for b in blocks])
        kept = np.flatnonzero(mask)
        return blocks, kept[Permutation(len(kept), derive_key(seed, epoch, _ROW_ORDER, window)).all()]

    def span(self, block: int) -> tuple[int, int]:
        """Store rows start..stop-1 of a block."""
        return int(block) * self.block_rows, min((int(block) + 1) * self.block_rows, self.rows)

    def find(self, seed: int, epoch: int, position: int) -> tuple[int, int]:
        """(window, rows of it already handed out) at `position` kept rows of the epoch."""
        kept = self._kept[Permutation(self.n_blocks, derive_key(seed, epoch, _BLOCK_ORDER)).all()]
        ends = np.cumsum(np.add.reduceat(kept, np.arange(0, self.n_blocks, self.window_blocks)))
        window = int(np.searchsorted(ends, position, side="right"))
        return window, position - (int(ends[window - 1]) if window else 0)

    def _mask(self, start: int, stop: int) -> np.ndarray:
        first = start // 8
        bits = np.unpackbits(self._bits[first:-(-stop // 8)])
        return bits[start - first * 8:stop - first * 8].view(bool)


class _Recycled:
    """Arrays [rows, width] of uint16 whose memory is used again once nothing refers to it: on fresh memory the
    kernel's page faults cost more than gathering the rows.

    Every view of an array keeps it alive, because its base is not an array and numpy stops there when it collapses
    the chain of bases; so the finaliser runs when the last view is gone, including those that jax holds.
    """

    def __init__(self, width: int, most: int):
        self._width, self._most = width, most
        self._free: dict[int, list[np.ndarray]] = {}

    def array(self, rows: int) -> np.ndarray:
        free = self._free.setdefault(rows, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(rows * self._width, np.uint16)
        array = np.frombuffer(memory.data, np.uint16)
        weakref.finalize(array, self._release, free, memory).atexit = False
        return array.reshape(rows, self._width)

    def _release(self, free: list[np.ndarray], memory: np.ndarray) -> None:
        if len(free) < self._most:
            free.append(memory)


class Stream:
    """Iterator of `ActivationBatch` with exactly `batch` rows, without end; also a context manager (`close()` joins).

    A row holds the activations of one token at all `hookpoints`, side by side. A batch that crosses the end of an epoch takes the
    rest of it and then the first rows of the next. `state` is the place behind the last batch handed out; a stream made with it
    continues with the identical batches at once, without reading what was skipped. Every process builds the same global batch and
    takes its slice of it, so the order cannot depend on how many processes there are. A second stream over the same store
    (another seed) is independent of the first.

    Raises `StoreCorruptError`, `NonFiniteError` (count and place of the rows) from `next()`, `StoreError` at once.
    """

    def __init__(self, store: Store, hookpoints: Sequence[str], batch: int, options: StreamOptions, state: StreamState):
        self.store, self.hookpoints, self.batch = store, tuple(hookpoints), batch
        self.widths = [store.width(hookpoint) for hookpoint in self.hookpoints]
        self.order = RowOrder(store, self.hookpoints, options)
        if batch < 1 or not 0 <= state.position <= self.order.rows_per_epoch or min(state.seed, state.epoch) < 0:
            raise StoreError(f"{store.path}: no stream of {batch} rows at {state}: an epoch has "
                             f"{self.order.rows_per_epoch} "
                             "rows (config.train.batch, or a state of another store)")
        self.state = self._normal(state)
        self.wait_seconds = 0.0
        rows = self.order.window_blocks * self.order.block_rows
        self._buffers = [([np.empty((rows, width), ml_dtypes.bfloat16) for width in self.widths], np.empty(rows, np.int32))
                         for _ in range(2)]
        batch_bytes = batch * sum(self.widths) * 2
        self._queue: queue.Queue = queue.Queue(maxsize=max(2, min(16, _QUEUE_BYTES // batch_bytes)))
        self._memory = _Recycled(sum(self.widths), self._queue.maxsize + 2)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(self.state,), name="saejax-stream", daemon=True)
        self._thread.start()

    @property
    def rows_per_epoch(self) -> int:
        """Kept rows of the store: the length of an epoch."""
        return self.order.rows_per_epoch

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> ActivationBatch:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        batch, self.state = item
        return batch

    def close(self) -> None:
        """Stops the prefetch thread and waits for it. The stream is at its end afterwards."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _normal(self, s: StreamState) -> StreamState:
        """The end of an epoch is the start of the next."""
        return StreamState(s.seed, s.epoch + 1, 0) if s.position == self.order.rows_per_epoch else s

    def _run(self, state: StreamState) -> None:
        try:
            for item in self._batches(state):
                if not self._put(item):
                    return
        except BaseException as e:
            self._put(e)

    def _put(self, item) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self, state: StreamState) -> Iterator[tuple[ActivationBatch, StreamState]]:
        """Batches and the state behind each; a batch is gathered from as many windows as it crosses."""
        x, tokens, rows, have = self._blank()
        for epoch, window, position in self._windows(state):
            while position < len(window.order):
                slots = window.order[position:position + self.batch - have]
                part = slice(have, have + len(slots))
                self._gather(window, slots, x[part])
                tokens[part], rows[part] = window.tokens[slots], window.rows[slots]
                have, position = have + len(slots), position + len(slots)
                state = StreamState(state.seed, epoch, (state.position if epoch == state.epoch else 0) + len(slots))
                if have == self.batch:
                    contexts, positions = np.divmod(rows, self.store.context)
                    yield (ActivationBatch(x.view(ml_dtypes.bfloat16), tokens, contexts, positions.astype(np.int32)),
                           self._normal(state))
                    x, tokens, rows, have = self._blank()

    def _blank(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        return self._memory.array(self.batch), np.empty(self.batch, np.int32), np.empty(self.batch, np.int64), 0

    def _windows(self, state: StreamState) -> Iterator[tuple[int, _Window, int]]:
        """(epoch, window with its values read and checked, rows of it handed out before), reading one window ahead."""
        buffer, epoch = 0, state.epoch
        number, done = self.order.find(state.seed, epoch, state.position)
        with ThreadPoolExecutor(1, "saejax-window") as reader:
            ahead = reader.submit(self._read, state.seed, epoch, number, buffer)
            while True:
                current, current_epoch, skip = ahead.result(), epoch, done
                number, done, buffer = number + 1, 0, 1 - buffer
                if number == self.order.n_windows:
                    number, epoch = 0, epoch + 1
                ahead = reader.submit(self._read, state.seed, epoch, number, buffer)
                yield current_epoch, current, skip

    def _read(self, seed: int, epoch: int, number: int, buffer: int) -> _Window:
        blocks, order = self.order.window(seed, epoch, number)
        spans = [self.order.span(b) for b in blocks]
        rows = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])
        x, tokens = [values[:len(rows)] for values in self._buffers[buffer][0]], self._buffers[buffer][1][:len(rows)]
        for hookpoint, values in zip(self.hookpoints, x, strict=True):
            self.store.read_into(f"acts/{hookpoint}", spans, values)
        self.store.read_into("tokens", spans, tokens)
        return _Window(order, rows, x, tokens)

    def _gather(self, window: _Window, slots: np.ndarray, out: np.ndarray) -> None:
        """The rows in these slots, their hookpoints side by side; each piece is checked while it is still in the cache."""
        rows = max(1, _PIECE_BYTES // out[:1].nbytes)
        for a in range(0, len(slots), rows):
            piece, column = out[a:a + rows], 0
            for values, width in zip(window.x, self.widths, strict=True):
                columns = piece[:, column:column + width]
                np.take(values.view(np.uint16), slots[a:a + rows], axis=0, out=columns, mode="clip")
                column += width
            # Of bfloat16 bits, NaN and +Inf are the largest as int16, NaN and -Inf the largest as uint16.
            if piece.view(np.int16).max() >= _EXPONENT or piece.max() >= _EXPONENT + 0x8000:
                self._refuse(window)

    def _refuse(self, window: _Window) -> None:
        """Raises `NonFiniteError` with the number and the place of the window's rows that are not finite."""
        for hookpoint, values in zip(self.hookpoints, window.x, strict=True):
            bad = window.order[((values.view(np.uint16)[window.order] & _EXPONENT) == _EXPONENT).any(axis=1)]
            if bad.size:
                places = [divmod(int(row), self.store.context) for row in np.sort(window.rows[bad])[:5]]
                raise NonFiniteError(f"{self.store.path}: " + non_finite_message(hookpoint, bad.size, len(window.order), places))
