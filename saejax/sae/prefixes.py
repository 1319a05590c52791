"""Reconstructions of training, whose rows rest over all devices: of the whole dictionary, and of nested prefixes of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from saejax.base import sharding
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.products import product

_BF, _FD = sharding.spec("rows", "features"), sharding.spec("features", None)
_GBD = sharding.spec(None, "rows_at_rest", None)


def borders(shares: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    """Prefix lengths from the groups' shares of the dictionary; the last is d_sae."""
    return tuple(round(total * d_sae) for total in itertools.accumulate(shares))[:-1] + (d_sae,)


def decode_at_rest(spec: SAESpec, params: SAEParams, acts_BF: jax.Array) -> jax.Array:
    """`model.decode` for training: rows rest over all devices. Communication along `dict`: one reduce-scatter of [B, d_out] in
    the dtype of computation, for the gradient one all-gather.
    """
    return prefix_reconstructions(spec, params, acts_BF, (1.0,))[0]


def prefix_reconstructions(spec: SAESpec, params: SAEParams, acts_BF: jax.Array, shares: tuple[float, ...]) -> jax.Array:
    """recon[g] = sum over features below p_g of acts_i W_dec,i + b_dec; float32 [G, B, D].

    Each feature is multiplied once: a shard cuts its features wherever a border falls, on any shard, and adds each piece to the
    group that it belongs to, so borders need not align with shards. Rows are at rest.
    Communication along `dict`: one reduce-scatter of [G, B, D], for the gradient one all-gather.
    """
    ends = borders(shares, spec.d_sae)
    return jnp.cumsum(_parts(jnp.dtype(spec.compute_dtype), ends, acts_BF, params.W_dec), axis=0) + params.b_dec


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _parts(dtype, ends: tuple[int, ...], acts_BF: jax.Array, W_dec: jax.Array) -> jax.Array:
    """What each group's own features add, [G, B, D]."""
    def local(acts_BF, W_dec, shards):
        parts_GBD = jnp.zeros((len(ends), len(acts_BF), W_dec.shape[1]), jnp.float32)
        parts_GBD = added(dtype, pieces(ends, len(W_dec)), acts_BF, W_dec, parts_GBD)
        return sharding.scattered(parts_GBD, dtype, 1) if shards > 1 else parts_GBD

    return sharding.on_shards(local, (_BF, _FD), _GBD)(acts_BF, W_dec)


def _parts_backward(dtype, ends: tuple[int, ...], saved, gradient_GBD: jax.Array):
    def local(acts_BF, W_dec, gradient_GBD, shards):
        gradient_GBD = gradient_GBD.astype(dtype)
        if shards > 1:
            gradient_GBD = lax.all_gather(gradient_GBD, "dict", axis=1, tiled=True)
        to_acts, to_W = [], []
        for piece, group in pieces(ends, len(W_dec)):
            to_acts.append(product("bd,fd->bf", gradient_GBD[group], W_dec[piece], dtype))
            to_W.append(product("bf,bd->fd", acts_BF[:, piece], gradient_GBD[group], dtype))
        return jnp.concatenate(to_acts, axis=1), sharding.over(lax.psum, jnp.concatenate(to_W), "data")

    return sharding.on_shards(local, (_BF, _FD, _GBD), (_BF, _FD))(*saved, gradient_GBD)


_parts.defvjp(lambda dtype, ends, *values: (_parts(dtype, ends, *values), values), _parts_backward)


def added(dtype, pieces: list, acts_BF: jax.Array, W_dec: jax.Array, parts_GBD: jax.Array) -> jax.Array:
    """`parts_GBD` with what each group's features among these add; on one device, without communication."""
    cuts = [piece.start for piece, _ in pieces[1:]]
    for (_, group), acts_BP, W in zip(pieces, jnp.split(acts_BF, cuts, axis=1), jnp.split(W_dec, cuts), strict=True):
        parts_GBD = parts_GBD.at[group].add(product("bf,fd->bd", acts_BP, W, dtype))
    return parts_GBD


def pieces(ends: tuple[int, ...], width: int, first: jax.Array | int = 0, size: int | None = None, aligned_at: int = 0) -> list:
    """(slice, number of the group that it belongs to) of a tile's features, cut wherever a border falls on any shard.

    width: features of a shard. first, size: of the tile, in its shard; none: the whole shard. `first` may be known at run time
    only; it is multiples of `size` away from `aligned_at`.
    """
    size = size or width
    cuts = sorted({0, size} | {(end % width - aligned_at) % size for end in ends})
    shard = lax.axis_index("dict") if len(ends) > 1 and sharding.mesh_is_set() else 0
    start = shard * width + first
    return [(slice(a, b), (start + a >= jnp.asarray(ends[:-1])).sum() if len(ends) > 1 else 0)
            for a, b in itertools.pairwise(cuts)]
