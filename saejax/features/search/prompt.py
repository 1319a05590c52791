"""Features by what they do on one prompt: how active they are, or how much they speak for an answer.

Source: Templeton et al. 2024 (single prompts, attribution).
"""

import numpy as np

from saejax.base import sharding
from saejax.features.effects.attribution import attribute
from saejax.features.effects.prompting import encoded, padded, special
from saejax.features.index import corpus
from saejax.features.search.found import Found
from saejax.lm import LM
from saejax.sae.inference import SAE


def activations(lm_: LM, sae: SAE, tokens_T: np.ndarray) -> np.ndarray:
    """Feature activations [T, F] on a prompt, 0 at special tokens (which an SAE has not seen)."""
    forward = corpus.forward_of(sae.cfg.hookpoints)
    x_TD = np.asarray(forward(lm_.model, padded(lm_, tokens_T)))[0]
    acts_TF = sharding.to_host(sae.encode(x_TD))[:len(tokens_T)]
    return np.where(special(lm_, tokens_T)[:, None], 0, acts_TF)


def by_prompt(lm_: LM, sae: SAE, prompt: str, n: int = 10, *, last: int | None = None,
              maxima: np.ndarray | None = None) -> list[Found]:
    """The n features with the highest activation on a prompt, each at its highest token.

    last: only the last so many tokens count. maxima [F]: activations are relative to them; a feature whose maximum is 0 is left
    out. Of equal ones the lower number comes first.
    """
    tokens_T = encoded(lm_, prompt)
    acts_TF = activations(lm_, sae, tokens_T)
    acts_TF[:len(tokens_T) - (last or len(tokens_T))] = 0
    if maxima is not None:
        acts_TF = np.divide(acts_TF, maxima, out=np.zeros_like(acts_TF), where=maxima > 0)
    best = np.argsort(-acts_TF.max(0), kind="stable")[:n]
    at = acts_TF.argmax(0)
    return [Found(int(f), float(acts_TF[at[f], f]), f"token {at[f]} {lm_.tokenizer.token(tokens_T[at[f]])!r}")
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
    return [Found(int(f), float(total_F[f]), f"most at token {most[f]} {lm_.tokenizer.token(found.tokens_T[most[f]])!r}")
            for f in best if total_F[f] > 0]
