"""Nested dictionaries: the reconstructions that the first p_1 < p_2 < ... < p_G = F features give."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from saejax import sharding
from saejax.sae.params import SAEParams, SAESpec


def borders(shares: tuple[float, ...], d_sae: int) -> tuple[int, ...]:
    """Prefix lengths from the groups' shares of the dictionary; the last is d_sae."""
    return tuple(round(total * d_sae) for total in itertools.accumulate(shares))[:-1] + (d_sae,)


def prefix_reconstructions(spec: SAESpec, params: SAEParams, acts_BF: jax.Array, shares: tuple[float, ...]) -> jax.Array:
    """recon[g] = sum over features below p_g of acts_i W_dec,i + b_dec; float32 [G, B, D].

    Each feature is multiplied once: a shard cuts its features wherever a border falls, on any shard, and adds each piece to the
    group that it belongs to, so borders need not align with shards. Rows are at rest.
    Communication along `dict`: one reduce-scatter of [G, B, D], for the gradient one all-gather.
    """
    ends = borders(shares, spec.d_sae)
    if not sharding.mesh_is_set():
        parts_GBD = _parts(spec, ends, acts_BF, params.W_dec, 0)
    else:
        rows_features, features = sharding.spec("rows", "features"), sharding.spec("features", "d_in")
        parts_GBD = jax.shard_map(
            lambda acts, W: sharding.scattered(_parts(spec, ends, acts, W, lax.axis_index("dict")), spec.compute_dtype, 1),
            in_specs=(rows_features, features), out_specs=sharding.spec(None, "rows_at_rest", "d_in"))(acts_BF, params.W_dec)
    return jnp.cumsum(parts_GBD, axis=0) + params.b_dec


def _parts(spec: SAESpec, ends: tuple[int, ...], acts_local: jax.Array, W_local: jax.Array, shard) -> jax.Array:
    """What this shard's features add to each group's own part [G, B_local, D]."""
    dtype, width = jnp.dtype(spec.compute_dtype), acts_local.shape[1]
    cuts = sorted({0, width} | {end % width for end in ends})
    first_G, last_G = jnp.asarray((0, *ends[:-1])), jnp.asarray(ends)
    out = 0.0
    for a, b in itertools.pairwise(cuts):
        product = jnp.einsum("bf,fd->bd", acts_local[:, a:b].astype(dtype), W_local[a:b].astype(dtype),
                             preferred_element_type=jnp.float32)
        start = shard * width + a
        mine_G = (first_G <= start) & (start < last_G)
        out = out + jnp.where(mine_G[:, None, None], product, 0.0)
    return out
