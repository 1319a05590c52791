"""The path of kinds without k: tile after tile of a shard's features, all rows against each, so that a pass reads weights once.

Where the pre-activations [B, F] of a shard are small there is one tile, and they are kept for the gradients. Else a tile's
pre-activations are made again in the backward pass, 12 B D F FLOPs a step instead of 10, and no array of B x F is in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.base.hardware import Chip
from saejax.config import SAEOptions
from saejax.sae.featurewise import decoded, of_features
from saejax.sae.model import bias
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import added, borders, pieces
from saejax.sae.products import product

WHOLE = 1 / 10     # of a chip's memory: pre-activations up to which a shard is one tile
TILE = 1 / 50      # of a chip's memory: pre-activations of a tile
FEATURES = 1024    # of a tile at least
ALIGNED = 128      # features of a tile are a multiple of it; all tiles are equal where that is possible

_F, _FD, _BD = sharding.spec("features"), sharding.spec("features", None), sharding.spec("rows", None)
_BF, _GBD = sharding.spec("rows", "features"), sharding.spec(None, "rows_at_rest", None)


def tile_width(rows: int, features: int, chip: Chip) -> int:
    """Features of a tile, by the rows of a device and the features of a shard."""
    if 4 * rows * features <= WHOLE * chip.memory:
        return features
    least = -(-features // max(FEATURES, int(TILE * chip.memory) // (4 * rows)))  # number of tiles
    n = next((n for n in range(least, 2 * least) if features % (n * ALIGNED) == 0), least)
    return min(features, -(-features // (n * ALIGNED)) * ALIGNED)


@struct.dataclass
class Found:
    """parts_GBD: what each group's features add to the reconstruction, rows at rest; then the same of what is decoded with a
    frozen W_dec, if anything. sums: over rows, [F]. count_F: rows in which a feature is active. least: the smallest positive
    activation.
    """

    parts_GBD: jax.Array
    sums: dict[str, jax.Array]
    count_F: jax.Array
    least: jax.Array


def over_features(spec: SAESpec, options: SAEOptions, params: SAEParams, read_BD: jax.Array) -> Found:
    """One pass over a batch. Gradients flow from parts and sums to the parameters, none to the rows.

    Communication along `dict`: one reduce-scatter of the parts in the dtype of computation, for the gradient one all-gather;
    along `data` sums, and the gradients of a shard's parameters.
    """
    ends = borders(options.groups, spec.d_sae) if options.groups else (spec.d_sae,)
    own = params.replace(b_dec=None, W_skip=None)
    return _over(_How(spec, options, ends, tile_here(spec, read_BD)), own, bias(spec, params), lax.stop_gradient(read_BD))


def several(spec: SAESpec, read_BD: jax.Array) -> bool:
    """Whether a shard is more than one tile."""
    return tile_here(spec, read_BD) < spec.d_sae // sharding.shards()


def tile_here(spec: SAESpec, read_BD: jax.Array) -> int:
    """Features of a tile here."""
    rows = len(read_BD) // jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return tile_width(rows, spec.d_sae // sharding.shards(), sharding.chip())


@dataclasses.dataclass(frozen=True)
class _How:
    spec: SAESpec
    options: SAEOptions
    ends: tuple[int, ...]
    tile: int

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.spec.compute_dtype)

    def pre(self, W_enc: jax.Array, bias_T: jax.Array, read_BD: jax.Array) -> jax.Array:
        return product("bd,fd->bf", read_BD, W_enc, self.dtype) + bias_T

    def of_tile(self, pieces: list, own: SAEParams, pre_BT: jax.Array, parts_GBD: jax.Array):
        """((parts with those of the tile added, sums), activations)."""
        acts, sums = of_features(self.spec, self.options, own, pre_BT)
        G, parts = len(self.ends), []
        for i, acts_BT in enumerate(acts):
            W_dec = lax.stop_gradient(own.W_dec) if i else own.W_dec
            parts.append(added(self.dtype, pieces, acts_BT, W_dec, parts_GBD[i * G:(i + 1) * G]))
        return (jnp.concatenate(parts), sums), acts[0]

    def pieces(self, tile: "Tile", width: int) -> list:
        return pieces(self.ends, width, tile.first, tile.size, tile.aligned_at)

    def empty(self, own: SAEParams, read_BD: jax.Array) -> Found:
        """Of no tile yet."""
        width, shape = own.W_dec.shape[0], (len(self.ends) * decoded(self.spec), len(read_BD), own.W_dec.shape[1])
        _, sums = jax.eval_shape(functools.partial(of_features, self.spec, self.options), own,
                                 jax.ShapeDtypeStruct((len(read_BD), width), jnp.float32))
        return Found(jnp.zeros(shape, jnp.float32), {name: jnp.zeros(width, jnp.float32) for name in sums},
                     jnp.zeros(width, jnp.int32), jnp.float32(jnp.inf))


class Tile(NamedTuple):
    """Where a tile lies in its shard; aligned_at: see `prefixes.pieces`."""

    first: jax.Array | int
    size: int
    aligned_at: int

    def of(self, tree):
        return jax.tree.map(lambda value: lax.dynamic_slice_in_dim(value, self.first, self.size), tree)

    def put(self, tree, new):
        """`tree` with what is new of this tile."""
        return jax.tree.map(lambda value, new: lax.dynamic_update_slice_in_dim(value, new, self.first, 0), tree, new)


def each(size: int, of: Callable, carry, width: int):
    """The carry after of(carry, tile) of every tile of `size` features of a shard of `width`."""
    n, rest = divmod(width, size)
    full = functools.partial(Tile, size=size, aligned_at=0)
    carry = of(carry, full(0)) if n == 1 else lax.fori_loop(0, n, lambda i, carry: of(carry, full(i * size)), carry)
    return of(carry, Tile(width - rest, rest, width - rest)) if rest else carry


def _pass(how: _How, keep: bool, own: SAEParams, bias_F: jax.Array, read_BD: jax.Array):
    """(`Found`, the pre-activations [B, F] with `keep`, where there is one tile, else None)."""
    def local(own, bias_F, read_BD, shards):
        def of(carry, tile: Tile):
            found, _ = carry
            own_T, bias_T = tile.of((own, bias_F))
            pre_BT = how.pre(own_T.W_enc, bias_T, read_BD)
            (parts_GBD, sums), acts_BT = how.of_tile(how.pieces(tile, len(bias_F)), own_T, pre_BT, found.parts_GBD)
            sums, count_F = tile.put((found.sums, found.count_F), (sums, (acts_BT > 0).sum(0, dtype=jnp.int32)))
            least = jnp.minimum(found.least, jnp.where(acts_BT > 0, acts_BT, jnp.inf).min())
            return Found(parts_GBD, sums, count_F, least), pre_BT if keep else None

        found, pre_BF = each(how.tile, of, (how.empty(own, read_BD), None), len(bias_F))
        sums, count_F = sharding.over(lax.psum, (found.sums, found.count_F), "data")
        parts_GBD = sharding.scattered(found.parts_GBD, how.dtype, 1) if shards > 1 else found.parts_GBD
        return Found(parts_GBD, sums, count_F, sharding.over(lax.pmin, found.least, "data", "dict")), pre_BF

    placed = Found(_GBD, _F, _F, sharding.spec())
    return sharding.on_shards(local, (placement(own), _F, _BD), (placed, _BF))(own, bias_F, read_BD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over(how: _How, own: SAEParams, bias_F: jax.Array, read_BD: jax.Array) -> Found:
    return _pass(how, False, own, bias_F, read_BD)[0]


def _forward(how: _How, own: SAEParams, bias_F: jax.Array, read_BD: jax.Array):
    found, pre_BF = _pass(how, how.tile * sharding.shards() == len(bias_F), own, bias_F, read_BD)
    return found, (own, bias_F, read_BD, pre_BF)


def _backward(how: _How, saved, gradient: Found):
    def local(own, bias_F, read_BD, pre_BF, parts_GBD, sums, shards):
        parts_GBD = parts_GBD.astype(how.dtype)
        if shards > 1:
            parts_GBD = lax.all_gather(parts_GBD, "dict", axis=1, tiled=True)

        def of(carry, tile: Tile):
            own_T, bias_T = tile.of((own, bias_F))
            pre_BT = how.pre(own_T.W_enc, bias_T, read_BD) if pre_BF is None else pre_BF
            of_tile = functools.partial(how.of_tile, how.pieces(tile, len(bias_F)), parts_GBD=jnp.zeros(parts_GBD.shape))
            _, back, _ = jax.vjp(of_tile, own_T.replace(W_enc=None), pre_BT, has_aux=True)
            to_own, to_pre = back((parts_GBD.astype(jnp.float32), tile.of(sums)))
            to_own = to_own.replace(W_enc=product("bf,bd->fd", to_pre, read_BD, how.dtype))
            return tile.put(carry, (to_own, to_pre.sum(0)))

        return sharding.over(lax.psum, each(how.tile, of, jax.tree.map(jnp.zeros_like, (own, bias_F)), len(bias_F)), "data")

    own, bias_F, read_BD, pre_BF = saved
    placed = placement(own), _F
    to_own, to_bias = sharding.on_shards(local, (*placed, _BD, _BF, _GBD, _F), placed)(*saved, gradient.parts_GBD, gradient.sums)
    return to_own, to_bias, jnp.zeros_like(read_BD)


_over.defvjp(_forward, _backward)


def placement(own: SAEParams) -> SAEParams:
    """Where parameters by feature lie on a mesh."""
    return jax.tree.map(lambda value: _FD if value.ndim == 2 else _F, own)
