"""Attention cores: exact softmax over all keys, whole for short contexts, in chunks of queries for long ones.

Shapes: B rows, T queries, S keys, K key/value heads, G query heads per key/value head, h head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Above this many tokens the scores are made for CHUNK queries at a time: [B, K, G, CHUNK, S] instead of [.., T, S].
WHOLE_UP_TO = 1024
CHUNK = 256


class Scoring(NamedTuple):
    """How one layer scores: `scale`, `window` (0: none) may differ by layer and then be traced; `softcap` 0: none."""

    scale: float | Array
    window: int | Array
    softcap: float
    precision: str | None


def attend(
    q_BTKGh: Array,
    k_BSKh: Array,
    v_BSKh: Array,
    how: Scoring,
    query_T: Array,
    key_S: Array,
    start_B: Array | None = None,
) -> Array:
    """Values `[B, T, K, G, h]` mixed by softmax(c tanh(scale q k / c)) over the visible keys; softmax in float32.

    Query at slot t sees key slots s <= t with t - s < window, and s >= `start_B` of its row where that is given (left
    padding). A query that sees nothing gets a mean over all keys, not NaN.
    """
    scores = jnp.einsum(
        "BTKGh,BSKh->BKGTS", q_BTKGh, k_BSKh, precision=how.precision, preferred_element_type=jnp.float32
    )
    scores = scores * how.scale
    if how.softcap:
        scores = how.softcap * jnp.tanh(scores / how.softcap)
    visible = _visible(how.window, query_T, key_S)
    if start_B is not None:
        visible = (visible & (key_S >= start_B[:, None, None]))[:, None, None]
    probs = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("BKGTS,BSKh->BTKGh", probs.astype(v_BSKh.dtype), v_BSKh, precision=how.precision)


def _visible(window: int | Array, query_T: Array, key_S: Array) -> Array:
    distance_TS = query_T[:, None] - key_S
    causal = distance_TS >= 0
    if isinstance(window, int) and window == 0:
        return causal
    return causal & ((distance_TS < window) | (window == 0))


def causal(
    q_BTKGh: Array, k_BTKh: Array, v_BTKh: Array, how: Scoring, start_B: Array | None = None
) -> Array:
    """Attention of a context to itself, `[B, T, K, G, h]`.

    Above `WHOLE_UP_TO` tokens a scan over chunks of queries, each with its exact softmax; the chunk is computed again
    for the gradient, so that neither pass holds T x T scores.
    """
    length = q_BTKGh.shape[1]
    slots_T = jnp.arange(length)
    if length <= WHOLE_UP_TO:
        return attend(q_BTKGh, k_BTKh, v_BTKh, how, slots_T, slots_T, start_B)
    pad = -length % CHUNK
    padded = jnp.pad(q_BTKGh, [(0, 0), (0, pad), (0, 0), (0, 0), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(padded.shape[0], -1, CHUNK, *padded.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        return attend(chunk[0], k_BTKh, v_BTKh, how, chunk[1], slots_T, start_B)

    mixed = jax.lax.map(one, (chunks, jnp.arange(length + pad).reshape(-1, CHUNK)))
    return jnp.moveaxis(mixed, 0, 1).reshape(padded.shape)[:, :length]
