"""What an SAE is made of: four arrays and what a kind adds per feature, row-major by feature, and a small description."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from flax import struct

from saejax import sharding
from saejax.config import SAEOptions
from saejax.recipes import WITH_K

# What a kind keeps per feature besides the four common arrays.
PER_FEATURE: dict[str, tuple[str, ...]] = {"gated": ("b_mag", "r_mag"), "jumprelu": ("log_threshold",)}
PER_FEATURE_FOLDED = PER_FEATURE | {"jumprelu": ("threshold",)}


@dataclass(frozen=True)
class SAESpec:
    """The static description of an SAE; hashable, so that it can be a static argument of `jit`.

    kind: the activation function (see `saejax.sae.activations`). k: active features per token (`recipes.WITH_K`).
    pre_bias: the encoder reads x - b_dec instead of x.
    bandwidth: width of the window around a threshold in which it receives gradient (jumprelu).
    compute_dtype: dtype of the two matrix products; selection, losses and parameters are float32.
    """

    kind: str
    d_in: int
    d_sae: int
    k: int = 0
    pre_bias: bool = False
    compute_dtype: str = "float32"
    bandwidth: float = 0.001

    @classmethod
    def from_options(cls, options: SAEOptions, d_in: int, compute_dtype: str = "float32") -> "SAESpec":
        return cls(kind=options.kind, d_in=d_in, d_sae=options.d_sae, k=options.k if options.kind in WITH_K else 0,
                   pre_bias=options.pre_bias, compute_dtype=compute_dtype, bandwidth=options.bandwidth)


@struct.dataclass
class SAEParams:
    """Parameters of an SAE, float32: W_enc [F, D], b_enc [F], W_dec [F, D] (features split over `dict`), b_dec [D].

    Both matrices are stored by feature, so that a feature's parameters are contiguous rows on one device.
    per_feature: what the kind adds, float32 [F] each, split over `dict`: gated `r_mag` and `b_mag` (its b_enc is the bias of
    the gate); jumprelu `log_threshold`, or `threshold` in a folded SAE. Empty for relu and topk.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    per_feature: dict[str, jax.Array] = struct.field(default_factory=dict)


LOGICAL_AXES = SAEParams(W_enc=("features", "d_in"), b_enc=("features",), W_dec=("features", "d_in"), b_dec=("d_in",))


def param_shapes(spec: SAESpec, *, folded: bool = False) -> SAEParams:
    """The shape of every parameter, of a training run or of an SAE folded for raw activations."""
    matrix, row = (spec.d_sae, spec.d_in), (spec.d_sae,)
    names = (PER_FEATURE_FOLDED if folded else PER_FEATURE).get(spec.kind, ())
    return SAEParams(W_enc=matrix, b_enc=row, W_dec=matrix, b_dec=(spec.d_in,),
                     per_feature={name: row for name in names})


def param_shardings(mesh, names: Iterable[str] = ()) -> SAEParams:
    """NamedSharding of every parameter on a ("data", "dict") mesh; names: those of `per_feature`."""
    common = {f.name: getattr(LOGICAL_AXES, f.name) for f in fields(SAEParams) if f.name != "per_feature"}
    return SAEParams(**{name: sharding.sharding(mesh, *axes) for name, axes in common.items()},
                     per_feature={name: sharding.sharding(mesh, "features") for name in names})


def initial_per_feature(options: SAEOptions) -> dict[str, float]:
    """The value that each per-feature parameter has at initialisation and after resampling, equal for all features."""
    start = {"log_threshold": math.log(options.threshold_init)}
    return {name: start.get(name, 0.0) for name in PER_FEATURE.get(options.kind, ())}


def init_params(spec: SAESpec, key: jax.Array, b_dec: jax.Array, options: SAEOptions) -> SAEParams:
    """Tied initialisation: W_dec rows are uniform random directions of norm `decoder_init_norm`, W_enc = W_dec, b_enc = 0.

    Call it under `jit` with a mesh set: each device draws its own rows only, and the values do not depend on the mesh.
    Source: Transformer Circuits update April 2024 (norm 0.1); Gao et al. 2024 (unit norm).
    """
    def row(value: float) -> jax.Array:
        return jnp.full((spec.d_sae,), value, jnp.float32, out_sharding=sharding.spec("features"))

    where = sharding.spec(*LOGICAL_AXES.W_dec)
    W_dec = jax.random.normal(key, (spec.d_sae, spec.d_in), jnp.float32, out_sharding=where)
    W_dec = W_dec * (options.decoder_init_norm / jnp.linalg.norm(W_dec, axis=1, keepdims=True))
    per_feature = {name: row(value) for name, value in initial_per_feature(options).items()}
    return SAEParams(W_enc=W_dec, b_enc=row(0.0), W_dec=W_dec, b_dec=b_dec, per_feature=per_feature)
