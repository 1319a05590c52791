"""Encode and decode on a ("data", "dict") mesh. Inputs here are *normalised* activations; `saejax.load` takes raw ones."""

import jax
import jax.numpy as jnp

from saejax import sharding
from saejax.sae.activations import activate
from saejax.sae.params import SAEParams, SAESpec


def pre_activations(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """pre = W_enc (x - b_dec) + b_enc  (x itself without `pre_bias`); float32 [B, F], no communication.

    b_dec is folded into the bias, W_enc x + (b_enc - W_enc b_dec): one matrix-vector product instead of a [B, D]
    gradient with respect to the input.
    """
    dtype = jnp.dtype(spec.compute_dtype)
    bias_F = params.b_enc - params.W_enc @ params.b_dec if spec.pre_bias else params.b_enc
    product = jnp.einsum("bd,fd->bf", x_BD.astype(dtype), params.W_enc.astype(dtype), preferred_element_type=jnp.float32)
    return product + bias_F


def decode(spec: SAESpec, params: SAEParams, acts_BF: jax.Array) -> jax.Array:
    """recon = acts W_dec + b_dec, float32 [B, d_out]. Communication: one all-reduce of [B, d_out] along `dict`."""
    dtype = jnp.dtype(spec.compute_dtype)
    product = jnp.einsum("bf,fd->bd", acts_BF.astype(dtype), params.W_dec.astype(dtype),
                         preferred_element_type=jnp.float32, out_sharding=sharding.out("rows", "d_out"))
    return product + params.b_dec


def decode_at_rest(spec: SAESpec, params: SAEParams, acts_BF: jax.Array) -> jax.Array:
    """`decode` for training: rows rest over all devices. Communication along `dict`: one reduce-scatter of [B, d_out] in the
    dtype of computation, for the gradient one all-gather.
    """
    dtype = jnp.dtype(spec.compute_dtype)

    def local(acts_BF: jax.Array, W_dec: jax.Array) -> jax.Array:
        return sharding.scattered(jnp.einsum("bf,fd->bd", acts_BF.astype(dtype), W_dec.astype(dtype),
                                             preferred_element_type=jnp.float32), dtype)

    if not sharding.mesh_is_set():
        return decode(spec, params, acts_BF)
    if sharding.shards() == 1:
        return jax.sharding.reshard(decode(spec, params, acts_BF), sharding.spec("rows_at_rest", "d_out"))
    specs = sharding.spec("rows", "features"), sharding.spec("features", "d_out")
    product = jax.shard_map(local, in_specs=specs, out_specs=sharding.spec("rows_at_rest", "d_out"))(acts_BF, params.W_dec)
    return product + params.b_dec


def encode(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """Feature activations, float32 [B, F]."""
    return activate(spec, params, pre_activations(spec, params, x_BD))


def skipped(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array | float:
    """What a skip connection adds to the reconstruction: x W_skip, or 0 without one."""
    if params.W_skip is None:
        return 0.0
    dtype = jnp.dtype(spec.compute_dtype)
    return jnp.einsum("bd,de->be", x_BD.astype(dtype), params.W_skip.astype(dtype), preferred_element_type=jnp.float32)


def reconstruct(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(recon [B, d_out], acts [B, F])."""
    acts_BF = encode(spec, params, x_BD)
    return decode(spec, params, acts_BF) + skipped(spec, params, x_BD), acts_BF
