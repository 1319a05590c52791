"""Rotary position embedding: frequencies of every scaling, tables, and the rotation."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from saejax.lm.arch import LMConfig, RopeConfig


class Rope(NamedTuple):
    """Cosine and sine tables, float32, `[..., T, 1, 1, r/2]` for the r rotated dimensions of a head."""

    cos: Array
    sin: Array


def frequencies(rope: RopeConfig, length: int) -> np.ndarray:
    """Frequencies `[r/2]` in float32, rounded step by step as transformers rounds them; `length` is the text's."""
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    power = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    if rope.scaling == "longrope":
        factors = rope.long_factors if length > rope.original_context else rope.short_factors
        return np.float32(1) / (np.asarray(factors, np.float32) * power)
    plain = np.float32(1) / power
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor)
    if rope.scaling == "yarn":
        return _yarn(rope, power)
    return _llama3(rope, plain) if rope.scaling == "llama3" else plain


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Wavelengths above original/low are stretched by `factor`, below original/high kept, between them blended."""
    wavelength = np.float32(2 * math.pi) / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (np.float32(rope.original_context) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / np.float32(rope.factor) + smooth * plain
    stretched = np.where(wavelength > rope.original_context / low, plain / np.float32(rope.factor), blended)
    return np.where(wavelength < rope.original_context / high, plain, stretched).astype(np.float32)


def _yarn(rope: RopeConfig, power: np.ndarray) -> np.ndarray:
    """YaRN (Peng et al. 2023): frequencies that turn often in the original context stay, rare ones are divided by `factor`."""
    low, high = (
        rope.dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    stretched = np.float32(1) / (np.float32(rope.factor) * power)
    return (stretched * (1 - kept) + np.float32(1) / power * kept).astype(np.float32)


def tables(cfg: LMConfig, length: int, text: int | None = None) -> Rope | None:
    """Tables of every rope of the model for positions 0..length-1, `[R, T, 1, 1, r/2]`; None when nothing rotates.

    `text` is the length of the text, by which longrope picks its factors, where the tables are longer. A model with
    layers that do not rotate has one more table, the last, of angle 0. Frequency and angle are rounded to float32 as
    transformers does; cosine and sine of that angle are then taken in float64, because the float32 functions of
    accelerators lose digits at large angles.
    """
    if not cfg.ropes:
        return None
    position = np.arange(length, dtype=np.float32)[:, None]
    angles = [(position * frequencies(rope, text or length)).astype(np.float64) for rope in cfg.ropes]
    factors = [rope.attention_factor for rope in cfg.ropes]
    if -1 in cfg.layer_rope:
        angles, factors = [*angles, np.zeros_like(angles[0])], [*factors, 1.0]
    angle = np.stack(angles)[:, :, None, None, :]
    factor = np.asarray(factors)[:, None, None, None, None]
    return Rope(jnp.asarray(np.cos(angle) * factor, jnp.float32), jnp.asarray(np.sin(angle) * factor, jnp.float32))


def table_index(cfg: LMConfig) -> tuple[int, ...]:
    """For each layer, which of `tables` it uses."""
    return tuple(len(cfg.ropes) if index < 0 else index for index in cfg.layer_rope)


def rotate(x: Array, rope: Rope) -> Array:
    """Rotates the first r dimensions of `x [B, T, K, n, h]`, pairs (i, i + r/2), in float32, in the dtype of `x`."""
    r = 2 * rope.cos.shape[-1]
    first, second = jnp.split(x[..., :r].astype(jnp.float32), 2, axis=-1)
    turned = [first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin]
    rest = [x[..., r:].astype(jnp.float32)] if r < x.shape[-1] else []
    return jnp.concatenate([*turned, *rest], axis=-1).astype(x.dtype)
