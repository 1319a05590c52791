"""Text for a language model in short programs: its tokens with BOS once, in few shapes, and what one compiled pass gives."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from saejax.base.errors import PromptError
from saejax.lm.arch import LMConfig
from saejax.lm.model import Decoder, capture
from saejax.lm.tokenizer import Tokenizer

Text = str | Sequence[int] | np.ndarray  # a text, or token ids


def tokens_of(cfg: LMConfig, tokenizer: Tokenizer, text: Text) -> np.ndarray:
    """Token ids int32 [T] of a text, or these ids, with BOS before them, once, where the model has one.

    Raises `PromptError`: empty, longer than the model's context, ids that the model does not have.
    """
    if isinstance(text, str):
        ids = tokenizer.encode(text) if text.strip() else []
    else:
        ids = _plain(text)
    if not len(ids):
        raise PromptError("the prompt is empty; give some text")
    bos = tokenizer.bos_id
    if bos is not None and ids[0] != bos:
        ids = [bos, *ids]
    if len(ids) > cfg.max_context:
        raise PromptError(f"the prompt has {len(ids)} tokens, the model's context {cfg.max_context}; shorten it")
    return np.array(ids, np.int32)


def _plain(ids) -> list[int]:
    found = np.asarray(ids)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise PromptError(f"token ids of shape {found.shape}, {found.dtype}; give a text, or one row of whole numbers")
    return found.tolist()


def check_ids(cfg: LMConfig, tokens_T: np.ndarray) -> None:
    """Raises `PromptError` for an id that the model has no embedding of."""
    wrong = tokens_T[(tokens_T < 0) | (tokens_T >= cfg.vocab_size)]
    if wrong.size:
        raise PromptError(f"token id {int(wrong[0])}: the model has ids 0 to {cfg.vocab_size - 1}")


def padded(cfg: LMConfig, rows: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [B, T] with 0s behind, T a multiple of 16 where the context allows: few shapes, few compilations. What follows a
    token does not change it.
    """
    longest = max(map(len, rows))
    width = min(-(-longest // 16) * 16, cfg.max_context)
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


@functools.partial(jax.jit, static_argnames="names")
def values(model: Decoder, tokens_BT, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """float32 values [B, T, D] at hookpoints."""
    return {name: x_BTD.astype(jnp.float32) for name, x_BTD in capture(model, tokens_BT, names).items()}


@jax.jit
def logits(model: Decoder, tokens_BT, taps: Partial | None) -> jax.Array:
    """float32 logits [B, T, V]. taps: a `Partial` that makes them; what it carries is an argument of the program."""
    return model(tokens_BT, taps=None if taps is None else taps()).astype(jnp.float32)
