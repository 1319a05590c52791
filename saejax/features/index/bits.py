"""Integer arithmetic that makes an index independent of batches and devices: hashes of rows, bins of floats, sorted lists.

Everything here is exact on integers, so that the order in which rows are seen cannot show in a result.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.base.fingerprints import mix, unmix

EMPTY = np.uint32(0xFFFFFFFF)   # key of a free slot; the one (feature, row) whose hash it is, is never sampled
_MANTISSA = 23


def row_key(row):
    """The priority of a row, the same for all features: those with the least keys are a uniform sample of any set of rows."""
    return mix(row ^ np.uint32(0x9E3779B9))


def row_of_key(key: np.ndarray) -> np.ndarray:
    """The row of a `row_key`."""
    return unmix(key) ^ np.uint32(0x9E3779B9)


def pair_key(feature, row):
    """The priority of a row for one feature, unrelated to that for another."""
    return mix(row ^ mix(feature.astype(np.uint32) + np.uint32(0x7F4A7C15)))


def row_of_pair_key(feature: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The row of a `pair_key`."""
    return unmix(key) ^ mix(np.asarray(feature).astype(np.uint32) + np.uint32(0x7F4A7C15))


def code(value: jax.Array) -> jax.Array:
    """int32 number of a positive float's log-spaced bin: four in an octave, at 1, 1.25, 1.5 and 1.75 times a power of two."""
    return (lax.bitcast_convert_type(value, jnp.uint32) >> (_MANTISSA - 2)).astype(jnp.int32)


def code_edge(number: np.ndarray) -> np.ndarray:
    """The least float of a `code`; below the smallest code 0."""
    bits = np.maximum(np.asarray(number, np.int64), 0).astype(np.uint32) << np.uint32(_MANTISSA - 2)
    return bits.view(np.float32)


def exponent(value: jax.Array) -> jax.Array:
    """The biased binary exponent of a positive float, int32."""
    return (lax.bitcast_convert_type(value, jnp.uint32) >> _MANTISSA).astype(jnp.int32)


def linear_bin(value: jax.Array, top: jax.Array, bins: int) -> jax.Array:
    """floor(bins value / 2^(e + 1)), where 2^e <= top < 2^(e + 1) and value <= top; `bins` is a power of two. Exact."""
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    mantissa = (bits & jnp.uint32(0x7FFFFF)) | jnp.uint32(0x800000)
    shift = _MANTISSA + 1 - (bins.bit_length() - 1) + (exponent(top) - exponent(value))
    return (mantissa >> jnp.clip(shift, 0, 31).astype(jnp.uint32)).astype(jnp.int32)


def _before(a: tuple, b: tuple) -> jax.Array:
    """Lexicographic a < b over the keys; the last entry of each is a payload."""
    less = a[-2] < b[-2]
    for x, y in zip(reversed(a[:-2]), reversed(b[:-2]), strict=True):
        less = (x < y) | ((x == y) & less)
    return less


def _exchanged(lists: tuple, distance: int) -> tuple:
    """One round of compare and exchange between entries `distance` apart."""
    shape = lists[0].shape
    halves = [x.reshape(*shape[:-1], -1, 2, distance) for x in lists]
    low, high = tuple(x[..., 0, :] for x in halves), tuple(x[..., 1, :] for x in halves)
    keep = _before(low, high)
    return tuple(jnp.stack([jnp.where(keep, a, b), jnp.where(keep, b, a)], axis=-2).reshape(shape)
                 for a, b in zip(low, high, strict=True))


def smallest(a: tuple, b: tuple) -> tuple:
    """The n smallest of two rising lists [..., n] each, rising; n is a power of two. Lists are (key, ..., payload).

    min(a_i, b_(n-1-i)) are the n smallest, as a bitonic sequence that log2 n rounds of exchanges sort (Batcher 1968): all of it
    elementwise, whatever the number of lists.
    """
    n = a[0].shape[-1]
    flipped = tuple(jnp.flip(x, -1) for x in b)
    keep = _before(a, flipped)
    out = tuple(jnp.where(keep, x, y) for x, y in zip(a, flipped, strict=True))
    distance = n // 2
    while distance:
        out = _exchanged(out, distance)
        distance //= 2
    return out


def ranks(segment_P: jax.Array) -> jax.Array:
    """Place of every entry within its segment; `segment_P` rises."""
    place_P = jnp.arange(len(segment_P), dtype=jnp.int32)
    begins_P = jnp.concatenate([jnp.ones(1, bool), segment_P[1:] != segment_P[:-1]])
    return place_P - lax.cummax(jnp.where(begins_P, place_P, 0))
