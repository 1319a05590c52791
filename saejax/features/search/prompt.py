"""Features by what they do on one prompt: how active they are, or how much they speak for an answer.

Source: Templeton et al. 2024 (single prompts, attribution).
"""

from dataclasses import dataclass

import numpy as np

from saejax.base import sharding
from saejax.features.effects.attribution import attribute
from saejax.features.effects.prompting import encoded, padded, special
from saejax.features.index import corpus
from saejax.features.search.found import Found, TokenFound
from saejax.lm import LM
from saejax.sae.inference import SAE

MOST_DENSE = 0.01  # features that are active on a larger share of the tokens say little of one prompt


@dataclass(frozen=True)
class Ranking:
    """How the features of a prompt are ranked.

    maxima [F]: score = activation / the feature's own maximum, features whose maximum is 0 left out; without it the activation.
    density [F]: share of tokens on which a feature is active; those above `most_dense` are left out.
    """

    maxima: np.ndarray | None = None
    density: np.ndarray | None = None
    most_dense: float = MOST_DENSE

    def scores(self, acts_TF: np.ndarray) -> np.ndarray:
        """[T, F]; 0 where a feature is not active or left out."""
        if self.maxima is not None:
            acts_TF = np.divide(acts_TF, self.maxima, out=np.zeros_like(acts_TF), where=self.maxima > 0)
        return acts_TF if self.density is None else np.where(self.density <= self.most_dense, acts_TF, 0)


def activations(lm_: LM, sae: SAE, tokens_T: np.ndarray) -> np.ndarray:
    """Feature activations [T, F] on a prompt, 0 at special tokens (which an SAE has not seen)."""
    forward = corpus.forward_of(sae.cfg.hookpoints)
    x_TD = np.asarray(forward(lm_.model, padded(lm_, tokens_T)))[0]
    acts_TF = sharding.to_host(sae.encode(x_TD))[:len(tokens_T)]
    return np.where(special(lm_, tokens_T)[:, None], 0, acts_TF)


def by_prompt(lm_: LM, sae: SAE, prompt: str, n: int = 10, ranking: Ranking = Ranking()) -> list[Found]:
    """The n features with the highest score on a prompt, each at the token on which it is strongest. Of equal ones the lower
    number comes first.
    """
    tokens_T = encoded(lm_, prompt)
    acts_TF = activations(lm_, sae, tokens_T)
    score_TF, text_T = ranking.scores(acts_TF), [*map(lm_.tokenizer.token, tokens_T)]
    score_F, at_F = score_TF.max(0), score_TF.argmax(0)
    return [Found(int(f), float(score_F[f]), f"strongest on token {at_F[f]} {text_T[at_F[f]]!r}, activation "
                  f"{acts_TF[at_F[f], f]:.4g}") for f in np.argsort(-score_F, kind="stable")[:n] if score_F[f] > 0]


def by_token(lm_: LM, sae: SAE, prompt: str, n: int = 10, ranking: Ranking = Ranking()) -> list[TokenFound]:
    """Of each token of a prompt that is not special the n features with the highest score there."""
    tokens_T = encoded(lm_, prompt)
    acts_TF = activations(lm_, sae, tokens_T)
    score_TF, text_T, special_T = ranking.scores(acts_TF), [*map(lm_.tokenizer.token, tokens_T)], special(lm_, tokens_T)
    return [TokenFound(int(t), text_T[t], [
        Found(int(f), float(score_TF[t, f]), f"activation {acts_TF[t, f]:.4g}")
        for f in np.argsort(-score_TF[t], kind="stable")[:n] if score_TF[t, f] > 0]) for t in np.flatnonzero(~special_T)]


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
