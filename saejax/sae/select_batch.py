"""Exact selection of the B x k largest activations of a whole batch that is split over both mesh axes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from saejax.base import sharding
from saejax.sae.select import UpTo, largest, sent

# Where rows keep k on average: candidates of a row and of the widest rows, as multiples of k; the share of those.
ROOM, WIDE, WIDE_SHARE = 3, 32, 1 / 16
# The bits of a positive float, as an integer, are in the order of the floats. 31 of them are found, the upper ones first: every
# pass splits what is left into 16 parts.
STEPS, PARTS = tuple(1 << shift for shift in (27, 23, 19, 15, 11, 7, 3, 0)), 16
_MOST, _INFINITE, _GROUP = 2**31 - 1, 0x7F800000, 2**15


class Border(NamedTuple):
    """low: bits of the least activation that is kept, 0 where all positive ones are. n_low, n_high: how many reach, exceed it."""

    low: jax.Array
    n_low: jax.Array
    n_high: jax.Array


class Candidates(NamedTuple):
    """The largest values of each row and their features, falling, [B, C]; more of the widest rows, whose numbers are `wide_rows`
    and whose own values are -inf in the first table.
    """

    values: tuple[jax.Array, jax.Array]
    index: tuple[jax.Array, jax.Array]
    wide_rows: jax.Array


def batch_topk_mask(pre_BF: jax.Array, k: int | UpTo) -> jax.Array:
    """Boolean mask of the B x k largest positive pre-activations of the whole batch; all of them where there are fewer.

    pre_BF: float32 [B, F], rows split over `data`, features over `dict`; B x k < 2^31 - 2^16. Exactly B x k are True, ties go to
    the lower row, then to the lower feature, on every mesh; NaN counts as the largest. Nothing is sorted and nothing moves but
    counts: eight passes over candidates, and over all entries where a row keeps more than it has candidates (`border`). The
    gradient is not defined: pass stop_gradient.
    """
    rows_features, k = sharding.spec("rows", "features"), UpTo.of(k)
    check_counts(pre_BF.shape[0], k.most)
    return sharding.on_shards(_mask_local, (rows_features, sharding.spec()), rows_features)(pre_BF, k)


def check_counts(rows: int, k: int) -> None:
    """Raises `ValueError` where so many do not fit 32-bit counts."""
    if rows * k >= _MOST - 2**16:
        raise ValueError(f"batchtopk: {rows} rows x k = {k} does not fit 32-bit counts")


def candidates(pre_of: Callable, rows: jax.Array, k: int, shards: int, features: int) -> Candidates:
    """pre_of(rows [n, ...], how many) -> `largest` of their pre-activations on this shard of so many features."""
    in_batch = len(rows) * (lax.axis_size("data") if sharding.mesh_is_set() else 1)
    values, index = pre_of(rows, sent(ROOM * k, in_batch, shards, features))
    _, wide_rows = largest(values[:, -1:].T, max(1, int(WIDE_SHARE * len(rows))))
    wide_rows = wide_rows[0]
    wide, wide_index = pre_of(rows[wide_rows], sent(WIDE * k, in_batch, shards, features))
    return Candidates((values.at[wide_rows].set(-jnp.inf), wide), (index, wide_index), wide_rows)


def kept_candidates(found: Candidates, k: int | jax.Array, features: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """(which candidates are among the B x k of the whole batch, of each table; whether a row may keep more than it has: then they
    are not exact). features: of the shard. Call it inside `shard_map` where there are several devices.
    """
    keep = kept_in_all(len(found.values[0]), k)
    at, short = _border_of(found, keep, features)
    return _kept(found.values, found.wide_rows, at, keep), short


def _border_of(found: Candidates, keep: int | jax.Array, features: int) -> tuple[Border, jax.Array]:
    """(the border of the candidates, whether a row may keep more of the shard's features than it has candidates)."""
    bits = tuple(map(ordered, found.values))
    at = border(lambda parts: _count(bits, parts), keep)
    short = [(table[:, -1] >= jnp.maximum(at.low, 1)).any() & (table.shape[1] < features) for table in bits]
    return at, any_device(short[0] | short[1])


def border(count: Callable, keep: int | jax.Array) -> Border:
    """Where the `keep` largest of all entries end, by eight passes. count(parts [T]): how many entries of all devices are at
    least each of them, saturated at 2^31 - 1.
    """
    def narrower(i, at: Border) -> Border:
        step = jnp.asarray(STEPS, jnp.uint32)[i]
        parts = at.low + step * jnp.arange(1, PARTS, dtype=jnp.uint32)
        n = jnp.concatenate([at.n_low[None], count(parts), at.n_high[None]])
        place = (n[1:-1] >= keep).sum()
        return Border(at.low + step * place.astype(jnp.uint32), n[place], n[place + 1])

    return lax.fori_loop(0, len(STEPS), narrower, Border(jnp.uint32(0), jnp.int32(_MOST), jnp.int32(0)))


def ordered(values: jax.Array) -> jax.Array:
    """uint32 in the order of the values: 0 for what is not positive; NaN is infinite."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(values > 0, bits, jnp.where(jnp.isnan(values), jnp.uint32(_INFINITE), jnp.uint32(0)))


def total(counts: jax.Array) -> jax.Array:
    """Sum of non-negative counts over the last axis (rows) and over all devices; saturated at 2^31 - 1.

    Halves of 16 bits are summed apart, in groups of rows first, so that nothing overflows on up to 2^16 devices.
    """
    def halves(low, high):
        return low & 0xFFFF, high + (low >> 16)

    n = -(-counts.shape[-1] // _GROUP)
    groups = jnp.pad(counts, ((0, 0), (0, n * _GROUP - counts.shape[-1]))).reshape(len(counts), n, _GROUP) if n > 1 else (
        counts[:, None])
    low, high = halves((groups & 0xFFFF).astype(jnp.uint32).sum(-1), (groups >> 16).astype(jnp.uint32).sum(-1))
    low, high = halves(low.sum(-1), high.sum(-1))
    low, high = halves(sharding.over(lax.psum, low, "data", "dict"), sharding.over(lax.psum, high, "data", "dict"))
    return jnp.where(high < 0x7FFF, (high * 65536 + low).astype(jnp.int32), _MOST)


def any_device(condition: jax.Array) -> jax.Array:
    """Whether it holds anywhere."""
    return sharding.over(lax.pmax, condition.astype(jnp.int32), "data", "dict") > 0


def ties_left(n_equal_B: jax.Array, at: Border, keep: int | jax.Array) -> jax.Array:
    """How many entries that equal the border each row of this shard keeps at most (more than it has, or none): int32 [B]; the
    first in the order (row, feature) over all devices. n_equal_B: how many it has. Two all-gathers of counts.
    """
    allowed = jnp.where(at.low > 0, keep - at.n_high, 0)

    def add(a, b):
        return jnp.minimum(a, allowed - b) + b  # min(a + b, allowed) for a, b <= allowed, without overflow

    def before(counts, axis):
        inclusive = lax.associative_scan(add, jnp.minimum(counts, allowed), axis=axis)
        return lax.slice_in_dim(jnp.concatenate([jnp.zeros_like(lax.slice_in_dim(inclusive, 0, 1, axis=axis)), inclusive], axis),
                                0, counts.shape[axis], axis=axis), inclusive

    whole_row, lower_shards, earlier = n_equal_B, jnp.zeros_like(n_equal_B), jnp.zeros_like(allowed)
    if sharding.mesh_is_set():
        exclusive, inclusive = before(lax.all_gather(n_equal_B, "dict", axis=1), 1)
        whole_row, lower_shards = inclusive[:, -1], jnp.take(exclusive, lax.axis_index("dict"), axis=1)
    rows_before, rows_through = before(whole_row, 0)
    if sharding.mesh_is_set():
        exclusive, _ = before(lax.all_gather(rows_through[-1], "data"), 0)
        earlier = exclusive[lax.axis_index("data")]
    return allowed - add(add(rows_before, lower_shards), earlier)


def _mask_local(pre_local: jax.Array, k: UpTo, shards: int) -> jax.Array:
    found = candidates(largest, pre_local, k.most, shards, pre_local.shape[1])
    keep = kept_in_all(len(pre_local), k.count)
    at, short = _border_of(found, keep, pre_local.shape[1])
    at = lax.cond(short, lambda: border(lambda parts: _count((ordered(pre_local),), parts), keep),
                  lambda: at)
    return _kept((pre_local,), None, at, keep)[0]


def kept_in_all(rows: int, k: int | jax.Array) -> int | jax.Array:
    """How many entries all devices together keep, where each has so many rows."""
    return rows * k * (lax.axis_size("data") if sharding.mesh_is_set() else 1)


def _count(tables: tuple[jax.Array, ...], parts: jax.Array) -> jax.Array:
    return total(jnp.concatenate([(table >= parts[:, None, None]).sum(2, dtype=jnp.int32) for table in tables], axis=1))


def _kept(values: tuple[jax.Array, ...], wide_rows: jax.Array | None, at: Border, keep: int | jax.Array) -> tuple[jax.Array, ...]:
    """Which entries of tables as `Candidates` has them are kept."""
    def with_ties():
        tables = [ordered(table) for table in values]
        equal = [table == at.low for table in tables]
        n_equal = [table.sum(1, dtype=jnp.int32) for table in equal]
        for n in n_equal[1:]:
            n_equal[0] = n_equal[0].at[wide_rows].add(n)
        left = ties_left(n_equal[0], at, keep)
        left = (left, *(left[wide_rows] for _ in tables[1:]))
        return tuple((table > at.low) | (same & (jnp.cumsum(same, axis=1, dtype=jnp.int32) <= left_B[:, None]))
                     for table, same, left_B in zip(tables, equal, left, strict=True))

    reached = jnp.maximum(at.low, 1)  # what is not positive is never kept
    return lax.cond((at.n_low > keep) & (at.low > 0), with_ties,
                    lambda: tuple(ordered(table) >= reached for table in values))
