"""The sparse path of kinds with k: a batch's kept activations as (value, feature, row), so that decoding and all gradients cost
O(k) per row.

What stays dense is the encoder's product, O(F) per row, computed tile by tile: no array of B x F is in memory. Each device lists
the pairs of its rows with features of its shard, one row after the other, and works on B of them at a time until none is left.
Communication: that of the dense path (candidate values or counts; reconstructions are scattered, their gradients gathered).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax import sharding
from saejax.config import SAEOptions
from saejax.sae.model import bias
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.products import product
from saejax.sae.select import UpTo, kept_per_row, largest
from saejax.sae.select_batch import (
    any_device,
    border,
    candidates,
    check_counts,
    kept_candidates,
    kept_in_all,
    ordered,
    ties_left,
    total,
)

# Pre-activations in memory at once: 64 MB on CPUs, elsewhere 256 MB and those of so many rows: W_enc is read once for a tile.
TILE, TILE_ELSEWHERE, ROWS_AT_ONCE = 2**24, 2**26, 1024
WORTH = {"cpu": 64}  # features for each pair of a row from which on this path is the faster one
WORTH_ELSEWHERE = 800


@struct.dataclass
class Pairs:
    """values_P: activations, float32, positive (or not finite, which must not get lost), then 0. index_P: features, counted
    within the shard; row_P: rows, counted within the device's (int32). count: how many of a device's P are pairs, [devices].
    """

    values_P: jax.Array
    index_P: jax.Array
    row_P: jax.Array
    count: jax.Array


def tile_size(features: int, platform: str) -> int:
    """Pre-activations that are in memory at once, where a shard has so many features: of one row at least."""
    return max(TILE, features) if platform == "cpu" else max(TILE_ELSEWHERE, ROWS_AT_ONCE * features)


def pays(spec: SAESpec | SAEOptions, platform: str | None = None) -> bool:
    """Whether this path is the faster one: decided by features per kept feature, of the whole dictionary, as a shard of 1/n of it
    has 1/n of the pairs, too; and by the hardware (that which is here, unless a platform is named).
    """
    return spec.d_sae >= WORTH.get(platform or jax.default_backend(), WORTH_ELSEWHERE) * spec.k


_P, _FD, _F = sharding.spec("rows_at_rest"), sharding.spec("features", None), sharding.spec("features")
_BD, _GBD = sharding.spec("rows", None), sharding.spec(None, "rows_at_rest", None)
_PAIRS = Pairs(_P, _P, _P, _P)


def selected(spec: SAESpec, params: SAEParams, read_BD: jax.Array, k: int | UpTo, *, over_batch: bool = False,
             counted: bool = False, allowed_F: jax.Array | None = None) -> tuple[Pairs, jax.Array]:
    """(`activations.topk` of the pre-activations as pairs, whether pairs are missing). over_batch: `activations.batchtopk`; pairs
    are missing where too many rows keep many times what they do on average, or one device's rows many more than others'; never
    with `counted`, which costs ten times as much, but no more memory. allowed_F: the features that may be kept. read_BD: rows as
    `model.read` gives them. No gradient flows through the values (see `attached`).
    """
    allowed_F = jnp.ones_like(params.b_enc, bool) if allowed_F is None else allowed_F
    k = UpTo.of(k)
    if over_batch:
        check_counts(len(read_BD), k.most)
    select = functools.partial(_select, over_batch=over_batch, counted=counted, dtype=jnp.dtype(spec.compute_dtype))

    def local(*values, shards):
        features = spec.d_sae // shards
        cpu, other = (functools.partial(select, tile=tile_size(features, name), shards=shards) for name in ("cpu", ""))
        return lax.platform_dependent(*values, cpu=cpu, default=other)

    *found, missing = sharding.on_shards(local, (_FD, _F, _F, _BD, sharding.spec()), (*[_P] * 4, sharding.spec()))(
        *map(lax.stop_gradient, (params.W_enc, params.b_enc, allowed_F, read_BD)), k)
    return Pairs(*found), missing


def encode(spec: SAESpec, params: SAEParams, read_BD: jax.Array, k: int, allowed_F: jax.Array) -> Pairs:
    """`selected` pairs of each row, with gradients to all parameters."""
    pairs, _ = selected(spec, params, read_BD, k, allowed_F=allowed_F)
    return pairs.replace(values_P=_attached(jnp.dtype(spec.compute_dtype), params.W_enc, bias(spec, params), read_BD, pairs))


@struct.dataclass
class Rows:
    """Up to C chosen features of every shard. index_C: counted within the shard, in rising order; where there are fewer, its
    number of features. place_F: where in index_C a feature is; C where it is not. count: how many there are, [shards].
    """

    index_C: jax.Array
    place_F: jax.Array
    count: jax.Array


ROWS = Rows(_F, _F, _F)  # where they lie on a mesh


def rows_of(chosen_F: jax.Array, capacity: int) -> Rows:
    """The first `capacity` of the chosen features of each shard. No communication."""
    def local(chosen_F, shards):
        place_F = jnp.cumsum(chosen_F, dtype=jnp.int32) - 1
        index_C = jnp.nonzero(chosen_F, size=capacity, fill_value=len(chosen_F))[0].astype(jnp.int32)
        return index_C, jnp.where(chosen_F, jnp.minimum(place_F, capacity), capacity), jnp.minimum(place_F[-1:] + 1, capacity)

    return Rows(*sharding.on_shards(local, _F, (_F, _F, _F))(chosen_F))


def zeros_for(params: SAEParams, rows: Rows) -> SAEParams:
    """What stands for the parameters of some rows where gradients are taken (see `attached`); the shared parameters are there."""
    def zeros(like: jax.Array) -> jax.Array:
        where = jax.typeof(like).sharding.spec if sharding.mesh_is_set() else None
        return jnp.zeros((len(rows.index_C), *like.shape[1:]), like.dtype, out_sharding=where)

    return params.replace(W_enc=zeros(params.W_enc), b_enc=zeros(params.b_enc), W_dec=zeros(params.W_dec))


def attached(spec: SAESpec, pairs: Pairs, read_BD: jax.Array, learned: SAEParams,
             rows: Rows) -> tuple[Pairs, jax.Array]:
    """`selected` pairs whose values have gradients with respect to `learned`, the parameters of `rows`: these are as many as
    there are rows, however large the dictionary is. And each pair's place among the rows, for `decode`.

    The values of `learned` are not read. No gradient flows to b_dec: it is -(gradient of b_enc) W_enc.
    """
    place_P = sharding.on_shards(lambda index_P, place_F, shards: place_F[index_P], (_P, _F), _P)(pairs.index_P, rows.place_F)
    values_P = _attached(jnp.dtype(spec.compute_dtype), learned.W_enc, learned.b_enc, read_BD, pairs.replace(index_P=place_P))
    return pairs.replace(values_P=values_P), place_P


def decode_groups(spec: SAESpec, params: SAEParams, pairs: Pairs, rows: int, ends: tuple[int, ...],
                  learned: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
    """recon[g] = that of the pairs of features below ends[g], + b_dec, float32 [G, rows, d_out], rows at
    rest. Communication along `dict`: one reduce-scatter of it in the dtype of computation, for the gradient one all-gather.

    learned: what the gradient of W_dec goes to, and each pair's place in it (`attached`); none: W_dec itself.
    """
    learned = learned or (params.W_dec, pairs.index_P)
    decoded = _decoded(jnp.dtype(spec.compute_dtype), rows, ends, *learned, lax.stop_gradient(params.W_dec), pairs)
    return jnp.cumsum(decoded, axis=0) + params.b_dec


def fired(spec: SAESpec, pairs: Pairs) -> jax.Array:
    """Which features have a positive activation in the batch, bool [F]."""
    def local(values_P, index_P, shards):
        found_F = jnp.zeros(spec.d_sae // shards, jnp.int32).at[index_P].max((values_P > 0).astype(jnp.int32))
        return sharding.over(lax.pmax, found_F, "data") > 0

    return sharding.on_shards(local, (_P, _P), _F)(lax.stop_gradient(pairs.values_P), pairs.index_P)


@struct.dataclass
class _Encoder:
    """What a device needs for the pre-activations of its shard, `tile` of them in memory at once (but one row at least)."""

    W_enc: jax.Array
    b_enc: jax.Array
    allowed_F: jax.Array
    dtype: Any = struct.field(pytree_node=False)
    tile: int = struct.field(pytree_node=False)

    def tiles(self, *rows: jax.Array) -> tuple[jax.Array, ...]:
        """Arrays of rows in tiles of equal size, [n, rows, ...]; the last one is filled up with zeros."""
        B = len(rows[0])
        n = -(-B // max(1, min(B, self.tile // len(self.b_enc))))
        size = -(-B // n)
        return tuple(jnp.pad(value, ((0, n * size - B), *[(0, 0)] * (value.ndim - 1))).reshape(n, size, *value.shape[1:])
                     for value in rows)

    def pre(self, x_TD: jax.Array) -> jax.Array:
        return jnp.where(self.allowed_F, product("td,fd->tf", x_TD, self.W_enc, self.dtype) + self.b_enc, -jnp.inf)

    def over_tiles(self, of: Callable, x_BD: jax.Array):
        """of(pre-activations of a tile) of all rows."""
        found = lax.map(lambda x_TD: of(self.pre(x_TD)), *self.tiles(x_BD))
        return jax.tree.map(lambda value: value.reshape(-1, *value.shape[2:])[:len(x_BD)], found)

    def largest(self, x_BD: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        return self.over_tiles(lambda pre_TF: largest(pre_TF, n), x_BD)


def _select(W_enc, b_enc, allowed_F, x_BD, k: UpTo, *, over_batch: bool, counted: bool, dtype, tile: int, shards: int):
    encoder, B = _Encoder(W_enc.astype(dtype), b_enc, allowed_F, dtype, tile), len(x_BD)
    if counted:
        return *_counted(encoder, x_BD, k), jnp.bool_(False)
    if not over_batch:
        values, index = encoder.largest(x_BD, k.most)
        return *_listed((values,), (index,), (kept_per_row(values, k, shards),), None, B * k.most)[:4], jnp.bool_(False)
    found = candidates(encoder.largest, x_BD, k.most, shards, len(b_enc))
    kept, short = kept_candidates(found, k.count, len(b_enc))
    room = min(B * -(-k.most * 5 // 4), kept_in_all(B, k.most))
    *pairs, lost = _listed(found.values, found.index, kept, found.wide_rows, room)
    return *pairs, short | any_device(lost)


def _counted(encoder: _Encoder, x_BD: jax.Array, k: UpTo) -> tuple[jax.Array, ...]:
    """The pairs that are kept over the batch, without candidates: nine passes over all pre-activations of the device count them,
    a tenth lists them, tile by tile.
    """
    B, F, keep = len(x_BD), len(encoder.b_enc), kept_in_all(len(x_BD), k.count)
    at = border(lambda parts: total(encoder.over_tiles(
        lambda pre_TF: (ordered(pre_TF)[:, None] >= parts[:, None]).sum(2, dtype=jnp.int32), x_BD).T), keep)
    n_above_B, n_equal_B = encoder.over_tiles(lambda pre_TF: tuple(
        found.sum(1, dtype=jnp.int32) for found in (ordered(pre_TF) > at.low, ordered(pre_TF) == at.low)), x_BD)
    left_B = jnp.clip(ties_left(n_equal_B, at, keep), 0, n_equal_B)
    count_B = n_above_B + left_B
    first_B, capacity = jnp.cumsum(count_B) - count_B, min(B * F, kept_in_all(B, k.most))

    def listed(pairs, tile):
        x_TD, count_T, left_T, first_T, row_T = tile
        pre_TF = encoder.pre(x_TD)
        bits, n_TF = ordered(pre_TF), functools.partial(jnp.cumsum, axis=1, dtype=jnp.int32)
        equal = bits == at.low
        kept = (bits > at.low) | (equal & (n_TF(equal) <= left_T[:, None]))
        kept &= n_TF(kept) <= count_T[:, None]  # should another pass have rounded otherwise
        slot = jnp.where(kept, first_T[:, None] + n_TF(kept) - 1, capacity)
        feature_TF, row_TF = lax.broadcasted_iota(jnp.int32, slot.shape, 1), jnp.broadcast_to(row_T[:, None], slot.shape)
        values = jax.nn.relu(pre_TF), feature_TF, row_TF
        return tuple(old.at[slot].set(new, mode="drop") for old, new in zip(pairs, values, strict=True)), None

    none = jnp.zeros(capacity, jnp.float32), *[jnp.zeros(capacity, jnp.int32)] * 2
    pairs, _ = lax.scan(listed, none, encoder.tiles(x_BD, count_B, left_B, first_B, jnp.arange(B, dtype=jnp.int32)))
    return *pairs, count_B.sum()[None]


def _listed(values, index, kept, wide_rows: jax.Array | None, capacity: int):
    """(values_P, index_P, row_P, count, whether there are more than `capacity`) of what is kept of candidates in falling order:
    the first of each row of the tables; the second one's are those of `wide_rows`, of which the first keeps none.
    """
    B, C = kept[0].shape
    # A kept candidate that is negative gives no activation; those come last.
    n_rows = [(mask & ~(values <= 0)).sum(1, dtype=jnp.int32) for mask, values in zip(kept, values, strict=True)]
    count_B, base_B = n_rows[0], jnp.arange(B) * C
    if len(kept) == 2:
        count_B = count_B.at[wide_rows].set(n_rows[1])
        base_B = base_B.at[wide_rows].set(B * C + jnp.arange(len(wide_rows)) * kept[1].shape[1])
    ends_B = jnp.cumsum(count_B)
    slot_P = jnp.arange(capacity)
    row_P = jnp.minimum(jnp.searchsorted(ends_B, slot_P, side="right", method="scan_unrolled"), B - 1).astype(jnp.int32)
    place_P = base_B[row_P] + slot_P - (ends_B - count_B)[row_P]
    values, index = (jnp.concatenate([table.reshape(-1) for table in tables]) for tables in (values, index))
    here_P = slot_P < ends_B[-1]
    values_P = jnp.where(here_P, jax.nn.relu(values.at[place_P].get(mode="clip")), 0.0)
    index_P = jnp.where(here_P, index.at[place_P].get(mode="clip"), 0)
    return values_P, index_P, row_P, jnp.minimum(ends_B[-1:], capacity), ends_B[-1] > capacity


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(dtype, W_enc, bias_F, read_BD, pairs: Pairs):
    """The values, as functions of W_enc and bias: values[p] = W_enc[index[p]] . read[row[p]] + bias[index[p]]."""
    return pairs.values_P


def _attached_backward(dtype, saved, gradient_P):
    read_BD, bias_F, pairs = saved

    def local(gradient_P, pairs, read_BD, bias_F, shards):
        gradient_P = jnp.where(pairs.values_P > 0, gradient_P, 0.0)
        to_W = _added(len(bias_F), pairs.index_P, _rounded(gradient_P, dtype), read_BD, pairs.row_P, pairs, len(read_BD))
        to_bias = jnp.zeros_like(bias_F).at[pairs.index_P].add(gradient_P)
        return tuple(sharding.over(lax.psum, value, "data") for value in (to_W, to_bias))

    to_W, to_bias = sharding.on_shards(local, (_P, _PAIRS, _BD, _F), (_FD, _F))(gradient_P, pairs, read_BD, bias_F)
    return to_W, to_bias, jnp.zeros_like(read_BD), None


_attached.defvjp(lambda dtype, W_enc, bias_F, read_BD, pairs: (pairs.values_P, (read_BD, bias_F, pairs)), _attached_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decoded(dtype, rows, ends, learned, place_P, W_dec, pairs: Pairs):
    """What the pairs of each group's features add up to, [G, rows, d_out]; a function of `learned`, whose row place_P[p] is
    W_dec[index_P[p]].
    """
    def local(W_dec, pairs, shards):
        B = rows // (lax.axis_size("data") if sharding.mesh_is_set() else 1)
        recon_RD = _added(len(ends) * B, _group_rows(ends, pairs, B, len(W_dec)), _rounded(pairs.values_P, dtype), W_dec,
                          pairs.index_P, pairs, B, dtype)
        recon_GBD = recon_RD.reshape(len(ends), B, -1)
        return sharding.scattered(recon_GBD, dtype, 1) if shards > 1 else recon_GBD

    return sharding.on_shards(local, (_FD, _PAIRS), _GBD)(W_dec, pairs)


def _decoded_backward(dtype, rows, ends, saved, gradient_GBD):
    def local(learned, place_P, W_dec, pairs, gradient_GBD, shards):
        if shards > 1:
            gradient_GBD = lax.all_gather(gradient_GBD.astype(dtype), "dict", axis=1, tiled=True)
        G, B, D = gradient_GBD.shape
        gradient_RD, row_P = _rounded(gradient_GBD.reshape(G * B, D), dtype), _group_rows(ends, pairs, B, len(W_dec))
        to_W = _added(len(learned), place_P, _rounded(pairs.values_P, dtype), gradient_RD, row_P, pairs, B)

        turns, of = _turns(pairs, B)

        def multiply(i, to_TB):
            return to_TB.at[i].set((gradient_RD[of(row_P, i)] * _rounded(W_dec[of(pairs.index_P, i)], dtype)).sum(1))

        to_TB = lax.fori_loop(0, turns, multiply, jnp.zeros_like(pairs.values_P).reshape(-1, B))
        return sharding.over(lax.psum, to_W, "data"), to_TB.reshape(-1)

    to_W, to_values = sharding.on_shards(local, (_FD, _P, _FD, _PAIRS, _GBD), (_FD, _P))(*saved, gradient_GBD)
    return to_W, None, None, Pairs(to_values, None, None, None)


_decoded.defvjp(lambda dtype, rows, ends, *values: (_decoded(dtype, rows, ends, *values), values), _decoded_backward)


def _group_rows(ends: tuple[int, ...], pairs: Pairs, rows: int, features: int) -> jax.Array:
    """The row of [G x rows] that each pair adds to: group of its feature times `rows`, plus its row."""
    if len(ends) == 1:
        return pairs.row_P
    start = lax.axis_index("dict") * features if sharding.mesh_is_set() else 0
    group_P = (pairs.index_P[:, None] + start >= jnp.asarray(ends[:-1])).sum(-1)
    return group_P * rows + pairs.row_P


def _rounded(value: jax.Array, dtype) -> jax.Array:
    """What a product in `dtype` with float32 sums reads."""
    return value.astype(dtype).astype(jnp.float32)


def _added(n: int, to_P: jax.Array, scale_P: jax.Array, rows_RD: jax.Array, from_P: jax.Array, pairs: Pairs, size: int,
           dtype=jnp.float32) -> jax.Array:
    """out[to[p]] = sum over pairs of scale[p] rows[from[p]], [n, D]; `size` pairs at a time."""
    turns, of = _turns(pairs, size)

    def add(i, out_ND):
        return out_ND.at[of(to_P, i)].add(of(scale_P, i)[:, None] * _rounded(rows_RD[of(from_P, i)], dtype))

    return lax.fori_loop(0, turns, add, jnp.zeros((n, rows_RD.shape[1]), jnp.float32))


def _turns(pairs: Pairs, size: int) -> tuple[jax.Array, Callable]:
    """How often to take `size` pairs until all have been taken, and what of a value_P is taken at a turn."""
    return -(-pairs.count[0] // size), lambda value_P, i: value_P.reshape(-1, size)[i]
