"""Exact top-k over a dictionary that is split across devices."""

import jax
import jax.numpy as jnp
from jax import lax
from scipy.stats import binom

from saejax import sharding

OVERFLOW = 1e-3  # share of the batches of evenly spread winners in which some row has more of them on a shard than are sent


def topk_mask(pre_BF: jax.Array, k: int) -> jax.Array:
    """Boolean mask of the k largest pre-activations of each row; exactly k are True, ties go to the lower feature index.

    pre_BF: float32 [B, F], rows split over `data`, features over `dict`. Exact for any distribution of the winners over the
    shards. Communication: one all-gather along `dict` of `sent` candidate *values* per row and shard, and one all-reduce of a
    number; no array of width F moves or is sorted. The gradient is not defined (a mask is piecewise constant): pass
    stop_gradient.
    """
    if not sharding.mesh_is_set():
        return _mask_local(pre_BF, k, 1)
    rows_features = sharding.spec("rows", "features")
    return jax.shard_map(lambda pre_local: _mask_local(pre_local, k, lax.axis_size("dict")), in_specs=rows_features,
                         out_specs=rows_features, check_vma=False)(pre_BF)  # it knows mesh axes only, not that of `any_member`


def sent(k: int, rows: int, shards: int, features: int) -> int:
    """How many candidates of a row a shard of so many features sends: at most min(k, features).

    Winners that are spread evenly are Binomial(k, 1 / shards) on each: so many that the `rows` of a batch have no more anywhere,
    but for one batch in 1 / OVERFLOW.
    """
    return min(k, features, max(-(-k // shards), int(binom.isf(OVERFLOW / (rows * shards), k, 1 / shards))))


def kept_per_row(values: jax.Array, k: int, shards: int) -> jax.Array:
    """Which of this shard's min(k, F_local) largest values of each row, as `lax.top_k` returns them, are among the k of all
    shards. Call it inside `shard_map` where there are several.
    """
    if shards == 1:
        return jnp.ones_like(values, bool)
    values = lax.optimization_barrier(values)  # a slice of what top_k returns makes it slow on CPU
    rows = len(values) * lax.axis_size("data")
    n = sent(k, rows, shards, values.shape[1])
    threshold, kept = _kept(values[:, :n], k)
    if n == values.shape[1]:
        return kept
    # Short: the next one would be among the k, or in place of an equal one of a later shard.
    short = (values[:, n:n + 1] >= threshold) & (values[:, n:n + 1] > -jnp.inf)
    short = lax.pmax(short.any().astype(jnp.int32), ("data", "dict")) > 0
    return lax.cond(sharding.any_member(short), lambda: _kept(values, k)[1],
                    lambda: jnp.pad(kept, ((0, 0), (0, values.shape[1] - n))))


def _mask_local(pre_local: jax.Array, k: int, shards: int) -> jax.Array:
    # top_k is fast on CPU only for float32 and only when its output is not sliced in the same program: hence the
    # reductions (min, max over masked entries) where an index would read more easily.
    values, index = lax.top_k(pre_local, min(k, pre_local.shape[1]))
    kept = kept_per_row(values, k, shards)
    least = jnp.where(kept, values, jnp.inf).min(-1, keepdims=True)
    last_equal = jnp.where(kept & (values == least), index, -1).max(-1, keepdims=True)
    feature = lax.broadcasted_iota(jnp.int32, pre_local.shape, 1)
    return (pre_local > least) | ((pre_local == least) & (feature <= last_equal))


def _kept(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k-th largest value of each row over all shards, and which of this shard's candidates are among the k.

    values: this shard's candidates [B, K], sorted downwards, equal ones by feature index.
    """
    gathered = lax.all_gather(values, "dict", axis=1)
    threshold = lax.top_k(gathered.reshape(values.shape[0], -1), k)[0].min(-1, keepdims=True)
    n_greater = (gathered > threshold[:, None]).sum((1, 2))
    n_equal = (gathered == threshold[:, None]).sum(2)
    lower_shards = jnp.arange(n_equal.shape[1]) < lax.axis_index("dict")
    allowed = k - n_greater - jnp.where(lower_shards, n_equal, 0).sum(1)
    rank = jnp.arange(values.shape[1]) - (values > threshold).sum(1, keepdims=True)
    return threshold, (values > threshold) | ((values == threshold) & (rank < allowed[:, None]))
