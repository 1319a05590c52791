"""Store -> batches in the deterministic order of `data.order`: every kept row once per epoch of its lane.

The lanes of a stream fill one ring of batches. A thread reads a lane's next window as soon as the ring has room for it: chunk by
chunk, each row goes from the chunk that was read straight to the slot of its turn, so that a batch is a view of the ring. Two
windows of every lane are held, one that is handed out and one that is read ahead.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from saejax.base.errors import StoreError
from saejax.base.records import StreamState
from saejax.base.threads import processors
from saejax.config import StreamOptions
from saejax.data.order import Place, RowOrder
from saejax.data.shards import Span
from saejax.data.statistics import row_norms
from saejax.data.store import Store

_MOST_THREADS = 8  # that read windows; more than processors only wait for each other


@dataclass
class _Window:
    """Rows `begin` to `end` of a lane, counted from the start of the stream; the first is the window's row `first`."""

    begin: int
    end: int
    epoch: int
    number: int
    first: int


class _Lane:
    """One lane: what was read of it (`filled` rows from the start of the stream), and what was handed out (`place`)."""

    def __init__(self, number: int, slot: int | None, place: Place):
        self.number, self.slot, self.place = number, slot, place
        self.ahead = place          # what is read next
        self.filled = self.empty = 0
        self.windows: deque[_Window] = deque()
        self.reading = False


class Stream:
    """Iterator over batches, bfloat16 [rows, W], without end; also a context manager (`close()` waits for its threads).

    A row holds the activations of one token at all `hookpoints`, side by side. A batch has exactly `batch` rows in all; this
    process gets those of the `lanes` given (all of them by default), one behind the other, batch / L of each. `state` is the
    place behind the last batch handed out; a stream made with it continues with the identical batches at once, without reading
    what was skipped. An array is valid until the next one is asked for: its memory is used again.

    Raises `StoreError` at once (a batch that the lanes do not divide, a state of another store), `StoreCorruptError` from `next`.
    """

    def __init__(self, store: Store, hookpoints: Sequence[str], batch: int, options: StreamOptions, state: StreamState | int,
                 lanes: Sequence[int] | None = None):
        """state: where to go on, or the seed of a new stream."""
        self.store, self.hookpoints, self.batch, self._options = store, tuple(hookpoints), batch, options
        self.widths = [store.width(hookpoint) for hookpoint in self.hookpoints]
        self.order = order_of(store, options, batch, state)
        start = self.order.start(state) if isinstance(state, int) else state
        self.seed, self.lane_rows = start.seed, batch // self.order.lanes
        self.lanes = tuple(range(self.order.lanes) if lanes is None else lanes)
        slots = {lane: slot for slot, lane in enumerate(self.lanes)}
        self._lanes = [_Lane(n, slots.get(n), place) for n, place in enumerate(start.lanes)]
        self.wait_seconds, self._handed, self._done = 0.0, 0, 0  # batches handed out, and those that are done with
        self._end = self._behind = 0  # of the batch that is asked for: its last row of every lane, lanes that have not got there
        self._depth = self.order.batches_held(self.lane_rows)
        slots_in_all, width = self._depth * len(self.lanes) * self.lane_rows, sum(self.widths)
        self._rows = np.empty((slots_in_all + 1, width), np.uint16)  # the last takes what is not handed out
        self._ring = self._rows[:-1].reshape(self._depth, len(self.lanes) * self.lane_rows, width)
        self._changed, self._stop = threading.Condition(), False
        self._failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(processors(_MOST_THREADS), "saejax-window")
        with self._changed:
            for lane in self._lanes:
                self._read_ahead(lane)

    @property
    def state(self) -> StreamState:
        """The place behind the last batch handed out."""
        return StreamState(self.seed, tuple(lane.place for lane in self._lanes))

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> np.ndarray:
        end, began = (self._handed + 1) * self.lane_rows, time.perf_counter()
        with self._changed:
            self._done, self._end = self._handed, end
            self._behind = sum(lane.filled < end for lane in self._lanes)
            for lane in self._lanes:
                self._read_ahead(lane)
            self._changed.wait_for(lambda: self._stop or self._failure or not self._behind)
            if self._failure is not None:
                raise self._failure
            if self._stop:
                raise StopIteration
            for lane in self._lanes:
                self._hand_out(lane, end)
        self.wait_seconds += time.perf_counter() - began
        batch = self._ring[self._handed % self._depth].view(ml_dtypes.bfloat16)
        self._handed += 1
        return batch

    def close(self) -> None:
        """Ends the stream and waits for its threads."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _hand_out(self, lane: _Lane, end: int) -> None:
        while lane.windows and lane.windows[0].end <= end:
            done = lane.windows.popleft()
            lane.place = self.order.following(lane.number, done.epoch, done.number)
        if lane.windows and lane.windows[0].begin < end:
            now = lane.windows[0]
            lane.place = (now.epoch, now.number, now.first + end - now.begin)

    def _read_ahead(self, lane: _Lane) -> None:
        """Starts to read a lane's next window where the ring has room for it; the lock is held. One after the other."""
        room = (self._done + self._depth) * self.lane_rows
        if not (lane.reading or self._stop or self._failure) and lane.filled + self.order.window_rows <= room:
            lane.reading = True
            self._pool.submit(self._read, lane)

    def _read(self, lane: _Lane) -> None:
        try:
            self._announce(lane)
            found = self._window(lane, *lane.ahead)
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()
            return
        with self._changed:
            lane.ahead = self.order.following(lane.number, found.epoch, found.number)
            lane.empty = 0 if found.end > found.begin else lane.empty + 1
            if found.end > found.begin:
                lane.windows.append(found)
            if lane.empty >= 2 * self.order.windows_of(lane.number):  # among so many in a row are all those of one epoch
                self._failure = StoreError(f"{self.store.path}: every row of {', '.join(self.hookpoints)} in lane {lane.number} "
                                           "is masked; nothing to stream")
            self._behind -= lane.filled < self._end <= found.end
            lane.filled, lane.reading = found.end, False
            if self._failure or not self._behind:
                self._changed.notify_all()
            self._read_ahead(lane)

    def _announce(self, lane: _Lane) -> None:
        """Lets the system fetch the window behind the next one: so all lanes have reads under way, however few threads there are.
        """
        if lane.slot is not None:
            epoch, number, _ = self.order.following(lane.number, *lane.ahead[:2])
            spans = self.order.spans(self.seed, lane.number, epoch, number)
            for hookpoint in self.hookpoints:
                self.store.announce(f"acts/{hookpoint}", spans)

    def _window(self, lane: _Lane, epoch: int, number: int, first: int) -> _Window:
        """Reads the rows of a window from its turn `first` on into the ring; of the lane of another process only how many."""
        spans = self.order.spans(self.seed, lane.number, epoch, number)
        keep_R = self.store.keep_of(spans)
        rows = max(0, int(keep_R.sum()) - first)
        if lane.slot is not None and rows:
            turn_R = self.order.turns(self.seed, lane.number, epoch, number, keep_R) - first + lane.filled
            batch_R, row_R = np.divmod(turn_R, self.lane_rows)
            slot_R = ((batch_R % self._depth) * len(self.lanes) + lane.slot) * self.lane_rows + row_R
            slot_R[~keep_R | (turn_R < lane.filled)] = -1
            if self._options.mask_outliers:
                self._scatter_usual(spans, turn_R - lane.filled + first, slot_R, self._rows)
            else:
                self._scatter(spans, slot_R, self._rows)
        return _Window(lane.filled, lane.filled + rows, epoch, number, first)

    def _scatter(self, spans: list[Span], slot_R: np.ndarray, out: np.ndarray) -> None:
        column = 0
        for hookpoint, width in zip(self.hookpoints, self.widths, strict=True):
            self.store.scatter(f"acts/{hookpoint}", spans, slot_R, out[:, column:column + width])
            column += width

    def _scatter_usual(self, spans: list[Span], turn_R: np.ndarray, slot_R: np.ndarray, out: np.ndarray) -> None:
        """As `_scatter`, with the next usual row of the window in the place of an outlier. All of the window is read for it."""
        window = np.empty((int(turn_R.max()) + 2, out.shape[1]), out.dtype)
        self._scatter(spans, turn_R, window)
        window = window[:-1]
        unusual, column = np.zeros(len(window), bool), 0
        for hookpoint, width in zip(self.hookpoints, self.widths, strict=True):
            unusual |= row_norms(window[:, column:column + width]) > self.store.outlier_bound(hookpoint)
            column += width
        usual = np.flatnonzero(~unusual)
        if not len(usual):
            raise StoreError(f"{self.store.path}: every row of a window is an outlier (config.stream.mask_outliers); raise "
                             "config.stream.window_rows")
        taken = np.arange(len(window))
        taken[unusual] = usual[np.searchsorted(usual, taken[unusual]) % len(usual)]
        wanted = slot_R >= 0
        out[slot_R[wanted]] = window[taken[turn_R[wanted]]]


def order_of(store: Store, options: StreamOptions, batch: int, state: StreamState | int) -> RowOrder:
    """The order of a stream: with the lanes of its state, or for the seed of a new one with those that fit the batch. Raises
    `StoreError`.
    """
    if batch < 1:
        raise StoreError(f"{store.path}: no stream of batches of {batch} rows (config.train.batch)")
    if isinstance(state, int):
        return RowOrder.for_batches(store.rows, store.context, options, batch)
    lanes = len(state.lanes)
    if batch % lanes:
        raise StoreError(f"config.train.batch: the run began with {lanes} lanes, which do not divide {batch} rows; use a "
                         f"multiple of {lanes}")
    order = RowOrder(store.rows, store.context, options, lanes)
    for lane, (epoch, window, row) in enumerate(state.lanes):
        if min(state.seed, epoch, window, row) < 0 or window >= order.windows_of(lane) or row > order.window_rows:
            raise StoreError(f"{store.path}: no stream at epoch {epoch}, window {window}, row {row} of lane {lane}; this is the "
                             "state of another store")
    return order
