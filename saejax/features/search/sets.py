"""Features that tell one set of prompts from another, and the prompts that come with saejax: positives with matched negatives,
and the same sentences in several languages.

Source of the way: Templeton et al. 2024 (prompt sets).
"""

import functools
import json
from collections.abc import Sequence
from importlib import resources

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.features.effects.prompting import encoded
from saejax.features.search.found import Found
from saejax.features.search.prompt import activations
from saejax.lm import LM
from saejax.sae.inference import SAE


@functools.cache
def _file(name: str):
    return json.loads(resources.files("saejax.features.search").joinpath("prompts", name).read_text("utf-8"))


def names() -> tuple[str, ...]:
    """Of all sets."""
    return tuple(_file("sets.json"))


def prompt_set(name: str) -> tuple[list[str], list[str]]:
    """(positives, negatives): negative i has the form of positive i without what the set is about."""
    if name not in names():
        raise FeatureIndexError(f"there is no prompt set {name!r}; choose one of {', '.join(names())}")
    return _file("sets.json")[name]["positives"], _file("sets.json")[name]["negatives"]


def choices() -> list[dict[str, str]]:
    """25 prompts, each with the next token of two (`token`, `against`) that is right; each one token for SmolLM2."""
    return _file("choices.json")


def parallel() -> dict[str, list[str]]:
    """{language: sentences}; sentence i says the same in all of them."""
    return _file("parallel.json")


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


def by_meaning(lm_: LM, sae: SAE, n: int = 10) -> list[Found]:
    """The n most multilingual features.

    score = agreement on aligned text - agreement on unaligned pairs: the share of pairs of sentences in two languages that say
    the same on which the feature is active in both or in neither, less that share over all pairs that do not. A feature of a
    language, or one that is always on, has score 0 on average; one that follows the meaning up to 1.
    """
    on_LSF = np.stack([[activations(lm_, sae, encoded(lm_, sentence)).max(0) > 0 for sentence in sentences]
                       for sentences in parallel().values()])
    score_F = multilingual_score(on_LSF)
    share_F = on_LSF.mean((0, 1))
    best = np.argsort(-score_F, kind="stable")[:n]
    return [Found(int(f), float(score_F[f]), f"active on {100 * share_F[f]:.0f} % of the sentences, in "
                  f"{int(on_LSF[:, :, f].any(1).sum())} of {len(on_LSF)} languages") for f in best if score_F[f] > 0]


def multilingual_score(on_LSF: np.ndarray) -> np.ndarray:
    """[F], from which feature is active in which sentence of which language: bool [languages, sentences, F]. Over all pairs."""
    languages, sentences, _ = on_LSF.shape
    a, b = np.triu_indices(languages, 1)
    x, y = on_LSF[a].astype(float), on_LSF[b].astype(float)
    aligned_F = (x == y).mean((0, 1))
    share_x, share_y = x.mean(1), y.mean(1)
    all_F = (share_x * share_y + (1 - share_x) * (1 - share_y)).mean(0)
    return aligned_F - (all_F * sentences - aligned_F) / (sentences - 1)
