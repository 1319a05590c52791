"""What an SAE is made of: four arrays, what kind and shape add to them, row-major by feature, and a small description."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
from flax import struct

from saejax.base import hardware, sharding
from saejax.config import SAEOptions
from saejax.config.recipes import INITS, WITH_K

SHARED = ("b_dec", "W_skip")  # what is not stored by feature
# What a kind keeps per feature besides the four common arrays.
PER_FEATURE: dict[str, tuple[str, ...]] = {"gated": ("b_mag", "r_mag"), "jumprelu": ("log_threshold",)}
PER_FEATURE_FOLDED = PER_FEATURE | {"jumprelu": ("threshold",)}


def entry_scale(convention: str, widths: Sequence[int]) -> float:
    """Root mean square of an entry of an input normalised by a convention of `sae.normalize` (1 for "none": not known)."""
    return (sum(widths) / len(widths)) ** -0.5 if convention == "mean_sq_norm_1" else 1.0


@dataclass(frozen=True)
class SAESpec:
    """The static description of an SAE; hashable, so that it can be a static argument of `jit`.

    kind: the activation function (see `saejax.sae.activations`). k: active features per token (`recipes.WITH_K`).
    pre_bias: the encoder reads x - b_dec instead of x.
    bandwidth: width of the window around a threshold in which it receives gradient; threshold_init: that of a new feature
    (jumprelu). compute_dtype: of the products' operands; selection, losses and parameters are float32. d_out: width of
    what a transcoder predicts; none: the input itself is reconstructed. skip: x W_skip is added to it. layers: widths of the
    hookpoints that a crosscoder's input consists of, in order; empty: one hookpoint.
    """

    kind: str
    d_in: int
    d_sae: int
    k: int = 0
    pre_bias: bool = False
    compute_dtype: str = "float32"
    bandwidth: float = 0.001
    threshold_init: float = 0.001
    d_out: int | None = None
    skip: bool = False
    layers: tuple[int, ...] = ()

    @classmethod
    def from_options(cls, options: SAEOptions, widths: Mapping[str, int], compute_dtype: str = "float32") -> "SAESpec":
        """widths: of every hookpoint that the options name. compute_dtype: auto is what it is on the devices here."""
        read = tuple(widths[name] for name in options.sources)
        typical = 0.75 * entry_scale(options.normalize, read)
        return cls(kind=options.kind, d_in=sum(read), d_sae=options.d_sae, k=options.k if options.kind in WITH_K else 0,
                   pre_bias=options.pre_bias, compute_dtype=hardware.compute_dtype_here(compute_dtype),
                   bandwidth=typical if options.bandwidth is None else options.bandwidth,
                   threshold_init=(options.bandwidth or typical) if options.threshold_init is None else options.threshold_init,
                   d_out=widths[options.target] if options.target else None, skip=options.skip,
                   layers=read if len(read) > 1 else ())

    @property
    def width_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_out is None else self.d_out

    @property
    def shape(self) -> str:
        """What it maps to what: "sae", "transcoder", "skip transcoder" or "crosscoder"."""
        if self.d_out is not None:
            return "skip transcoder" if self.skip else "transcoder"
        return "crosscoder" if self.layers else "sae"


@struct.dataclass
class SAEParams:
    """Parameters of an SAE, float32: W_enc [F, D], b_enc [F], W_dec [F, D] (features split over `dict`), b_dec [D].

    In a transcoder W_dec and b_dec have the width of its target; W_skip [d_in, d_out] is there with a skip connection only.

    Both matrices are stored by feature, so that a feature's parameters are contiguous rows on one device.
    per_feature: what the kind adds, float32 [F] each, split over `dict`: gated `r_mag` and `b_mag` (its b_enc is the bias of
    the gate); jumprelu `log_threshold`, or `threshold` in a folded SAE. Empty for relu and topk.
    """

    W_enc: jax.Array
    b_enc: jax.Array
    W_dec: jax.Array
    b_dec: jax.Array
    W_skip: jax.Array | None = None
    per_feature: dict[str, jax.Array] = struct.field(default_factory=dict)


LOGICAL_AXES = SAEParams(W_enc=("features", "d_in"), b_enc=("features",), W_dec=("features", "d_out"), b_dec=("d_out",),
                         W_skip=("d_in", "d_out"))


def param_shapes(spec: SAESpec, *, folded: bool = False) -> SAEParams:
    """The shape of every parameter, of a training run or of an SAE folded for raw activations."""
    row = (spec.d_sae,)
    names = (PER_FEATURE_FOLDED if folded else PER_FEATURE).get(spec.kind, ())
    return SAEParams(W_enc=(spec.d_sae, spec.d_in), b_enc=row, W_dec=(spec.d_sae, spec.width_out), b_dec=(spec.width_out,),
                     W_skip=(spec.d_in, spec.width_out) if spec.skip else None, per_feature={name: row for name in names})


def tensors(params: SAEParams) -> dict:
    """{name: value} of every parameter there is, those per feature among them."""
    common = {f.name: getattr(params, f.name) for f in fields(SAEParams) if f.name != "per_feature"}
    return {name: value for name, value in common.items() if value is not None} | params.per_feature


def from_tensors(values: Mapping) -> SAEParams:
    """The inverse of `tensors`."""
    common = {f.name for f in fields(SAEParams)} - {"per_feature"}
    return SAEParams(**{name: value for name, value in values.items() if name in common},
                     per_feature={name: value for name, value in values.items() if name not in common})


def param_shardings(mesh, names: Iterable[str]) -> SAEParams:
    """NamedSharding on a ("data", "dict") mesh of the parameters that are named."""
    return from_tensors({name: sharding.sharding(mesh, *(getattr(LOGICAL_AXES, name, None) or ("features",))) for name in names})


def abstract_params(spec: SAESpec, mesh, *, folded: bool = False) -> SAEParams:
    """Shapes and shardings of the parameters on a mesh, whose devices need not be here."""
    shapes = tensors(param_shapes(spec, folded=folded))
    return jax.tree.map(lambda shape, where: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where), from_tensors(shapes),
                        param_shardings(mesh, shapes), is_leaf=lambda value: isinstance(value, tuple))


def initial_per_feature(spec: SAESpec) -> dict[str, float]:
    """The value that each per-feature parameter has at initialisation and after resampling, equal for all features."""
    start = {"log_threshold": math.log(spec.threshold_init)}
    return {name: start.get(name, 0.0) for name in PER_FEATURE.get(spec.kind, ())}


def init_params(spec: SAESpec, key: jax.Array, b_dec: jax.Array, options: SAEOptions) -> SAEParams:
    """Tied initialisation: W_dec rows are uniform random directions of the norm of `sae.init`, W_enc = W_dec, b_enc = 0.

    A transcoder's encoder has directions of its own, as its input lives in another space; W_skip = 0. Call it under `jit` with a
    mesh set: each device draws its own rows only, and the values do not depend on the mesh. Source: Transformer Circuits update
    April 2024 (norm 0.1); Gao et al. 2024 (unit norm).
    """
    def row(value: float) -> jax.Array:
        return jnp.full((spec.d_sae,), value, jnp.float32, out_sharding=sharding.spec("features"))

    def directions(key: jax.Array, width: int) -> jax.Array:
        W = jax.random.normal(key, (spec.d_sae, width), jnp.float32, out_sharding=sharding.spec("features", None))
        return W * (INITS[options.init].decoder_norm / jnp.linalg.norm(W, axis=1, keepdims=True))

    W_dec = directions(key, spec.width_out)
    W_enc = W_dec if spec.d_out is None else directions(jax.random.fold_in(key, 1), spec.d_in)
    skip = jnp.zeros((spec.d_in, spec.width_out), jnp.float32) if spec.skip else None
    per_feature = {name: row(value) for name, value in initial_per_feature(spec).items()}
    return SAEParams(W_enc=W_enc, b_enc=row(0.0), W_dec=W_dec, b_dec=b_dec, W_skip=skip, per_feature=per_feature)
