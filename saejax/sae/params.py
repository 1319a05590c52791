"""What an SAE is made of: four arrays, row-major by feature, and a small static description."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from saejax import sharding
from saejax.config import SAEOptions


@dataclass(frozen=True)
class SAESpec:
    """The static description of an SAE; hashable, so that it can be a static argument of `jit`.

    kind: "relu" or "topk". k: active features per token (topk). pre_bias: the encoder reads x - b_dec instead of x.
    compute_dtype: dtype of the two matrix products; selection, losses and parameters are float32.
    """

    kind: str
    d_in: int
    d_sae: int
    k: int = 0
    pre_bias: bool = False
    compute_dtype: str = "float32"

    @classmethod
    def from_options(cls, options: SAEOptions, d_in: int, compute_dtype: str = "float32") -> "SAESpec":
        return cls(kind=options.kind, d_in=d_in, d_sae=options.d_sae, k=options.k if options.kind == "topk" else 0,
                   pre_bias=options.pre_bias, compute_dtype=compute_dtype)


@struct.dataclass
class SAEParams:
    """Parameters of an SAE, float32: W_enc [F, D], b_enc [F], W_dec [F, D] (features split over `dict`), b_dec [D].

    Both matrices are stored by feature, so that a feature's parameters are contiguous rows on one device.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array


LOGICAL_AXES = SAEParams(W_enc=("features", "d_in"), b_enc=("features",), W_dec=("features", "d_in"), b_dec=("d_in",))


def param_shardings(mesh) -> SAEParams:
    """NamedSharding of every parameter on a ("data", "dict") mesh."""
    return SAEParams(*(sharding.sharding(mesh, *axes) for axes in (
        LOGICAL_AXES.W_enc, LOGICAL_AXES.b_enc, LOGICAL_AXES.W_dec, LOGICAL_AXES.b_dec)))


def init_params(spec: SAESpec, key: jax.Array, b_dec: jax.Array, decoder_norm: float) -> SAEParams:
    """Tied initialisation: W_dec rows are uniform random directions of norm `decoder_norm`, W_enc = W_dec, b_enc = 0.

    Call it under `jit` with a mesh set: each device draws its own rows only, and the values do not depend on the mesh.
    Source: Transformer Circuits update April 2024 (norm 0.1); Gao et al. 2024 (unit norm).
    """
    where = sharding.spec(*LOGICAL_AXES.W_dec)
    W_dec = jax.random.normal(key, (spec.d_sae, spec.d_in), jnp.float32, out_sharding=where)
    W_dec = W_dec * (decoder_norm / jnp.linalg.norm(W_dec, axis=1, keepdims=True))
    b_enc = jnp.zeros((spec.d_sae,), jnp.float32, out_sharding=sharding.spec(*LOGICAL_AXES.b_enc))
    return SAEParams(W_enc=W_dec, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)
