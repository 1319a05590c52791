"""Normalisation of every input row by itself, with its inverse on the reconstruction: what cannot be folded into weights."""

import jax
import jax.numpy as jnp

NONE, LAYER_NORM, CONSTANT_NORM, CENTER = "none", "layer_norm", "constant_norm_rescale", "center"
ROW_NORMS = (NONE, LAYER_NORM, CONSTANT_NORM, CENTER)
LAYER_NORM_EPS = 1e-5


def normalise_rows(norm: str, x_BD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised rows [B, D], scale [B, 1], shift [B, 1]), float32; raw = normalised * scale + shift up to the eps below.

    layer_norm: (x - mean) / (std + 1e-5) with the unbiased standard deviation; the inverse is y * std + mean, without the eps
    (SAELens; the same as OpenAI's sparse_autoencoder). constant_norm_rescale: x * sqrt(D) / ||x||; a row of zeros stays zero.
    center: x - mean, what a model reads whose writing weights are centred (TransformerLens).
    """
    x_BD = x_BD.astype(jnp.float32)
    zero_B1 = jnp.zeros_like(x_BD[:, :1])
    if norm == LAYER_NORM:
        mean_B1 = x_BD.mean(1, keepdims=True)
        std_B1 = x_BD.std(1, keepdims=True, ddof=1)
        return (x_BD - mean_B1) / (std_B1 + LAYER_NORM_EPS), std_B1, mean_B1
    if norm == CENTER:
        mean_B1 = x_BD.mean(1, keepdims=True)
        return x_BD - mean_B1, zero_B1 + 1, mean_B1
    if norm == CONSTANT_NORM:
        scale_B1 = jnp.linalg.norm(x_BD, axis=1, keepdims=True) / x_BD.shape[1] ** 0.5
        return x_BD / jnp.maximum(scale_B1, jnp.finfo(jnp.float32).tiny), scale_B1, zero_B1
    return x_BD, zero_B1 + 1, zero_B1
