"""Exact top-k, of rows in one place and over a dictionary that is split across devices."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from scipy.stats import binom

from saejax.base import sharding

OVERFLOW = 1e-3  # share of the batches of evenly spread winners in which some row has more of them on a shard than are sent
# Sizes of the groups that `largest` takes maxima of, by platform. On a TPU `lax.top_k` moves less memory.
GROUPS = {"cpu": (64, 8), "cuda": (128, 16), "rocm": (128, 16)}


@struct.dataclass
class UpTo:
    """How many to keep: `most`, or where that changes while the program runs `now` of them, an int32 scalar of 1 to `most`."""

    most: int = struct.field(pytree_node=False)
    now: jax.Array | None = None

    @classmethod
    def of(cls, k: "int | UpTo") -> "UpTo":
        return k if isinstance(k, UpTo) else cls(k)

    def __mul__(self, n: int) -> "UpTo":
        return UpTo(n * self.most, None if self.now is None else n * self.now)

    @property
    def count(self) -> int | jax.Array:
        return self.most if self.now is None else self.now

    def first(self, n: int) -> jax.Array:
        """Which of n in falling order, at most `most`, are kept."""
        return jnp.ones(n, bool) if self.now is None else jnp.arange(n) < self.now


def largest(values_BF: jax.Array, k: int, sizes: tuple[int, ...] | None = None) -> tuple[jax.Array, jax.Array]:
    """(values [B, k], index [B, k]) of the k largest of each row in falling order, equal ones by rising index: `lax.top_k`.

    float32; -0 counts as 0 and NaN as infinite, which is what it comes out as (on CPUs as the first value of its row, wherever it
    is); a row of fewer than k values gives all of them. Found by levels, as nothing sorts whole rows well: the k largest lie in
    the k groups of features with the largest maxima (of groups with equal ones in the first), these in their order again by
    smaller groups, then `lax.top_k` of what is left. sizes: of the groups; None: those of the platform (`GROUPS`).
    """
    k = min(k, values_BF.shape[1])
    if sizes is not None:
        return _by_levels(_comparable(values_BF), k, sizes)
    ways = {name: (lambda values_BF, sizes=sizes: _by_levels(_comparable(values_BF), k, sizes)) for name, sizes in GROUPS.items()}
    return lax.platform_dependent(values_BF, **ways | {"cpu": lambda values_BF: _on_cpu(values_BF, k)},
                                  default=lambda values_BF: _by_levels(_comparable(values_BF), k, ()))


def _on_cpu(values_BF: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """CPUs would write all values once more to make them comparable, and maxima pass over NaN: a sum looks for it."""
    values_Bk, index_Bk = _by_levels(values_BF, k, GROUPS["cpu"])
    lost_B1 = jnp.isnan(values_BF.sum(1, keepdims=True))
    return jnp.where(lost_B1 & (jnp.arange(k) == 0), jnp.inf, values_Bk), index_Bk


def _comparable(values: jax.Array) -> jax.Array:
    return jnp.where(values == 0, 0.0, jnp.where(jnp.isnan(values), jnp.inf, values))


def _by_levels(values_BW: jax.Array, k: int, sizes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    (B, W) = values_BW.shape
    for size in sizes:
        n = -(-W // size)
        if 2 * (n + k * size) <= W:  # maxima and chosen groups are at most half as many
            maxima_Bn = jnp.pad(values_BW, ((0, 0), (0, n * size - W)), constant_values=-jnp.inf).reshape(B, n, size).max(-1)
            groups_Bk = jnp.sort(_by_levels(maxima_Bn, k, sizes)[1], axis=1)
            values, index = _members(values_BW, groups_Bk, size)
            found, place_Bk = _by_levels(values, k, sizes)
            return found, jnp.take_along_axis(index, place_Bk, axis=1)
    values_Bk, index_Bk = lax.top_k(_comparable(values_BW), k)
    # CPUs sort whole rows where a slice of the values is read. A barrier for both together XLA does not compile.
    return lax.optimization_barrier(values_Bk), index_Bk


def _members(values_BW: jax.Array, groups_Bk: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(values, index) [B, k x size] of what some groups of each row consist of; -inf where the last one has fewer."""
    first_Bk = groups_Bk * size
    start_Bk = jnp.minimum(first_Bk, values_BW.shape[1] - size)  # slices lie within the row
    row_Bk = lax.broadcasted_iota(jnp.int32, groups_Bk.shape, 0)
    places = lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    values = lax.gather(values_BW, jnp.stack([row_Bk, start_Bk], -1), places, (1, size),
                        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    index = start_Bk[..., None] + jnp.arange(size)
    values = jnp.where(index >= first_Bk[..., None], values, -jnp.inf)
    return values.reshape(len(values_BW), -1), index.reshape(len(values_BW), -1)


def topk_mask(pre_BF: jax.Array, k: int | UpTo) -> jax.Array:
    """Boolean mask of the k largest pre-activations of each row; exactly k are True, ties go to the lower feature index.

    pre_BF: float32 [B, F], rows split over `data`, features over `dict`. Exact for any distribution of the winners over the
    shards; what is NaN is True, too, so that it does not get lost. Communication along `dict`: see `kept_per_row`; nothing
    of width F moves or is sorted. The gradient is not defined (a mask is piecewise constant): pass stop_gradient.
    """
    rows_features, k = sharding.spec("rows", "features"), UpTo.of(k)
    return sharding.on_shards(_mask_local, (rows_features, sharding.spec()), rows_features)(pre_BF, k)


def sent(k: int, rows: int, shards: int, features: int) -> int:
    """How many candidates of a row a shard of so many features sends: at most min(k, features).

    Winners that are spread evenly are Binomial(k, 1 / shards) on each: so many that the `rows` of a batch have no more anywhere,
    but for one batch in 1 / OVERFLOW.
    """
    return min(k, features, max(-(-k // shards), int(binom.isf(OVERFLOW / (rows * shards), k, 1 / shards))))


def kept_per_row(values: jax.Array, k: UpTo, shards: int) -> jax.Array:
    """Which of this shard's min(k.most, F_local) largest values of each row, as `largest` returns them, are among the k of all
    shards. Call it inside `shard_map` where there are several.

    Communication along `dict`: `sent` candidate values of each row go to where the row rests and are merged there, its threshold
    and how many ties each shard keeps come back: one all-to-all of [B, sent], one all-gather and one all-to-all of [B].
    """
    if shards == 1:
        return jnp.broadcast_to(k.first(values.shape[1]), values.shape)
    rows = len(values) * lax.axis_size("data")
    n = sent(k.most, rows, shards, values.shape[1])
    threshold, kept = _kept(values[:, :n], k, shards)
    if n == values.shape[1]:
        return kept
    # Short: the next one would be among the k, or in place of an equal one of a later shard.
    short = (values[:, n:n + 1] >= threshold) & (values[:, n:n + 1] > -jnp.inf)
    short = lax.pmax(short.any().astype(jnp.int32), ("data", "dict")) > 0
    return lax.cond(short, lambda: _kept(values, k, shards)[1],
                    lambda: jnp.pad(kept, ((0, 0), (0, values.shape[1] - n))))


def _mask_local(pre_local: jax.Array, k: UpTo, shards: int) -> jax.Array:
    # Reductions over masked entries where an index would read more easily: nothing is gathered, nothing sliced.
    values, index = largest(pre_local, k.most)
    kept = kept_per_row(values, k, shards)
    least = jnp.where(kept, values, jnp.inf).min(-1, keepdims=True)
    last_equal = jnp.where(kept & (values == least), index, -1).max(-1, keepdims=True)
    feature = lax.broadcasted_iota(jnp.int32, pre_local.shape, 1)
    compared = jnp.where(jnp.isnan(pre_local), jnp.inf, pre_local)  # -0 and 0 are equal as they are
    return (compared > least) | ((compared == least) & (feature <= last_equal)) | jnp.isnan(pre_local)


def _kept(values: jax.Array, k: UpTo, shards: int) -> tuple[jax.Array, jax.Array]:
    """The k-th largest value of each row over all shards [B, 1], and which of this shard's candidates are among the k.

    values: this shard's candidates [B, C], sorted downwards, equal ones by feature index.
    """
    B, C = values.shape
    parts = jnp.pad(values, ((0, -B % shards), (0, 0)), constant_values=-jnp.inf).reshape(shards, -1, C)
    candidates = lax.all_to_all(parts, "dict", 0, 0)  # [shards, rows that rest here, C]
    merged = jnp.swapaxes(candidates, 0, 1).reshape(-1, shards * C)
    best = largest(merged, k.most)[0]
    least = jnp.where(k.first(best.shape[1]), best, jnp.inf).min(-1)
    n_greater = (candidates > least[:, None]).sum((0, 2), dtype=jnp.int32)
    n_equal = (candidates == least[:, None]).sum(2, dtype=jnp.int32)
    ties = k.count - n_greater - (jnp.cumsum(n_equal, axis=0) - n_equal)  # that are left for each shard
    threshold = lax.all_gather(least, "dict", tiled=True)[:B, None]
    allowed = lax.all_to_all(ties, "dict", 0, 0).reshape(-1)[:B, None]
    rank = jnp.arange(C) - (values > threshold).sum(1, keepdims=True)
    return threshold, (values > threshold) | ((values == threshold) & (rank < allowed))
