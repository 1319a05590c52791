"""Features found by what they do: on a prompt, for an answer, on one set of prompts and not on another, by their examples' text
or by what is said of them.

Source of the ways: Templeton et al. 2024 (single prompts, prompt sets, attribution); by direction: `neighbours.nearest`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.features.effects.attribution import attribute
from saejax.features.effects.prompting import encoded, padded, special
from saejax.features.index import corpus
from saejax.features.index.reader import EXAMPLES, FeatureIndex
from saejax.lm import LM
from saejax.sae.inference import SAE

_BLOCK = 4096  # features whose examples are read at once


@dataclass(frozen=True)
class Found:
    """A feature, how well it fits (the larger the better; what it is differs by the way of search), and why in a few words."""

    feature: int
    score: float
    why: str


def activations(lm_: LM, sae: SAE, tokens_T: np.ndarray) -> np.ndarray:
    """Feature activations [T, F] on a prompt, 0 at special tokens (which an SAE has not seen)."""
    forward = corpus.forward_of(sae.cfg.hookpoints)
    x_TD = np.asarray(forward(lm_.model, padded(lm_, tokens_T)))[0]
    acts_TF = sharding.to_host(sae.encode(x_TD))[:len(tokens_T)]
    return np.where(special(lm_, tokens_T)[:, None], 0, acts_TF)


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
    found = attribute(lm_, sae, prompt, target, baseline)
    total_F = np.bincount(found.feature_P, found.attribution_P, minlength=sae.cfg.d_sae)
    most = {int(found.feature_P[p]): int(found.position_P[p]) for p in found.best(len(found.feature_P))[::-1]}
    best = np.argsort(-total_F, kind="stable")[:n]
    return [Found(int(f), float(total_F[f]), f"most at token {most[f]} {lm_.tokenizer.decode([found.tokens_T[most[f]]])!r}")
            for f in best if total_F[f] > 0]


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
                hits[feature] += wanted in "".join(map(index.token, tokens.tolist())).lower()
    share = hits / np.maximum(totals, 1)
    best = np.lexsort((-hits, -share))[:n]
    return [Found(int(f), float(share[f]), f"{int(hits[f])} of {int(totals[f])} top contexts") for f in best if hits[f]]


def by_explanation(explanations: Mapping[int, str], text: str, n: int = 10) -> list[Found]:
    """The first n features whose explanation holds `text`, in upper or lower case. Raises `FeatureIndexError` for no text."""
    if not text.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    return [Found(feature, 1.0, f"explained as {said!r}") for feature, said in sorted(explanations.items())
            if text.lower() in said.lower()][:n]
