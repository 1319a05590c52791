"""Adam's moments, as `train.optimizer` has them: without the first one where beta1 = 0, those of matrices in float32 or bfloat16.

One step changes a second moment by about a thousandth, and bfloat16's values lie 1/256 to 1/128 apart: rounded to the nearest it
would stand still. Rounded up or down with the probability that makes the mean right, it moves as it should.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.base.fingerprints import mix
from saejax.config import TrainOptions
from saejax.sae import SAEParams


@struct.dataclass
class Moments:
    """count: updates so far. second: moment of the squared gradients; first: that of the gradients, None where it is not kept.
    seen_F: with lazy rows the update at which each feature's moments were last brought up to date (int32), else None.
    """

    count: jax.Array
    second: SAEParams
    first: SAEParams | None
    seen_F: jax.Array | None


def initial(options: TrainOptions, params: SAEParams) -> Moments:
    """The state of Adam at step 0, see `train.optimizer`."""
    def zeros():
        return jax.tree.map(lambda p: jnp.zeros_like(p, kept_dtype(options, p)), params)

    seen_F = jnp.zeros_like(params.b_enc, jnp.int32) if options.lazy else None
    first = zeros() if options.beta1 else None
    return Moments(jnp.zeros((), jnp.int32), zeros(), first, seen_F)


def kept_dtype(options: TrainOptions, parameter: jax.Array):
    """Of a parameter's moments: bfloat16 for matrices where bytes are to be saved; vectors are not worth it."""
    return jnp.bfloat16 if options.optimizer.endswith("_bf16") and parameter.ndim == 2 else parameter.dtype


def direction(options: TrainOptions, first: jax.Array, second: jax.Array, count: jax.Array) -> jax.Array:
    """Adam's update before the learning rate. first: without bias; second: v."""
    return first / (jnp.sqrt(optax.tree.bias_correction(second, options.beta2, count)) + options.eps)


def kept(new: SAEParams, like: SAEParams, count: jax.Array, which: int, rows: jax.Array | None = None) -> SAEParams:
    """Moments in the dtypes of `like`; which: 0 for second moments, 1 for first ones; rows: see `rounded`."""
    leaves, tree = jax.tree.flatten(new)
    return jax.tree.unflatten(tree, [rounded(value, old.dtype, count, 2 * i + which, rows)
                                     for i, (value, old) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))])


def rounded(value: jax.Array, dtype, count: jax.Array, which: int, rows: jax.Array | None = None) -> jax.Array:
    """value in `dtype`; bfloat16: the value below or above, at random, so that the mean is `value`.

    The random bits are a hash of (count, which array, row, column): the same on every mesh and after resuming. rows: numbers of
    the rows, where they are not the array's first ones.
    """
    if dtype != jnp.bfloat16:
        return value.astype(dtype)
    where = jax.typeof(value).sharding if sharding.mesh_is_set() and rows is None else None
    row, column = (lax.broadcasted_iota(jnp.uint32, value.shape, d, out_sharding=where) for d in (0, 1))
    row = row if rows is None else rows.astype(jnp.uint32)[:, None]
    seed = mix(count.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + jnp.uint32(which))
    noise = mix(mix(row ^ seed) + column * jnp.uint32(0x85EBCA77))
    bits = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32) + (noise >> 16)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
