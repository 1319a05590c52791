"""Text from a decoder, token by token: a KV cache, one compiled program, taps live at every step.

Prompts of different lengths go in one batch, padded on the left, so that every row's newest token sits in the same slot.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from saejax.base.errors import LMError
from saejax.lm.model import Cache, Decoder, Pass, Tap
from saejax.lm.rope import Rope, tables


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; `temperature` 0 takes the most likely one (greedy), whatever `top_p` is.

    With `top_p` < 1 only the most likely tokens whose probability together first reaches `top_p` are drawn from
    (nucleus sampling, Holtzman et al. 2020).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < float("inf") and 0.0 < self.top_p <= 1.0):
            raise LMError(
                f"sampling: temperature={self.temperature!r} must be at least 0 and finite, "
                f"top_p={self.top_p!r} above 0 and at most 1"
            )


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    taps: Mapping[str, Tap] | Partial | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, up to `max_new_tokens`; a row ends after its first id in `stop_ids`.

    `taps` are those of `Decoder.__call__`. For the prompts they see `[B, T, width]`, T the longest prompt rounded up to
    a multiple of 16 (at the final norm `[B, 1, width]`, the last token only), for each new token `[B, 1, width]`; with a
    second parameter they also get the tokens' positions (below 0: padding). They are traced under `jit`: what a tap
    changes, it changes at every step, but it cannot keep values. The same call with the same seed gives the same text.

    Without taps the program is compiled once for each model shape, number of prompts, T, `max_new_tokens`, `sampling` and
    `stop_ids`; with taps at every call, so that nothing a tap refers to is kept: give many prompts in one call. A
    `jax.tree_util.Partial` that makes the mapping is compiled once for each function and shapes, and what it carries is an
    argument of the program: arrays that a tap merely refers to become constants in it, which large ones must not. Phi-3's
    longrope picks its factors once for the whole batch, by the longest prompt plus `max_new_tokens`.

    Raises LMError for empty prompts, ids outside the vocabulary, and prompts too long for the model's context.
    """
    sampling = sampling or Sampling()
    made_by = (taps,) if isinstance(taps, Partial) else ()
    taps = model.check_taps(taps() if made_by else taps, None)
    tokens_BT, start_B = _left_padded(model, prompts, max_new_tokens)
    if not max_new_tokens:
        return [[] for _ in prompts]
    how = (max_new_tokens, sampling, tuple(sorted(set(stop_ids))))
    run = _program(*how, taps) if taps and not made_by else _untapped(*how)
    table = tables(model.cfg, tokens_BT.shape[1] + max_new_tokens, max(map(len, prompts)) + max_new_tokens)
    ids_BN, made = run(model, table, tokens_BT, start_B, jax.random.key(seed), *made_by)
    rows = np.asarray(ids_BN)[:, : int(made)].tolist()
    return [_cut(row, set(stop_ids)) for row in rows]


def _left_padded(model: Decoder, prompts: Sequence[Sequence[int]], new: int) -> tuple[np.ndarray, np.ndarray]:
    cfg = model.cfg
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or not all(lengths):
        raise LMError("generate: every prompt needs at least one token, such as the tokenizer's bos_id")
    bad = sorted({int(i) for prompt in prompts for i in prompt if not 0 <= int(i) < cfg.vocab_size})
    if bad:
        raise LMError(f"generate: token ids {bad[:5]} are outside the model's vocabulary of {cfg.vocab_size}")
    longest = max(lengths)
    if new < 0 or longest + new > cfg.max_context:
        raise LMError(f"generate: {longest} prompt tokens and {new} new ones do not fit the context of {cfg.max_context}")
    width = min(-(-longest // 16) * 16, cfg.max_context - new)
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens_BT, np.asarray([width - n for n in lengths], np.int32)


def _cut(row: list[int], stop_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
    return row[: end + 1]


def _program(new: int, sampling: Sampling, stop_ids: tuple[int, ...], taps: Mapping[str, Tap]) -> Callable:
    return jax.jit(functools.partial(_generate, new=new, sampling=sampling, stop_ids=stop_ids, taps=taps))


@functools.lru_cache(maxsize=32)
def _untapped(new: int, sampling: Sampling, stop_ids: tuple[int, ...]) -> Callable:
    return _program(new, sampling, stop_ids, {})


def _generate(
    model: Decoder,
    table: Rope | None,
    tokens_BT: Array,
    start_B: Array,
    key: Array,
    made_by: Partial | None = None,
    *,
    new: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    taps: Mapping[str, Tap],
) -> tuple[Array, Array]:
    """(ids `[B, new]`, how many columns were made): the prompts in one pass, then one pass per token."""
    batch, width = tokens_BT.shape
    capacity = width + new
    stops = jnp.asarray(stop_ids or (-1,))

    def forward(tokens_BT: Array, first_slot: Array, cache: Cache) -> tuple[Array, Cache]:
        slots_T = first_slot + jnp.arange(tokens_BT.shape[1])
        positions_BT = slots_T - start_B[:, None]
        here = Pass(_at(table, positions_BT), slots_T, positions_BT, start_B)
        logits_B1V, cache = model.run(tokens_BT, here, taps if made_by is None else made_by(), cache=cache, last_only=True)
        return logits_B1V[:, 0].astype(jnp.float32), cache

    def step(state):
        n, token_B, done_B, ids_BN, cache = state
        logits_BV, cache = forward(token_B[:, None], width + n - 1, cache)
        return taken(n, logits_BV, done_B, ids_BN, cache)

    def taken(n, logits_BV, done_B, ids_BN, cache):
        token_B = _pick(logits_BV, sampling, jax.random.fold_in(key, n))
        ids_BN = jax.lax.dynamic_update_slice(ids_BN, token_B[:, None], (0, n))
        return n + 1, token_B, done_B | (token_B[:, None] == stops).any(-1), ids_BN, cache

    logits_BV, cache = forward(tokens_BT, jnp.int32(0), _empty(model, batch, capacity, start_B))
    state = taken(jnp.int32(0), logits_BV, jnp.zeros(batch, bool), jnp.zeros((batch, new), jnp.int32), cache)
    made, _, _, ids_BN, _ = jax.lax.while_loop(lambda s: (s[0] < new) & ~s[2].all(), step, state)
    return ids_BN, made


def _empty(model: Decoder, batch: int, capacity: int, start_B: Array) -> Cache:
    cfg = model.cfg
    shape = (cfg.n_layers, batch, capacity, cfg.n_kv_heads, cfg.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype), start_B)


def _at(table: Rope | None, positions_BT: Array) -> Rope | None:
    """Rope tables `[R, B, T, 1, 1, r/2]` at each row's own positions; padding takes position 0."""
    positions_BT = jnp.maximum(positions_BT, 0)
    return jax.tree.map(lambda x: x[:, positions_BT], table)


def _pick(logits_BV: Array, sampling: Sampling, key: Array) -> Array:
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def _nucleus(logits_BV: Array, top_p: float) -> Array:
    """-inf for all but the most likely tokens whose probability before the last of them is below `top_p`."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    inside_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
    least_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
