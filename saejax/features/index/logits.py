"""What a feature's direction does to the next token, seen straight through the final norm and the unembedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from saejax.base import sharding
from saejax.lm import LM
from saejax.lm.hookpoints import EMBED, FINAL
from saejax.sae.inference import SAE

_ADDED = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
_BLOCK_BYTES = 64 << 20


def residual_columns(sae: SAE) -> slice | None:
    """The decoder's columns that are written into the residual stream; None where what is written lies elsewhere (hidden units
    of an MLP, heads, normed values), and has no direct effect of this form. Of several hookpoints the last.
    """
    name = sae.cfg.targets[-1]
    if name not in (EMBED, FINAL) and name.split(".")[-1] not in _ADDED:
        return None
    width = sae.cfg.spec.width_out
    return slice(width - (sae.cfg.layers[-1] if sae.cfg.layers else width), width)


def logit_effects(lm_: LM, sae: SAE, first: int, last: int, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(token [f, 2 n], effect [f, 2 n]) of features first .. last - 1: the n largest effects falling, then the n least rising.

    effect = U (g * d) less its mean over the tokens, which no softmax sees; U [V, D] the unembedding, d the decoder row (of a
    LayerNorm d - mean d), g the gain of the final norm: the first-order change of the logits per unit of activation, but for the
    norm's 1 / sigma, which is the same for all tokens. Rows of U that belong to no token are left out. None
    where the decoder does not write into the residual stream.
    """
    columns = residual_columns(sae)
    if columns is None or columns.stop - columns.start != lm_.cfg.d_model:
        return None
    normed = sae.cfg.targets[-1] == FINAL
    block = max(1, min(last - first, _BLOCK_BYTES // (4 * lm_.cfg.vocab_size)))
    n = min(n, int(lm_.known_V.sum()))
    found = []
    W = rows_of(sae, sae.params.W_dec, first, last)[:, columns]
    for start in range(0, len(W), block):
        part = np.pad(W[start:start + block], ((0, max(0, start + block - len(W))), (0, 0)))
        found.append([np.asarray(x)[:len(W) - start] for x in _effects(lm_.model, part, lm_.known_V, normed=normed, n=n)])
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def rows_of(sae: SAE, value: jax.Array, first: int, last: int) -> np.ndarray:
    """Rows first .. last - 1 of an array that is split by feature, on every host; a collective where it spans processes."""
    return rows_at(sae, value, np.arange(first, last))


def rows_at(sae: SAE, value: jax.Array, numbers) -> np.ndarray:
    """`rows_of` these features, in this order."""
    if sae.mesh is None:
        return np.asarray(value[np.asarray(numbers)])
    with jax.set_mesh(sae.mesh):
        return sharding.to_host(_gathered(value, np.asarray(numbers)))


@jax.jit
def _gathered(value, rows):
    return value.at[rows].get(out_sharding=jax.P())


@functools.partial(jax.jit, static_argnames=("normed", "n"))
def _effects(model, W_fD, known_V, *, normed: bool, n: int):
    cfg = model.cfg
    d_fD = W_fD.astype(jnp.float32)
    gain_D = model.whole["final_norm"][...].astype(jnp.float32) + cfg.norm_offset
    if cfg.norm == "layer" and not normed:
        d_fD = d_fD - d_fD.mean(-1, keepdims=True)
    if not (normed and cfg.norm == "layer"):  # there a LayerNorm's gain is already in the value
        d_fD = d_fD * gain_D
    table_VD = model.whole["embed" if cfg.tied_embeddings else "unembed"][...].astype(jnp.float32)
    effect_fV = jnp.einsum("fd,vd->fv", d_fD, table_VD, precision="highest")
    effect_fV = effect_fV - effect_fV.mean(-1, keepdims=True, where=known_V)
    high, high_ids = lax.top_k(jnp.where(known_V, effect_fV, -jnp.inf), n)
    low, low_ids = lax.top_k(jnp.where(known_V, -effect_fV, -jnp.inf), n)
    return jnp.concatenate([high_ids, low_ids], 1), jnp.concatenate([high, -low], 1)
