"""One threshold in place of the k largest of each row: measured by counting, so that as many features fire on average."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.base import sharding
from saejax.sae.inference import SAE
from saejax.sae.model import pre_activations
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.row_norm import normalise_rows
from saejax.sae.select_batch import PARTS, STEPS

_INFINITE = 0x7F800000
_TILE, _LEAST, _MOST = 2**24, 256, 4096  # pre-activations of a device in memory at once; its rows, between these bounds
_FD, _F, _BD, _B = sharding.spec("features", None), sharding.spec("features"), sharding.spec("rows", None), sharding.spec("rows")
_DEVICES, _SAME = sharding.spec("rows_at_rest", None), sharding.spec()


@dataclass(frozen=True)
class Calibration:
    """factor: what thresholds are multiplied by. rows: on how many it was measured. k: features per row that were asked for;
    l0: that then fire.
    """

    factor: float
    rows: int
    k: int
    l0: float


def calibrate(sae: SAE, rows_ND: np.ndarray, k: int, advance: Callable[[int], None] = lambda rows: None) -> Calibration:
    """The factor >= 0 of a jumprelu SAE's thresholds with which as many features fire on N raw rows as may: at most N x k. Half
    way between the largest value that does not fire and the least one that does, so that rounding moves neither.

    A feature fires where pre > factor * threshold and pre > 0. So N x k fire where no two values tie at the border, fewer where
    they tie or fewer pre-activations are positive (then the factor is 0). Counts are exact, of the pre-activations as the SAE
    computes them in float32; only those of a tile of rows are in memory. Cost: `passes()` times the encoder's product over all
    rows; no communication but the counts of each device, once a pass. advance: told the rows of every tile of every pass.
    """
    limit, low, counts = len(rows_ND) * k, 0, np.zeros(PARTS, np.int64)
    for step in STEPS:
        # The wanted bits are at least low + i step exactly where more than `limit` exceed the value of low + i step - 1.
        bits = np.minimum(low + step * np.arange(1, PARTS + 1) - 1, _INFINITE).astype(np.int32)
        counts = _counts(sae, rows_ND, bits.view(np.float32), advance)
        n = int((counts > limit).sum())
        low += n * step
    factor = np.int32(low).view(np.float32)
    with_next = np.float32(0.5) * (factor + _least(sae, rows_ND, factor, advance))
    factor = with_next if factor < with_next < np.inf and factor > 0 else factor
    return Calibration(float(factor), len(rows_ND), k, int(counts[n]) / len(rows_ND))


def passes() -> int:
    """How often `calibrate` goes over all rows."""
    return len(STEPS) + 1


def scaled(sae: SAE, factor: float) -> SAE:
    """The SAE with its thresholds times `factor`."""
    with _mesh_of(sae):
        threshold_F = sae.params.per_feature["threshold"] * np.float32(factor)
    return SAE(sae.params.replace(per_feature=sae.params.per_feature | {"threshold": threshold_F}), sae.cfg, sae.mesh)


def _counts(sae: SAE, rows_ND: np.ndarray, factors: np.ndarray, advance: Callable[[int], None]) -> np.ndarray:
    """How many features fire over all rows with each factor: int64 [T]. Each device counts for itself, in two words."""
    devices = sae.mesh.size if sae.mesh else 1
    zero = np.zeros((devices, len(factors)), np.uint32)
    with _mesh_of(sae):
        total = (_placed(sae, zero, "rows_at_rest"), _placed(sae, zero, "rows_at_rest"))
        for x_BD, n in _tiles(sae, rows_ND):
            before = total
            total = _added(sae.cfg.spec, sae.cfg.input_norm, sae.params, _placed(sae, x_BD, "rows"),
                           _placed(sae, np.arange(len(x_BD)) < n, "rows"), factors, before)
            jax.block_until_ready(before)  # one tile is prepared while another is counted, and no more
            advance(n)
    low, high = (sharding.to_host(value).astype(np.int64) for value in total)
    return (low + (high << 32)).sum(0)


def _least(sae: SAE, rows_ND: np.ndarray, factor: np.float32, advance: Callable[[int], None]) -> np.float32:
    """The least multiple of its threshold that a feature has which fires with this factor; infinite where none does."""
    least = np.float32(np.inf)
    with _mesh_of(sae):
        for x_BD, n in _tiles(sae, rows_ND):
            found = _least_of(sae.cfg.spec, sae.cfg.input_norm, sae.params, _placed(sae, x_BD, "rows"),
                              _placed(sae, np.arange(len(x_BD)) < n, "rows"), factor)
            least = min(least, np.float32(sharding.to_host(found).min()))
            advance(n)
    return least


def _tiles(sae: SAE, rows_ND: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """(rows, how many of them count): parts of equal size, the last one filled up with zeros."""
    data, dict_ = (sae.mesh.shape["data"], sae.mesh.shape["dict"]) if sae.mesh else (1, 1)
    size = data * int(np.clip(_TILE * dict_ // sae.cfg.d_sae, _LEAST, _MOST))
    size = min(size, -(-len(rows_ND) // data) * data)
    for start in range(0, len(rows_ND), size):
        x_BD = rows_ND[start:start + size, :sae.cfg.d_in]
        yield np.pad(x_BD, ((0, size - len(x_BD)), (0, 0))), len(x_BD)


def _mesh_of(sae: SAE):
    return jax.set_mesh(sae.mesh) if sae.mesh else contextlib.nullcontext()


def _placed(sae: SAE, value: np.ndarray, rows: str) -> jax.Array:
    if sae.mesh is None:
        return jnp.asarray(value)
    return sharding.place(value, sharding.sharding(sae.mesh, rows, *[None] * (value.ndim - 1)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _least_of(spec: SAESpec, norm: str, params: SAEParams, x_BD, counted_B, factor):
    """The least pre / threshold that fires on each device, [devices, 1]."""
    def local(W_enc, b_enc, b_dec, threshold_F, x_BD, counted_B, factor, shards):
        pre_BF = _pre(spec, norm, W_enc, b_enc, b_dec, x_BD)
        fires_BF = (pre_BF > 0) & counted_B[:, None] & (pre_BF > factor * threshold_F)
        return jnp.where(fires_BF, pre_BF / threshold_F, jnp.inf).min()[None, None]

    run = sharding.on_shards(local, (_FD, _F, _SAME, _F, _BD, _B, _SAME), _DEVICES)
    return run(params.W_enc, params.b_enc, params.b_dec, params.per_feature["threshold"], x_BD, counted_B, factor)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _added(spec: SAESpec, norm: str, params: SAEParams, x_BD, counted_B, factors_T, total):
    """The counts of each device, [devices, T] in a low and a high word, after one more tile."""
    def local(W_enc, b_enc, b_dec, threshold_F, x_BD, counted_B, factors_T, low, high, shards):
        pre_BF = _pre(spec, norm, W_enc, b_enc, b_dec, x_BD)
        fires_BF = (pre_BF > 0) & counted_B[:, None]
        n_T = lax.map(lambda factor: (fires_BF & (pre_BF > factor * threshold_F)).sum(dtype=jnp.uint32), factors_T)
        grown = low + n_T
        return grown, high + (grown < low)

    run = sharding.on_shards(local, (_FD, _F, _SAME, _F, _BD, _B, _SAME, _DEVICES, _DEVICES), (_DEVICES, _DEVICES))
    return run(params.W_enc, params.b_enc, params.b_dec, params.per_feature["threshold"], x_BD, counted_B, factors_T, *total)


def _pre(spec: SAESpec, norm: str, W_enc: jax.Array, b_enc: jax.Array, b_dec: jax.Array, x_BD: jax.Array) -> jax.Array:
    return pre_activations(spec, SAEParams(W_enc=W_enc, b_enc=b_enc, W_dec=None, b_dec=b_dec), normalise_rows(norm, x_BD)[0])
