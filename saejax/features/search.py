"""Features found by what they do: on a prompt, for an answer, on one set of prompts and not on another, by their examples' text.

Source of the ways: Templeton et al. 2024 (single prompts, prompt sets, attribution); by direction: `neighbours.nearest`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from saejax import sharding
from saejax.errors import FeatureIndexError
from saejax.features import corpus
from saejax.features.index import EXAMPLES, FeatureIndex
from saejax.lm import LM
from saejax.sae.inference import SAE

_BLOCK = 4096  # features whose examples are read at once


@dataclass(frozen=True)
class Found:
    """A feature, how well it fits (the larger the better; what it is differs by the way of search), and why in a few words."""

    feature: int
    score: float
    why: str


def encoded(lm_: LM, prompt: str) -> np.ndarray:
    """Token ids [T] of a prompt, BOS before it where the model has one. Raises `FeatureIndexError`: empty, or too long."""
    if not prompt.strip():
        raise FeatureIndexError("search: the prompt is empty; give some text")
    tokens = [*([lm_.tokenizer.bos_id] if lm_.tokenizer.bos_id is not None else []), *lm_.tokenizer.encode(prompt)]
    if len(tokens) > lm_.cfg.max_context:
        raise FeatureIndexError(f"search: the prompt has {len(tokens)} tokens, the model's context {lm_.cfg.max_context}; "
                                "shorten it")
    return np.array(tokens, np.int32)


def activations(lm_: LM, sae: SAE, tokens_T: np.ndarray) -> np.ndarray:
    """Feature activations [T, F] on a prompt, 0 at special tokens (which an SAE has not seen)."""
    room = -len(tokens_T) % 16  # few shapes, few compilations; what follows a token does not change it
    forward = corpus.forward_of(sae.cfg.hookpoints)
    x_TD = np.asarray(forward(lm_.model, np.pad(tokens_T, (0, min(room, lm_.cfg.max_context - len(tokens_T))))[None]))[0]
    acts_TF = sharding.to_host(sae.encode(x_TD))[:len(tokens_T)]
    return np.where(np.isin(tokens_T, sorted(lm_.tokenizer.special_ids))[:, None], 0, acts_TF)


def by_prompt(lm_: LM, sae: SAE, prompt: str, n: int = 10, *, last: int | None = None) -> list[Found]:
    """The n features with the highest activation on a prompt, each at its highest token.

    last: only the last so many tokens count. Of equal ones the lower number comes first.
    """
    tokens_T = encoded(lm_, prompt)
    acts_TF = activations(lm_, sae, tokens_T)
    acts_TF[:len(tokens_T) - (last or len(tokens_T))] = 0
    best = np.argsort(-acts_TF.max(0), kind="stable")[:n]
    at = acts_TF.argmax(0)
    return [Found(int(f), float(acts_TF[at[f], f]), f"token {at[f]} {lm_.tokenizer.decode([tokens_T[at[f]]])!r}")
            for f in best if acts_TF[at[f], f] > 0]


def by_attribution(lm_: LM, sae: SAE, prompt: str, target: str, baseline: str | None = None, n: int = 10) -> list[Found]:
    """The n features that speak most for `target` as the next token, against `baseline` (without one: against the mean logit).

    attribution_i = sum over positions of a_i d_i . grad_x (logit(target) - logit(baseline)) at the last token, x what the SAE
    reconstructs: to first order what the difference loses without the feature. Source: Templeton et al. 2024; Transformer
    Circuits update March 2024. Raises `FeatureIndexError` where target or baseline is not one token.
    """
    tokens_T = encoded(lm_, prompt)
    ids = [_single_token(lm_, text) for text in (target, *([baseline] if baseline else []))]
    acts_TF = activations(lm_, sae, tokens_T)
    gradient_TD = _gradient(lm_, sae, tokens_T, ids)
    attribution_TF = acts_TF * (gradient_TD @ sharding.to_host(sae.W_dec).T)
    total_F, at = attribution_TF.sum(0), np.abs(attribution_TF).argmax(0)
    best = np.argsort(-total_F, kind="stable")[:n]
    return [Found(int(f), float(total_F[f]), f"most at token {at[f]} {lm_.tokenizer.decode([tokens_T[at[f]]])!r}")
            for f in best if total_F[f] > 0]


def _single_token(lm_: LM, text: str) -> int:
    ids = lm_.tokenizer.encode(text)
    if len(ids) != 1:
        raise FeatureIndexError(f"search: {text!r} is {len(ids)} tokens of this model; give one (a leading blank often matters)")
    return ids[0]


def _gradient(lm_: LM, sae: SAE, tokens_T: np.ndarray, ids: list[int]) -> np.ndarray:
    """[T, d_out] of the logit difference at the last token with respect to what the SAE reconstructs."""
    names = sae.cfg.targets

    def difference(added, model):
        taps = {name: (lambda x, name=name: x + added[name].astype(x.dtype)) for name in names}
        logits_V = model(tokens_T[None], taps=taps)[0, -1].astype(jnp.float32)
        return logits_V[ids[0]] - (logits_V[ids[1]] if len(ids) > 1 else logits_V.mean())

    widths = sae.cfg.layers if sae.cfg.layers and not sae.cfg.target else (sae.cfg.spec.width_out,)
    zero = {name: jnp.zeros((1, len(tokens_T), width)) for name, width in zip(names, widths, strict=True)}
    found = jax.jit(jax.grad(difference))(zero, lm_.model)
    return np.concatenate([np.asarray(found[name])[0] for name in names], axis=-1)


def by_sets(lm_: LM, sae: SAE, positives: Sequence[str], negatives: Sequence[str] = (), n: int = 10) -> list[Found]:
    """The n features that tell positives from negatives best.

    score = share of positives on which a feature is active somewhere - share of negatives, and as a tie-break below 1 / 1000 the
    least of its highest activations on the positives, relative to the other features'. Above 1: all positives, no negative.
    """
    if not positives:
        raise FeatureIndexError("search: no positive prompts; give at least one")
    peaks_PF, peaks_NF = (np.stack([activations(lm_, sae, encoded(lm_, prompt)).max(0) for prompt in prompts])
                          if prompts else np.zeros((0, sae.cfg.d_sae)) for prompts in (positives, negatives))
    on, off = (peaks_PF > 0).sum(0), (peaks_NF > 0).sum(0)
    least = peaks_PF.min(0)
    score = on / len(positives) - off / max(1, len(negatives)) + least / max(float(least.max()), 1e-30) / 1000
    best = np.argsort(-score, kind="stable")[:n]
    return [Found(int(f), float(score[f]), f"active on {on[f]} of {len(positives)} positives, {off[f]} of {len(negatives)} "
                  f"negatives, mean activation {peaks_PF[:, f].mean():.4g}") for f in best if on[f] > 0]


def by_text(index: FeatureIndex, text: str, n: int = 10) -> list[Found]:
    """The n features most of whose top contexts hold `text` where they fire: from 8 tokens before the example to 3 behind it.

    Upper and lower case are one, blanks count. score: the share of the top contexts. Raises `FeatureIndexError` for no text.
    """
    wanted = text.lower()
    if not wanted.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    hits, totals = np.zeros(index.features), np.zeros(index.features)
    for first in range(0, index.features, _BLOCK):
        table = index.table(EXAMPLES, first, min(first + _BLOCK, index.features))
        columns = (table[name].to_numpy() for name in ("feature", "interval", "context", "position"))
        for feature, interval, context, position in zip(*columns, strict=True):
            if interval == 0:
                tokens = index.tokens_NT[context, max(0, position - 8):position + 4]
                totals[feature] += 1
                hits[feature] += wanted in "".join(index.vocabulary[t] for t in tokens).lower()
    share = hits / np.maximum(totals, 1)
    best = np.lexsort((-hits, -share))[:n]
    return [Found(int(f), float(share[f]), f"{int(hits[f])} of {int(totals[f])} top contexts") for f in best if hits[f]]
