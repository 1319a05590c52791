"""Which rows of a store come when: arithmetic on integers, without any reading of activations.

The blocks of a store (`block_contexts` whole contexts) are dealt to L *lanes*: block b belongs to lane b mod L. Every lane has
its own epochs. Epoch e permutes the blocks of a lane with key (seed, e, lane); consecutive blocks of that order are a *window*,
whose kept rows are permuted with key (seed, e, lane, window) and handed out. Rows l B / L to (l + 1) B / L of a batch are lane
l's next ones: each row comes exactly once per epoch of its lane. A process reads the lanes that its rows touch, and no others.

The order depends on seed, store, `StreamOptions` and L only: not on the number of processes, on prefetching or on timing.
`ORDER_VERSION` names it; changing it breaks resuming.
"""

import functools
import math

import numpy as np

from saejax.base.errors import StoreError
from saejax.base.records import StreamState
from saejax.config import Config, StreamOptions
from saejax.data.permutation import Permutation, derive_key, shuffled

ORDER_VERSION = 3
MOST_LANES = 64
_WINDOWS_TOGETHER = 64
_BLOCK_ORDER, _ROW_ORDER = 1, 2
Place = tuple[int, int, int]  # epoch, window, rows of it that were handed out


class RowOrder:
    """The order of `rows` rows in contexts of `context` tokens, dealt to `lanes` lanes."""

    def __init__(self, rows: int, context: int, options: StreamOptions, lanes: int):
        self.rows, self.lanes = rows, lanes
        self.block_rows = options.block_contexts * context
        self.n_blocks = -(-rows // self.block_rows)
        if not 1 <= lanes <= self.n_blocks:
            raise StoreError(f"{self.n_blocks} blocks of {options.block_contexts} contexts are fewer than {lanes} lanes; this is "
                             "the state of another store")
        self.window_blocks = min(-(-self.n_blocks // lanes), _window_blocks(options, self.block_rows, lanes))
        self._blocks = functools.lru_cache(2 * lanes)(self._blocks_of_windows)

    @classmethod
    def for_batches(cls, rows: int, context: int, options: StreamOptions, batch: int) -> "RowOrder":
        """With as many lanes as batches of this size allow: the largest power of two up to 64 that divides the batch, leaves
        every lane a whole window, and all windows together within `window_rows`.
        """
        block_rows = options.block_contexts * context
        lanes = math.gcd(batch, MOST_LANES)
        while lanes > 1 and (lanes * block_rows > options.window_rows or
                             -(-rows // block_rows) // lanes < _window_blocks(options, block_rows, lanes)):
            lanes //= 2
        return cls(rows, context, options, lanes)

    @property
    def window_rows(self) -> int:
        """Rows of a lane's window; the last one of an epoch may have fewer."""
        return self.window_blocks * self.block_rows

    def batches_held(self, lane_rows: int) -> int:
        """Batches, with so many rows of a lane each, that a stream holds: two windows of every lane, and the one handed out."""
        return 1 + -(-2 * self.window_rows // lane_rows)

    def start(self, seed: int) -> StreamState:
        """The first row of the first epoch."""
        return StreamState(seed, ((0, 0, 0),) * self.lanes)

    def blocks_of(self, lane: int) -> int:
        """How many blocks a lane has."""
        return len(range(lane, self.n_blocks, self.lanes))

    def windows_of(self, lane: int) -> int:
        """How many windows an epoch of a lane has."""
        return -(-self.blocks_of(lane) // self.window_blocks)

    def spans(self, seed: int, lane: int, epoch: int, window: int) -> list[tuple[int, int]]:
        """Store rows start..stop-1 of the blocks of a window, in the order of reading."""
        group, place = divmod(window, _WINDOWS_TOGETHER)
        blocks = self._blocks(seed, lane, epoch, group)[place * self.window_blocks:(place + 1) * self.window_blocks]
        return [(b * self.block_rows, min((b + 1) * self.block_rows, self.rows)) for b in blocks.tolist()]

    def _blocks_of_windows(self, seed: int, lane: int, epoch: int, group: int) -> np.ndarray:
        """The blocks of a few consecutive windows: to permute many takes no longer than to permute one."""
        n, many = self.blocks_of(lane), _WINDOWS_TOGETHER * self.window_blocks
        positions = np.arange(group * many, min((group + 1) * many, n))
        return Permutation(n, derive_key(seed, epoch, _BLOCK_ORDER, lane))(positions) * self.lanes + lane

    def turns(self, seed: int, lane: int, epoch: int, window: int, keep_R: np.ndarray) -> np.ndarray:
        """int64 [R]: when each of the window's R rows, in the order of reading, is handed out; -1: never, it is not kept."""
        kept = np.flatnonzero(keep_R)
        out_R = np.full(len(keep_R), -1, np.int64)
        out_R[kept[shuffled(len(kept), derive_key(seed, epoch, _ROW_ORDER, lane, window))]] = np.arange(len(kept))
        return out_R

    def following(self, lane: int, epoch: int, window: int) -> Place:
        """The beginning of the window behind this one."""
        return (epoch, window + 1, 0) if window + 1 < self.windows_of(lane) else (epoch + 1, 0, 0)


def _window_blocks(options: StreamOptions, block_rows: int, lanes: int) -> int:
    return max(1, options.window_rows // (lanes * block_rows))


def of_a_large_store(config: Config) -> RowOrder:
    """The order of a run whose store is larger than its windows."""
    return RowOrder.for_batches(2**50, config.text.context, config.stream, config.train.batch)


def contexts_of_a_batch(config: Config) -> int:
    """From how many contexts the rows of a batch are drawn: those of the windows of all lanes."""
    order, batch = of_a_large_store(config), config.train.batch
    return order.lanes * max(order.window_rows, batch // order.lanes) // config.text.context


def amplification(batch: int, lanes: int, processes: int) -> float:
    """How many times over a row is read when so many processes share the rows of a batch evenly: 1 where a lane is of one
    process, at most 1 + processes / lanes.
    """
    size = batch // lanes
    edges = [process * batch // processes for process in range(processes + 1)]
    return sum(-(-stop // size) - start // size for start, stop in zip(edges, edges[1:], strict=False)) * size / batch
