"""The sparse path of kinds with k: a batch's kept activations as a pair list, so that decoding and all gradients cost O(k) per
row.

What stays dense is the encoder's product, O(F) per row, computed tile by tile: no array of B x F is in memory. Each device lists
the pairs of its rows with features of its shard (`saejax.sae.pairs`); here they meet the mesh. Communication: that of the dense
path (candidate values or counts; reconstructions are scattered, their gradients gathered).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.config import SAEOptions
from saejax.sae import pairs as lists
from saejax.sae.pairs import Backward, Pairs
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.products import product
from saejax.sae.select import UpTo, kept_per_row, largest
from saejax.sae.select_batch import border, candidates, check_counts, kept_candidates, kept_in_all, ordered, ties_left, total

# Pre-activations in memory at once: 64 MB on CPUs, elsewhere 256 MB and those of so many rows: W_enc is read once for a tile.
TILE, TILE_ELSEWHERE, ROWS_AT_ONCE = 2**24, 2**26, 1024
WORTH = {"cpu": 32}  # features for each pair of a row from which on this path is the faster one
WORTH_ELSEWHERE = 800


def tile_size(features: int, platform: str) -> int:
    """Pre-activations that are in memory at once, where a shard has so many features: of one row at least."""
    return max(TILE, features) if platform == "cpu" else max(TILE_ELSEWHERE, ROWS_AT_ONCE * features)


def pays(spec: SAESpec | SAEOptions, platform: str | None = None) -> bool:
    """Whether this path is the faster one: decided by features per kept feature, of the whole dictionary, as a shard of 1/n of it
    has 1/n of the pairs, too; and by the hardware (that which is here, unless a platform is named).
    """
    return spec.d_sae >= WORTH.get(platform or jax.default_backend(), WORTH_ELSEWHERE) * spec.k


_P, _FD, _F = sharding.spec("rows_at_rest"), sharding.spec("features", None), sharding.spec("features")
_BD, _GBD, _GBD_REST = sharding.spec("rows", None), sharding.spec(None, "rows", None), sharding.spec(None, "rows_at_rest", None)


def selected(spec: SAESpec, params: SAEParams, read_BD: jax.Array, k: int | UpTo, *, over_batch: bool = False,
             allowed_F: jax.Array | None = None) -> Pairs:
    """`activations.topk` of the pre-activations as pairs. over_batch: `activations.batchtopk`. allowed_F: the features that may
    be kept. read_BD: rows as `model.read` gives them. No gradient flows through the values.
    """
    allowed_F = jnp.ones_like(params.b_enc, bool) if allowed_F is None else allowed_F
    k = UpTo.of(k)
    if over_batch:
        check_counts(len(read_BD), k.most)
    select = functools.partial(_select, over_batch=over_batch, dtype=jnp.dtype(spec.compute_dtype))

    def local(*values, shards):
        features = spec.d_sae // shards
        cpu, other = (functools.partial(select, tile=tile_size(features, name), shards=shards) for name in ("cpu", ""))
        return lax.platform_dependent(*values, cpu=cpu, default=other)

    rows = len(read_BD) // jax.sharding.get_abstract_mesh().shape.get("data", 1)
    placed = Pairs(_P, _P, _P, _P, rows, not over_batch and sharding.shards() == 1)
    return sharding.on_shards(local, (_FD, _F, _F, _BD, sharding.spec()), placed)(
        *map(lax.stop_gradient, (params.W_enc, params.b_enc, allowed_F, read_BD)), k)


@struct.dataclass
class Rows:
    """Up to C chosen features of every shard. index_C: counted within the shard, in rising order; where there are fewer, its
    number of features. place_F: where in index_C a feature is; C where it is not. count: how many there are, [shards].
    """

    index_C: jax.Array
    place_F: jax.Array
    count: jax.Array


ROWS = Rows(_F, _F, _F)  # where they lie on a mesh


def rows_of(chosen_F: jax.Array, capacity: int, turn: jax.Array | int = 0) -> Rows:
    """Of the chosen features of each shard `capacity`, after `turn` times as many. No communication."""
    def local(chosen_F, turn, shards):
        F = len(chosen_F)
        place_F = jnp.cumsum(chosen_F, dtype=jnp.int32) - 1 - turn * capacity
        here_F = chosen_F & (place_F >= 0) & (place_F < capacity)
        index_C = jnp.nonzero(here_F, size=capacity, fill_value=F)[0].astype(jnp.int32)
        return index_C, jnp.where(here_F, place_F, capacity), jnp.clip(place_F[-1:] + 1, 0, capacity)

    return Rows(*sharding.on_shards(local, (_F, sharding.spec()), (_F, _F, _F))(chosen_F, jnp.int32(turn)))


def every_row(spec: SAESpec) -> Rows:
    """All features of each shard."""
    def local(shards):
        F = spec.d_sae // shards
        return jnp.arange(F, dtype=jnp.int32), jnp.arange(F, dtype=jnp.int32), jnp.full(1, F, jnp.int32)

    return Rows(*sharding.on_shards(local, (), (_F, _F, _F))())


def decoded(spec: SAESpec, W_dec: jax.Array, pairs: Pairs, ends: tuple[int, ...]) -> jax.Array:
    """`pairs.decoded` of the batch, float32 [G, B, d_out], rows at rest. Communication along `dict`: one reduce-scatter of it in
    the dtype of computation.
    """
    dtype = jnp.dtype(spec.compute_dtype)

    def local(W_dec, pairs, shards):
        parts_GBD = lists.decoded(dtype, W_dec, pairs, ends)
        return sharding.scattered(parts_GBD, dtype, 1) if shards > 1 else parts_GBD

    return sharding.on_shards(local, (_FD, placement(pairs)), _GBD_REST)(W_dec, pairs)


def backward(spec: SAESpec, W_dec: jax.Array, pairs: Pairs, ends: tuple[int, ...], read_BD: jax.Array,
             gradient_GBD: jax.Array) -> Backward:
    """What the gradients of the weights are summed from. read_BD: what the encoder read; gradient_GBD: of `decoded`, at rest.

    Communication along `dict`: one all-gather of the gradient in the dtype of computation.
    """
    dtype, gradient_GBD = jnp.dtype(spec.compute_dtype), gradient_GBD.astype(spec.compute_dtype)
    if sharding.mesh_is_set():
        gradient_GBD = jax.sharding.reshard(gradient_GBD, _GBD)

    def local(W_dec, gradient_GBD, pairs, shards):
        return lists.slopes(dtype, W_dec, gradient_GBD, pairs, ends)

    slopes_Ln = sharding.on_shards(local, (_FD, _GBD, placement(pairs)), _P)(W_dec, gradient_GBD, pairs)
    return Backward(pairs, slopes_Ln, read_BD, gradient_GBD, dtype, ends)


def fired(spec: SAESpec, pairs: Pairs) -> jax.Array:
    """Which features have a positive activation in the batch, bool [F]."""
    def local(pairs, shards):
        return sharding.over(lax.pmax, lists.fired(pairs, spec.d_sae // shards), "data") > 0

    return sharding.on_shards(local, (placement(pairs),), _F)(pairs)


def weight_gradients(parts: Backward, rows: Rows, at_rest: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of W_enc, b_enc and W_dec of these rows, float32 [C, .], summed over the batch.

    parts: of parts of a batch, each array with a leading axis. at_rest: their rows rest over all devices and are gathered part
    by part. Communication along `data`: one all-reduce of the gradients.
    """
    def local(parts, place_F, index_C, shards):
        def add(sums, part: Backward):
            if at_rest and shards > 1:
                read, gradient = (lax.all_gather(value, "dict", axis=axis, tiled=True)
                                  for value, axis in ((part.read_BD, 0), (part.gradient_GBD, 1)))
                part = part.replace(read_BD=read, gradient_GBD=gradient)
            return part.added(sums, place_F), None

        C, D, D_out = len(index_C), parts.read_BD.shape[-1], parts.gradient_GBD.shape[-1]
        sums = jnp.zeros((C, D), jnp.float32), jnp.zeros(C, jnp.float32), jnp.zeros((C, D_out), jnp.float32)
        if len(parts.slopes_Ln) == 1:
            sums, _ = add(sums, jax.tree.map(lambda value: value[0], parts))
        else:
            sums, _ = lax.scan(add, sums, parts)
        return sharding.over(lax.psum, sums, "data")

    row = "rows_at_rest" if at_rest else "rows"
    line = sharding.spec(None, "rows_at_rest")
    where = parts.replace(pairs=jax.tree.map(lambda _: line, parts.pairs), slopes_Ln=line, read_BD=sharding.spec(None, row, None),
                          gradient_GBD=sharding.spec(None, None, row, None))
    return sharding.on_shards(local, (where, _F, _F), (_FD, _F, _FD))(parts, rows.place_F, rows.index_C)


def placement(pairs: Pairs) -> Pairs:
    return jax.tree.map(lambda _: _P, pairs)


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


def _select(W_enc, b_enc, allowed_F, x_BD, k: UpTo, *, over_batch: bool, dtype, tile: int, shards: int) -> Pairs:
    encoder, B = _Encoder(W_enc.astype(dtype), b_enc, allowed_F, dtype, tile), len(x_BD)
    if not over_batch:
        values, index = encoder.largest(x_BD, k.most)
        kept = kept_per_row(values, k, shards)
        if shards == 1:
            return Pairs.of_rows(jnp.where(kept, jax.nn.relu(values), 0.0), index)
        n = lists.slots(k.most, shards)
        return _listed((values,), (index,), (kept,), None, (n, B * (k.most + n - 1) // n))
    n, keep = lists.slots(k.most, shards), kept_in_all(B, k.most)
    shape = n, B + min(B * len(b_enc), keep) // n
    found = candidates(encoder.largest, x_BD, k.most, shards, len(b_enc))
    kept, short = kept_candidates(found, k.count, len(b_enc))
    return lax.cond(short, lambda: _counted(encoder, x_BD, k, shape),
                    lambda: _listed(found.values, found.index, kept, found.wide_rows, shape))


def _listed(values, index, kept, wide_rows: jax.Array | None, shape: tuple[int, int]) -> Pairs:
    """Lines of what is kept of candidates in falling order: the first of each row of the tables. The second one's rows are
    `wide_rows`, of which the first keeps none. shape: slots of a line, and room for so many lines.
    """
    n, B = shape[0], len(values[0])
    # A kept candidate that is negative gives no activation; those come last.
    counts = [(mask & ~(table <= 0)).sum(1, dtype=jnp.int32) for mask, table in zip(kept, values, strict=True)]
    values, index = ([lists.as_lines(table, n) for table in tables] for tables in (values, index))
    count_B, base_B = counts[0], jnp.arange(B) * (len(values[0]) // B)
    if wide_rows is not None:
        count_B = count_B.at[wide_rows].set(counts[1])
        base_B = base_B.at[wide_rows].set(len(values[0]) + jnp.arange(len(wide_rows)) * (len(values[1]) // len(wide_rows)))
    return lists.in_lines(jnp.concatenate(values), jnp.concatenate(index), count_B, base_B, shape[1])


def _counted(encoder: _Encoder, x_BD: jax.Array, k: UpTo, shape: tuple[int, int]) -> Pairs:
    """The pairs that are kept over the batch, without candidates: nine passes over all pre-activations of the device count them,
    a tenth lists them, tile by tile. Ten times as slow, but in no more memory.
    """
    (n, room), B, keep = shape, len(x_BD), kept_in_all(len(x_BD), k.count)
    at = border(lambda parts: total(encoder.over_tiles(
        lambda pre_TF: (ordered(pre_TF)[:, None] >= parts[:, None]).sum(2, dtype=jnp.int32), x_BD).T), keep)
    n_above_B, n_equal_B = encoder.over_tiles(lambda pre_TF: tuple(
        found.sum(1, dtype=jnp.int32) for found in (ordered(pre_TF) > at.low, ordered(pre_TF) == at.low)), x_BD)
    left_B = jnp.clip(ties_left(n_equal_B, at, keep), 0, n_equal_B)
    count_B = n_above_B + left_B
    _, row_L, first_B, lines = lists.places(count_B, n, room)

    def listed(pairs, tile):
        x_TD, count_T, left_T, first_T = tile
        pre_TF = encoder.pre(x_TD)
        bits, n_TF = ordered(pre_TF), functools.partial(jnp.cumsum, axis=1, dtype=jnp.int32)
        equal = bits == at.low
        kept = (bits > at.low) | (equal & (n_TF(equal) <= left_T[:, None]))
        kept &= n_TF(kept) <= count_T[:, None]  # should another pass have rounded otherwise
        slot = jnp.where(kept, n * first_T[:, None] + n_TF(kept) - 1, n * room)
        values = jax.nn.relu(pre_TF), lax.broadcasted_iota(jnp.int32, slot.shape, 1)
        return tuple(old.at[slot].set(new, mode="drop") for old, new in zip(pairs, values, strict=True)), None

    none = jnp.zeros(n * room, jnp.float32), jnp.zeros(n * room, jnp.int32)
    (values, index), _ = lax.scan(listed, none, encoder.tiles(x_BD, count_B, left_B, first_B))
    return Pairs(values.reshape(room, n), index.reshape(room, n), row_L, lines[None], B, False)
