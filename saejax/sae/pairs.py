"""The pair list: a batch's kept activations on each device, in lines of n slots, and the sums that are taken over them.

A pair is (value, feature, row). Pairs are kept in row order: one list serves decoding, the gradients of the values and those of
the weights. Nothing here communicates: every function works on the pairs of one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.sae.products import product

CHUNK, CHUNK_OF_CPU = 2**26, 2**20  # entries of rows that are gathered at once
UNROLLED = 64  # slots of a sum that a CPU makes while it reads the rows
LINE = 16      # slots of a line at most, where a row may have several
COPIED = 1.5   # slots for each feature of a shard from which on one copy of W_dec in a smaller dtype costs less than many rows


@struct.dataclass
class Pairs:
    """values_Ln: activations, float32, positive (or not finite, which must not get lost), 0 in empty slots. index_Ln: features,
    counted within the shard. row_L: rows, counted within the device's. count: how many of a device's L lines are in use,
    [devices]. rows: how many a device has; by_row: line i is row i, and all are in use.
    """

    values_Ln: jax.Array
    index_Ln: jax.Array
    row_L: jax.Array
    count: jax.Array
    rows: int = struct.field(pytree_node=False)
    by_row: bool = struct.field(pytree_node=False)

    @classmethod
    def of_rows(cls, values_Bn: jax.Array, index_Bn: jax.Array) -> "Pairs":
        """One line for each row."""
        B = len(values_Bn)
        return cls(values_Bn, index_Bn, jnp.arange(B, dtype=jnp.int32), jnp.full(1, B, jnp.int32), B, True)


def slots(k: int, shards: int) -> int:
    """Of a line, where rows have different numbers of pairs: few slots leave few of them empty."""
    return min(LINE, -(-k // shards))


def in_lines(values_Xn: jax.Array, index_Xn: jax.Array, count_B: jax.Array, base_B: jax.Array, room: int) -> Pairs:
    """The first count_B candidates of each row, in lines; there must be `room` for these.

    values_Xn, index_Xn: lines of n candidates; base_B: the line that a row's candidates begin with.
    """
    B, n = len(count_B), values_Xn.shape[1]
    line_L, row_L, first_B, count = places(count_B, n, room)
    nth_L = line_L - first_B[row_L]
    here_Ln = (line_L < count)[:, None] & (nth_L[:, None] * n + jnp.arange(n) < count_B[row_L][:, None])
    place_L = jnp.minimum(base_B[row_L] + nth_L, len(values_Xn) - 1)
    return Pairs(jnp.where(here_Ln, jax.nn.relu(values_Xn[place_L]), 0.0), jnp.where(here_Ln, index_Xn[place_L], 0), row_L,
                 count[None], B, False)


def places(count_B: jax.Array, n: int, room: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(number of each line, its row, the first line of each row, lines in use) where rows have so many pairs."""
    ends_B = jnp.cumsum(-(-count_B // n))
    line_L = jnp.arange(room, dtype=jnp.int32)
    row_L = jnp.searchsorted(ends_B, line_L, side="right", method="scan_unrolled")
    return line_L, jnp.minimum(row_L, len(count_B) - 1).astype(jnp.int32), ends_B - -(-count_B // n), ends_B[-1]


def as_lines(table: jax.Array, n: int) -> jax.Array:
    """Candidates [R, C] -> lines of n, [R x ceil(C / n), n]; what is filled up with zeros no row counts."""
    R, C = table.shape
    return jnp.pad(table, ((0, 0), (0, -C % n))).reshape(-1, n)


def group_of(index: jax.Array, ends: tuple[int, ...], features: int) -> jax.Array | int:
    """The group that a feature of this shard of so many belongs to: group g ends before feature ends[g] of the dictionary."""
    if len(ends) == 1:
        return 0
    start = lax.axis_index("dict") * features if sharding.mesh_is_set() else 0
    return (index[..., None] + start >= jnp.asarray(ends[:-1])).sum(-1)


def decoded(dtype, W_dec: jax.Array, pairs: Pairs, ends: tuple[int, ...]) -> jax.Array:
    """recon[g, b] = sum over pairs of row b with features of group g of value x W_dec[feature], float32 [G, B, D].

    Values and weights in `dtype`, sums in float32. No scatter where a line is a row, else one row for each line.
    """
    G = len(ends)

    def by(cpu: bool, W_dec, pairs):
        table = _table(dtype, W_dec, pairs)

        def of(lines: Pairs) -> jax.Array:
            group_Tn, values_Tn = group_of(lines.index_Ln, ends, len(W_dec)), lines.values_Ln
            values_TGn = jnp.stack([jnp.where(group_Tn == g, values_Tn, 0.0) for g in range(G)], axis=1)
            if cpu:
                return _sums(values_TGn, table, lines.index_Ln, dtype)
            return product("tgn,tnd->tgd", values_TGn, table[lines.index_Ln], dtype)

        size = _size(pairs, 1 if cpu else W_dec.shape[1], cpu)
        if pairs.by_row:
            return jnp.moveaxis(_mapped(pairs, size, of), 1, 0)
        zero = jnp.zeros((G, pairs.rows, W_dec.shape[1]), jnp.float32)
        return _summed(pairs, size, lambda recon, lines, first: recon.at[:, lines.row_L].add(jnp.moveaxis(of(lines), 1, 0)), zero)

    return _on_platform(by, W_dec, pairs)


def slopes(dtype, W_dec: jax.Array, gradient_GBD: jax.Array, pairs: Pairs, ends: tuple[int, ...]) -> jax.Array:
    """d loss / d value of each pair [L, n]: gradient[group, row] . W_dec[feature]; 0 where the slot is empty."""
    def by(cpu: bool, W_dec, gradient_GBD, pairs):
        table, gradient_BGD = _table(dtype, W_dec, pairs), jnp.moveaxis(gradient_GBD, 0, 1)

        def of(lines: Pairs) -> jax.Array:
            found_TGn = product("tgd,tnd->tgn", gradient_BGD[lines.row_L], table[lines.index_Ln], dtype)
            group_Tn = group_of(lines.index_Ln, ends, len(W_dec))
            found_Tn = sum(jnp.where(group_Tn == g, found_TGn[:, g], 0.0) for g in range(len(ends)))
            return jnp.where(lines.values_Ln > 0, found_Tn, 0.0)

        return _mapped(pairs, _size(pairs, W_dec.shape[1], cpu), of)

    return _on_platform(by, W_dec, gradient_GBD, pairs)


@struct.dataclass
class Backward:
    """What the gradients of the weights are summed from: pairs, `slopes`, what the encoder read [B, D], and the gradient of
    `decoded` [G, B, D]. Both products' operands are rounded to `dtype` first.
    """

    pairs: Pairs
    slopes_Ln: jax.Array
    read_BD: jax.Array
    gradient_GBD: jax.Array
    dtype: Any = struct.field(pytree_node=False)
    ends: tuple[int, ...] = struct.field(pytree_node=False)

    def added(self, sums: tuple[jax.Array, ...], place_F: jax.Array) -> tuple[jax.Array, ...]:
        """(gradients of W_enc [C, D], b_enc [C], W_dec [C, D_out]) + those of these pairs; place_F: where in them a feature is,
        C: nowhere. W_enc[f] += slope x read[row], b_enc[f] += slope, W_dec[f] += value x gradient[group, row].
        """
        return _on_platform(self._added, sums, place_F)

    def _added(self, cpu: bool, sums: tuple[jax.Array, ...], place_F: jax.Array) -> tuple[jax.Array, ...]:
        C = len(sums[1])

        def add(sums, given, first):
            lines, slopes_Tn = given
            place_Tn = jnp.where(lines.values_Ln > 0, place_F[lines.index_Ln], C)
            group_Tn, row_T1 = group_of(lines.index_Ln, self.ends, len(place_F)), lines.row_L[:, None]

            def weighted(by_Tn, rows):
                return rounded(by_Tn, self.dtype)[..., None] * rounded(rows, self.dtype)

            more = (weighted(slopes_Tn, self.read_BD[row_T1]), slopes_Tn,
                    weighted(lines.values_Ln, self.gradient_GBD[group_Tn, row_T1]))
            return tuple(old.at[place_Tn].add(new, mode="drop") for old, new in zip(sums, more, strict=True))

        width = max(sums[0].shape[1], sums[2].shape[1])
        return _summed(self.pairs, _size(self.pairs, width, cpu), add, sums, (self.pairs.replace(count=None), self.slopes_Ln))


def fired(pairs: Pairs, features: int) -> jax.Array:
    """Which of a shard's features have a positive activation on this device: int32 [F] of 0 and 1."""
    return _summed(pairs, _size(pairs, 1, False),
                   lambda found_F, lines, first: found_F.at[lines.index_Ln].max((lines.values_Ln > 0).astype(jnp.int32)),
                   jnp.zeros(features, jnp.int32))


def counts(pairs: Pairs, features: int, counted_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many features of this device are active in each row, int32 [B], and in how many of the counted rows each, int32 [F]."""
    def add(sums, lines, first):
        l0_B, fired_F = sums
        active_Tn = (lines.values_Ln > 0).astype(jnp.int32)
        return (l0_B.at[lines.row_L].add(active_Tn.sum(1)),
                fired_F.at[lines.index_Ln].add(active_Tn * counted_B[lines.row_L][:, None].astype(jnp.int32)))

    return _summed(pairs, _size(pairs, 1, False), add, (jnp.zeros(pairs.rows, jnp.int32), jnp.zeros(features, jnp.int32)))


def _on_platform(by: Callable, *values):
    """by(whether it is a CPU, ...)."""
    return lax.platform_dependent(*values, cpu=functools.partial(by, True), default=functools.partial(by, False))


def _size(pairs: Pairs, width: int, cpu: bool) -> int:
    """Lines that are worked on at once, where so many entries are read for each slot."""
    most = len(pairs.row_L) if pairs.by_row else pairs.rows
    return max(1, min(most, (CHUNK_OF_CPU if cpu else CHUNK) // (pairs.values_Ln.shape[1] * width)))


def _summed(pairs: Pairs, size: int, add: Callable, carry, given=None):
    """The carry after add(carry, lines, first) of all lines in use, `size` at a time. given: what has a line each, else pairs."""
    given = pairs.replace(count=None) if given is None else given
    L = len(pairs.row_L)
    if size >= L:
        return add(carry, given, 0)
    turns = -(-L // size)
    given = jax.tree.map(lambda value: jnp.pad(value, ((0, turns * size - L), *[(0, 0)] * (value.ndim - 1))), given)

    def turn(i, carry):
        return add(carry, jax.tree.map(lambda value: lax.dynamic_slice_in_dim(value, i * size, size), given), i * size)

    return lax.fori_loop(0, turns if pairs.by_row else -(-pairs.count[0] // size), turn, carry)


def _mapped(pairs: Pairs, size: int, of: Callable) -> jax.Array:
    """of(lines) of all lines in use, `size` at a time; 0 of the others."""
    L = len(pairs.row_L)
    if size >= L:
        return of(pairs)
    like = jax.eval_shape(of, jax.tree.map(lambda value: jax.ShapeDtypeStruct((size, *value.shape[1:]), value.dtype),
                                           pairs.replace(count=None)))
    out = jnp.zeros((-(-L // size) * size, *like.shape[1:]), like.dtype)
    return _summed(pairs, size, lambda out, lines, first: lax.dynamic_update_slice_in_dim(out, of(lines), first, 0), out)[:L]


def rounded(value: jax.Array, dtype) -> jax.Array:
    """What a product in `dtype` with float32 sums reads."""
    return value.astype(dtype).astype(jnp.float32)


def _table(dtype, W_dec: jax.Array, pairs: Pairs) -> jax.Array:
    """W_dec, in `dtype` where that pays."""
    turns = 1 if pairs.by_row else 2
    return W_dec.astype(dtype) if turns * pairs.rows * pairs.values_Ln.shape[1] > COPIED * len(W_dec) else W_dec


def _sums(values_TGn: jax.Array, table: jax.Array, index_Tn: jax.Array, dtype) -> jax.Array:
    """sum over n of values[t, g, n] x table[index[t, n]], made while the table is read."""
    G, n = values_TGn.shape[1:]
    values_TGn = rounded(values_TGn, dtype)

    def some(g: int, first: int) -> jax.Array:
        slots = range(first, min(n, first + UNROLLED))
        return sum(values_TGn[:, g, s, None] * rounded(table[index_Tn[:, s]], dtype) for s in slots)

    return jnp.stack([sum(some(g, first) for first in range(0, n, UNROLLED)) for g in range(G)], axis=1)
