"""Encode and decode on a ("data", "dict") mesh. Inputs here are *normalised* activations; `saejax.load` takes raw ones."""

import functools

import jax
from jax import lax

from saejax.base import sharding
from saejax.sae.activations import activate
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.products import product


def read(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """What the encoder's product reads: x - b_dec (x itself without `pre_bias`), in the dtype of the products.

    b_dec is subtracted before the cast: of rows that lie far from 0 the rounding would otherwise be that of their mean. No
    gradient flows to b_dec here, see `bias`.
    """
    return (x_BD - lax.stop_gradient(params.b_dec) if spec.pre_bias else x_BD).astype(spec.compute_dtype)


def bias(spec: SAESpec, params: SAEParams) -> jax.Array:
    """b_enc, with the gradient of b_dec through the encoder: -(gradient of b_enc) W_enc, no gradient of [B, D] on the way."""
    if not spec.pre_bias:
        return params.b_enc
    return _bias(spec.compute_dtype, params.b_enc, params.b_dec, lax.stop_gradient(params.W_enc))


def pre_activations(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """pre = W_enc (x - b_dec) + b_enc  (x itself without `pre_bias`); float32 [B, F], no communication."""
    return pre_activations_of(spec, params, read(spec, params, x_BD))


def pre_activations_of(spec: SAESpec, params: SAEParams, read_BD: jax.Array) -> jax.Array:
    """`pre_activations` of rows that have been `read`."""
    return product("bd,fd->bf", read_BD, params.W_enc, spec.compute_dtype) + bias(spec, params)


def decode(spec: SAESpec, params: SAEParams, acts_BF: jax.Array) -> jax.Array:
    """recon = acts W_dec + b_dec, float32 [B, d_out]. Communication: one all-reduce of [B, d_out] along `dict`."""
    return product("bf,fd->bd", acts_BF, params.W_dec, spec.compute_dtype, sharding.out("rows", "d_out")) + params.b_dec


def encode(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array:
    """Feature activations, float32 [B, F]."""
    return activate(spec, params, pre_activations(spec, params, x_BD))


def skipped(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> jax.Array | float:
    """What a skip connection adds to the reconstruction: x W_skip, or 0 without one."""
    return 0.0 if params.W_skip is None else product("bd,de->be", x_BD, params.W_skip, spec.compute_dtype)


def reconstruct(spec: SAESpec, params: SAEParams, x_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(recon [B, d_out], acts [B, F])."""
    acts_BF = encode(spec, params, x_BD)
    return decode(spec, params, acts_BF) + skipped(spec, params, x_BD), acts_BF


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bias(dtype, b_enc: jax.Array, b_dec: jax.Array, W_enc: jax.Array) -> jax.Array:
    return b_enc


def _bias_backward(dtype, W_enc: jax.Array, gradient_F: jax.Array):
    return gradient_F, -product("f,fd->d", gradient_F, W_enc, dtype, sharding.out(None)), None


_bias.defvjp(lambda dtype, b_enc, b_dec, W_enc: (b_enc, W_enc), _bias_backward)
