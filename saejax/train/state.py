"""The whole state of a training run that lives on devices, and its initialisation shard by shard."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from saejax.base import sharding
from saejax.base.records import ActivationStats
from saejax.config import Config, SAEOptions
from saejax.config.recipes import INITS
from saejax.sae import SAEParams, SAESpec, decode, init_params, measuring, pre_activations
from saejax.sae.activations import activate, thresholds
from saejax.sae.normalization import Normalization, columns
from saejax.sae.params import entry_scale
from saejax.train import control, determinism, moments
from saejax.train.hyperparameters import alike
from saejax.train.moments import Moments

INIT_ROWS = 32_768  # rows that b_dec is taken from at most
_BIAS_ROWS = 4096  # rows that initial biases are taken from


@struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    tokens_since_fired_F saturates at 2^31; inverse_variance: 1 / E||x - E x||^2 of what is reconstructed, normalised. It and the
    normalisation are constants of a run, kept here so that a checkpoint is complete.
    moving: running values by name (see `saejax.train.control`). ema: mean of the parameters (`train.ema`), or none.
    skipped, skipped_in_row: steps that were left out because loss or gradient was not finite.
    """

    step: jax.Array                  # int32
    params: SAEParams
    opt_state: Moments
    tokens_since_fired_F: jax.Array  # uint32
    normalization: Normalization     # float32
    inverse_variance: jax.Array      # float32
    skipped: jax.Array               # int32
    skipped_in_row: jax.Array        # int32
    moving: dict[str, jax.Array] = struct.field(default_factory=dict)  # float32
    ema: SAEParams | None = None


def normalization_scale(convention: str, stats: ActivationStats, d_in: int) -> float:
    """The scalar that brings raw activations into a named convention.

    mean_sq_norm_D: E||x||^2 = D (Templeton et al. 2024); mean_norm_sqrt_D: E||x|| = sqrt(D) (April 2024 and January 2025
    updates); mean_sq_norm_1: E||x||^2 = 1 (Gemma Scope); none: 1.
    """
    return {
        "mean_sq_norm_D": (d_in / stats.mean_sq_norm) ** 0.5,
        "mean_norm_sqrt_D": d_in**0.5 / stats.mean_norm,
        "mean_sq_norm_1": stats.mean_sq_norm**-0.5,
        "none": 1.0,
    }[convention]


def geometric_median(x_ND: np.ndarray, iterations: int = 100, tolerance: float = 1e-6) -> np.ndarray:
    """The point with the least summed distance to the rows, by Weiszfeld's iteration in float64."""
    x_ND = x_ND.astype(np.float64)
    point = x_ND.mean(0)
    for _ in range(iterations):
        weight = 1.0 / np.maximum(np.linalg.norm(x_ND - point, axis=1), 1e-12)
        new = weight @ x_ND / weight.sum()
        if np.linalg.norm(new - point) <= tolerance * np.linalg.norm(new):
            return new
        point = new
    return point


def measured(sample_NW: np.ndarray, stats: Sequence[ActivationStats]) -> list[ActivationStats]:
    """Statistics of sample rows in place of those of the whole store, hookpoint by hookpoint: what a stream that leaves rows out
    is normalised by.
    """
    out = []
    for x_ND in np.split(sample_NW.astype(np.float64), np.cumsum([len(s.mean_D) for s in stats])[:-1], axis=1):
        norms_N = np.linalg.norm(x_ND, axis=1)
        out.append(ActivationStats(len(x_ND), x_ND.mean(0), norms_N.mean(), np.square(norms_N).mean(), np.median(norms_N)))
    return out


def normalization_of(options: SAEOptions, stats: Sequence[ActivationStats]) -> Normalization:
    """The normalisation of rows that consist of these hookpoints; the convention holds for each by itself.

    With `sae.center` it is the centred activations that the convention normalises.
    """
    scales, centers = [], []
    for s in stats:
        center_D = s.mean_D if options.center else np.zeros_like(s.mean_D)
        around = dataclasses.replace(s, mean_sq_norm=s.mean_sq_norm - float(np.square(center_D).sum()))
        scale = normalization_scale(options.normalize, around, len(center_D))
        scales.append(np.full(len(center_D), scale, np.float32))
        centers.append(center_D.astype(np.float32))
    return Normalization(scale=np.concatenate(scales), center=np.concatenate(centers))


def initial_b_dec(how: str, y_ND: np.ndarray) -> np.ndarray:
    """b_dec from normalised sample rows of what is reconstructed: "zeros" or "geometric_median"."""
    value = geometric_median(y_ND) if how == "geometric_median" else np.zeros(y_ND.shape[1])
    return value.astype(np.float32)


def initial_state(config: Config, spec: SAESpec, stats: Sequence[ActivationStats], sample_NW: np.ndarray,
                  mesh: Mesh) -> TrainState:
    """Step 0 of a run. Each device makes its own shard of the dictionary; no host holds it.

    stats: of `config.sae.hookpoints`; sample_NW: raw rows of them, side by side.
    """
    normalization = normalization_of(config.sae, stats)
    rows_NW = (sample_NW.astype(np.float32) - normalization.center) * normalization.scale
    b_dec = initial_b_dec(INITS[config.sae.init].b_dec, columns(spec, rows_NW)[1])
    variances = [s.mean_sq_norm - float(np.square(s.mean_D).sum()) for s in stats]
    firsts = np.cumsum([0] + [len(s.mean_D) for s in stats[:-1]])
    normal = [float(normalization.scale[first])**2 * variance for first, variance in zip(firsts, variances, strict=True)]
    written = normal[-1:] if spec.d_out is not None else normal
    n = max(1, min(len(rows_NW), _BIAS_ROWS) // mesh.size) * mesh.size
    rows_NW = sharding.place(np.resize(rows_NW, (n, rows_NW.shape[1])), sharding.sharding(mesh, "rows_at_rest", None))
    with jax.set_mesh(mesh):
        return _jitted(spec, alike(config))(
            jax.random.key(config.seed), b_dec, normalization, np.float32(1 / sum(written)), rows_NW)


def abstract_state(config: Config, spec: SAESpec, mesh: Mesh | AbstractMesh):
    """Shapes, dtypes and shardings of the state on a mesh, nothing allocated: what a checkpoint is restored into, or what would
    lie on a mesh whose devices are not here.
    """
    with jax.sharding.use_abstract_mesh(mesh) if isinstance(mesh, AbstractMesh) else jax.set_mesh(mesh):
        row = jax.ShapeDtypeStruct((spec.d_in + (spec.d_out or 0),), jnp.float32)
        shapes = jax.eval_shape(functools.partial(_make, spec, config), jax.eval_shape(jax.random.key, 0),
                                jax.ShapeDtypeStruct((spec.width_out,), jnp.float32), Normalization(row, row),
                                jax.ShapeDtypeStruct((), jnp.float32))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(
        mesh, s.sharding.spec if s.sharding else PartitionSpec())), shapes)


@functools.lru_cache(maxsize=8)
def _jitted(spec: SAESpec, config: Config):
    """One compilation for all SAEs whose configs are `alike`."""
    return jax.jit(functools.partial(_make, spec, config), compiler_options=determinism.compiler_options(config.train))


def _make(spec, config, key, b_dec, normalization, inverse_variance, rows_NW=None) -> TrainState:
    """rows_NW: None where only the shapes are asked for."""
    key_init, key_probe = jax.random.split(key)
    params = init_params(spec, key_init, b_dec, config.sae)
    if rows_NW is not None:
        params = _started(spec, config.sae, params, key_probe, rows_NW)
    since = jnp.zeros((spec.d_sae,), jnp.uint32, out_sharding=sharding.spec("features"))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params=params, opt_state=moments.initial(config.train, params), tokens_since_fired_F=since,
                      normalization=normalization, inverse_variance=inverse_variance, skipped=zero, skipped_in_row=zero,
                      moving=control.initial(config), ema=params if config.train.ema else None)


def _started(spec: SAESpec, options: SAEOptions, params: SAEParams, key: jax.Array, rows_NW: jax.Array) -> SAEParams:
    """The encoder at its first scale, with its first biases, as `sae.init` says."""
    init = INITS[options.init]
    scale = spec.d_in / spec.d_sae if init.scale is None else init.scale
    if init.fired is not None:
        rows_NW = jax.sharding.reshard(rows_NW, sharding.spec("rows", None))
        return _biased(spec, init.fired, params, rows_NW, scale, init.matched)
    if init.matched:
        params = _input_scaled(spec, params, key, spec.d_in ** 0.5 * entry_scale(options.normalize, spec.layers or (spec.d_in,)))
    return params.replace(W_enc=params.W_enc * scale)


def _biased(spec: SAESpec, l0: float, params: SAEParams, rows_NW: jax.Array, scale: float, matched: bool) -> SAEParams:
    """The encoder times `scale`, with biases with which each feature fires on the share l0 / d_sae (at most half) of normalised
    sample rows. matched: and times what makes the mean norm of what the features then add to b_dec that of the rows around it.

    Source: Transformer Circuits update January 2025 (l0 = 10,000). A share below one row in the sample: on its largest one.
    """
    x_ND, y_ND = columns(spec, rows_NW)
    share = min(l0 / spec.d_sae, 0.5)
    # Each feature's pre-activations over the rows, sorted: a sort along rows only, local to the feature's device.
    pre_NF = pre_activations(spec, params, x_ND)
    pre_FN = jnp.sort(jax.sharding.reshard(pre_NF, sharding.spec(None, "features")).T, axis=1)
    border_F = pre_FN[:, min(round((1 - share) * len(x_ND)), len(x_ND) - 1)]
    least_F = thresholds(params) if spec.kind == "jumprelu" else 0.0
    if matched:
        shift_F = least_F - border_F
        around = params.replace(b_dec=jnp.zeros_like(params.b_dec), b_enc=params.b_enc + shift_F)  # W_skip is 0 at this point
        recon_ND = decode(spec, around, activate(spec, around, pre_NF + shift_F))
        scale *= jnp.linalg.norm(y_ND - params.b_dec, axis=1).mean() / jnp.linalg.norm(recon_ND, axis=1).mean()
    return params.replace(W_enc=params.W_enc * scale, b_enc=(params.b_enc - border_F) * scale + least_F + 1e-6)


def _input_scaled(spec: SAESpec, params: SAEParams, key: jax.Array, norm: float) -> SAEParams:
    """Encoder divided by how much longer reconstructions of random vectors are, so that outputs start at the inputs' scale.

    norm: of the inputs; thresholds know no other scale. Source: official training code of Gao et al. 2024 (256 random vectors of
    norm 1 around b_dec, for inputs of mean norm 1).
    """
    n = 256
    probe = jax.random.normal(key, (n, spec.d_in), jnp.float32)
    probe = probe * (norm / jnp.linalg.norm(probe, axis=1, keepdims=True))
    centred = params.replace(b_dec=jnp.zeros_like(params.b_dec))  # W_skip is 0 at this point
    # Rows are repeated up to a multiple of the devices and the repeats not counted: the value is the same on every mesh.
    row = jnp.arange(n + -n % jax.sharding.get_abstract_mesh().size)
    if spec.kind == "batchtopk":  # the repeated rows must not compete
        spec = dataclasses.replace(spec, kind="topk")
    probe_ND = jax.sharding.reshard(probe[row % n], sharding.spec("rows_at_rest", None))
    recon_ND = measuring.measured(spec, centred, probe_ND, jnp.ones(len(row), bool)).recon_BD
    return params.replace(W_enc=params.W_enc * (n * norm / jnp.where(row < n, jnp.linalg.norm(recon_ND, axis=1), 0.0).sum()))
