"""Exact selection of the B x k largest activations of a whole batch that is split over both mesh axes."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from saejax import sharding

_MOST = 2**31 - 1
_STRIDE = 16


def batch_topk_mask(pre_BF: jax.Array, k: int) -> jax.Array:
    """Boolean mask of the B x k largest positive pre-activations of the whole batch; all of them where there are fewer.

    pre_BF: float32 [B, F], rows split over `data`, features over `dict`; B x k < 2^31 - 2^16. Exactly B x k are True, ties go to
    the lower row, then to the lower feature, on every mesh. Nothing is sorted and nothing moves but counts: the threshold is
    bracketed on the order-preserving integer bits of the floats by interpolation, each trial one pass over the local entries and
    one all-reduce of two integers; a threshold with exactly B x k entries above it ends the search (about a dozen trials), else
    the last bracket holds one value and its ties are counted row by row. The gradient is not defined: pass stop_gradient.
    """
    keep = pre_BF.shape[0] * k
    if keep >= _MOST - 2**16:
        raise ValueError(f"batch_topk_mask: {pre_BF.shape[0]} rows x k = {k} does not fit 32-bit counts")
    if not sharding.mesh_is_set():
        return _mask_local(pre_BF, keep, ())
    rows_features = sharding.spec("rows", "features")
    # check_vma knows mesh axes only, not the axis that `any_member` reduces over
    return jax.shard_map(lambda pre_local: _mask_local(pre_local, keep, ("data", "dict")), in_specs=rows_features,
                         out_specs=rows_features, check_vma=False)(pre_BF)


def kept_over_batch(values: jax.Array, wide: jax.Array, wide_rows: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Which of a shard's largest values of each row, as `lax.top_k` returns them, are among the B x k of the whole batch: exact
    as long as no row's least one is. wide: more values of some rows, `wide_rows`, which have -inf in `values`. Call it inside
    `shard_map` where there are several devices.
    """
    axes, devices = (("data", "dict"), lax.axis_size("data")) if sharding.mesh_is_set() else ((), 1)
    return _masks_local((values, wide), wide_rows, len(values) * devices * k, axes)


def _mask_local(pre_local: jax.Array, keep: int, axes: tuple[str, ...]) -> jax.Array:
    return _masks_local((pre_local,), jnp.zeros(0, jnp.int32), keep, axes)[0]


def _masks_local(tables: tuple[jax.Array, ...], wide_rows: jax.Array, keep: int, axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    bits = tuple(jnp.where(table > 0, lax.bitcast_convert_type(table, jnp.int32), 0) for table in tables)
    low, high, n_high = _bracket(bits, keep, axes)
    above = tuple(table >= high for table in bits)
    tied = (n_high < keep) & (low > 0)

    def with_ties():
        return tuple(map(jnp.logical_or, above, _first(tuple(table == low for table in bits), wide_rows, keep - n_high, axes)))

    return lax.cond(sharding.any_member(tied), with_ties, lambda: above)


def _bracket(tables: tuple[jax.Array, ...], keep: int, axes: tuple[str, ...], tolerance: int = 0):
    """(low, high, n_high): n_high <= keep entries are >= high, more than keep are >= low; n_high = keep or high = low + 1.

    low = 0 where at most `keep` entries are positive. tolerance: a count that is off by so much will do.
    """
    hints = _hints(tables[0], keep, axes) if tolerance == 0 and len(tables[0]) >= 4 * _STRIDE else ()

    def total(condition):
        return _total(jnp.concatenate([condition(table).sum(1, dtype=jnp.int32) for table in tables]), axes)

    def unfinished(state):
        low, high, n_low, n_high, _ = state
        return (keep - n_high > tolerance) & (high - low > 1)

    def narrower(state):
        low, high, n_low, n_high, trial = state
        halve = (trial > 12) & (trial % 2 == 0)
        middle = jnp.where(halve, low + (high - low) // 2, _interpolated(low, high, n_low, n_high, keep))
        for i, hint in enumerate(hints):
            middle = jnp.where((trial == i) & (low < hint) & (hint < high), hint, middle)
        n = total(lambda bits: bits >= middle)
        more = n > keep
        return (jnp.where(more, middle, low), jnp.where(more, high, middle), jnp.where(more, n, n_low),
                jnp.where(more, n_high, n), trial + 1)

    n_positive = total(lambda bits: bits > 0)
    largest = functools.reduce(jnp.maximum, [bits.max() for bits in tables])
    largest = lax.pmax(largest, axes) if axes else largest
    few = n_positive <= keep
    start = (jnp.where(few, 0, 1), jnp.where(few, 1, largest + 1), n_positive, jnp.where(few, n_positive, 0), 0)
    low, high, _, n_high, _ = lax.while_loop(unfinished, narrower, start)
    return low, high, n_high


def _hints(bits: jax.Array, keep: int, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """Thresholds likely to lie on either side of the wanted one, from one row in `_STRIDE`: three standard deviations apart."""
    sample = bits[::_STRIDE]
    wanted = keep * len(sample) // len(bits)
    spread = 3 * math.isqrt(wanted + 1)
    return tuple(_bracket((sample,), max(n, 1), axes, tolerance=max(spread // 3, 1))[1]
                 for n in (wanted + spread, wanted - spread))


def _interpolated(low, high, n_low, n_high, keep: int) -> jax.Array:
    """Where the logarithm of the count, linear in the value between the ends, crosses `keep`; strictly inside the bracket.

    It aims a little beyond, towards the farther end: a bracket that is tight on one side only shrinks slowly.
    """
    def log(n):
        return jnp.log(jnp.maximum(n, 0.5).astype(jnp.float32))

    a, b = (lax.bitcast_convert_type(bits, jnp.float32) for bits in (low, high))
    near = jnp.minimum(keep - n_high, n_low - keep)
    beyond = jnp.sqrt(near.astype(jnp.float32)) * jnp.where(keep - n_high < n_low - keep, 1.0, -1.0)
    aim = jnp.where((near > 4) & (near < (n_low - n_high) // 4), keep + beyond, keep)
    share = (log(n_low) - log(aim)) / jnp.maximum(log(n_low) - log(n_high), 1e-6)
    guess = lax.bitcast_convert_type(a + jnp.clip(share, 0.0, 1.0) * (b - a), jnp.int32)
    return jnp.clip(guess, low + 1, high - 1)


def _total(counts_B: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sum of non-negative counts over rows and shards, exact below 2^31 - 2^16 and saturated above.

    Halves of 16 bits are summed apart, so that nothing overflows with up to 2^16 local rows on up to 2^16 devices.
    """
    def halves(low, high):
        return low & 0xFFFF, high + (low >> 16)

    low, high = halves((counts_B & 0xFFFF).astype(jnp.uint32).sum(), (counts_B >> 16).astype(jnp.uint32).sum())
    if axes:
        low, high = halves(lax.psum(low, axes), lax.psum(high, axes))
    return jnp.where(high < 0x7FFF, (high * 65536 + low).astype(jnp.int32), _MOST)


def _first(equal: tuple[jax.Array, ...], wide_rows: jax.Array, allowed: jax.Array,
           axes: tuple[str, ...]) -> tuple[jax.Array, ...]:
    """The first `allowed` True entries in the order (row, feature) over all shards, of tables as `kept_over_batch` takes them.

    Sums saturate at `allowed`.
    """
    def add(a, b):
        return jnp.minimum(a, allowed - b) + b  # min(a + b, allowed) for a, b <= allowed, without overflow

    def before(counts, axis):
        inclusive = lax.associative_scan(add, jnp.minimum(counts, allowed), axis=axis)
        return lax.slice_in_dim(jnp.concatenate([jnp.zeros_like(lax.slice_in_dim(inclusive, 0, 1, axis=axis)), inclusive], axis),
                                0, counts.shape[axis], axis=axis), inclusive

    in_row = [jnp.cumsum(table, axis=1, dtype=jnp.int32) for table in equal]
    n_row = in_row[0][:, -1]
    for wide in in_row[1:]:
        n_row = n_row.at[wide_rows].add(wide[:, -1])
    whole_row, lower_shards, earlier = n_row, jnp.zeros_like(n_row), jnp.zeros_like(allowed)
    if axes:
        per_shard = lax.all_gather(n_row, "dict", axis=1)
        exclusive, inclusive = before(per_shard, 1)
        whole_row = inclusive[:, -1]
        mine = jnp.arange(per_shard.shape[1]) == lax.axis_index("dict")
        lower_shards = jnp.where(mine, exclusive, 0).sum(1)
    rows_before, rows_through = before(whole_row, 0)
    if axes:
        exclusive, _ = before(lax.all_gather(rows_through[-1], "data"), 0)
        earlier = jnp.where(jnp.arange(exclusive.shape[0]) == lax.axis_index("data"), exclusive, 0).sum()
    left = allowed - add(add(rows_before, lower_shards), earlier)
    left = (left, left[wide_rows])
    return tuple(table & (n <= left[i][:, None]) for i, (table, n) in enumerate(zip(equal, in_row, strict=True)))
