"""Features that tell one set of prompts from another, and the prompts that come with saejax: positives with matched negatives,
and the same sentences in several languages. Only what stands above chance is found (`null`).

Source of the way: Templeton et al. 2024 (prompt sets).
"""

import functools
import json
from collections.abc import Sequence
from importlib import resources

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.features.effects.prompting import encoded
from saejax.features.search.found import Found, Tested
from saejax.features.search.null import DRAWS, Null, check_sizes, of_sets
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
    positives, negatives = zip(*_file("sets.json")[name], strict=True)
    return list(positives), list(negatives)


def choices() -> list[dict[str, str]]:
    """25 prompts, each with the next token of two (`token`, `against`) that is right; each one token for SmolLM2."""
    return _file("choices.json")


def parallel() -> dict[str, list[str]]:
    """{language: sentences}; sentence i says the same in all of them."""
    return _file("parallel.json")


def by_sets(lm_: LM, sae: SAE, positives: Sequence[str], negatives: Sequence[str], n: int = 10) -> Tested:
    """The n features that tell positives from negatives best, of those that stand above chance.

    As many negatives as positives are taken as pairs, in their order. Raises `FeatureIndexError` for too few prompts.
    """
    check_sizes(len(positives), len(negatives))
    return told_apart(*(np.stack([activations(lm_, sae, encoded(lm_, prompt)).max(0) for prompt in prompts])
                        for prompts in (positives, negatives)), n)


def told_apart(peaks_PF: np.ndarray, peaks_NF: np.ndarray, n: int = 10, *, draws: int = DRAWS, seed: int = 0) -> Tested:
    """The same of each feature's highest activations on the positives [P, F] and on the negatives [N, F].

    score = share of positives on which a feature is active somewhere - share of negatives. Of equal ones the one comes first
    whose least of these activations on the positives is larger. p: `null.of_sets`.
    """
    on_PF, off_NF = peaks_PF > 0, peaks_NF > 0
    on, off = on_PF.sum(0), off_NF.sum(0)
    null = of_sets(on_PF, off_NF, draws, seed)

    def why(f: int) -> str:
        return (f"active on {on[f]} of {len(on_PF)} positives, {off[f]} of {len(off_NF)} negatives, mean activation "
                f"{peaks_PF[:, f].mean():.4g}")

    return _tested(on / len(on_PF) - off / len(off_NF), null, n, why, peaks_PF.min(0))


def _tested(score_F: np.ndarray, null: Null, n: int, why, tie_F: np.ndarray | None = None) -> Tested:
    """The n highest scores above chance; why: feature -> text; tie_F: of equal scores its larger value comes first."""
    best = np.lexsort((np.zeros_like(score_F) if tie_F is None else -tie_F, -score_F))
    found = [Found(int(f), float(score_F[f]), f"{why(f)}, p = {null.p(score_F[f]):.2g}") for f in best[:n]
             if null.above(score_F[f])]
    highest = float(score_F[best[0]])
    return Tested(found, highest, null.bound, null.p(highest))


def by_meaning(lm_: LM, sae: SAE, n: int = 10) -> Tested:
    """The n most multilingual features, of those that stand above chance.

    score = agreement on aligned text - agreement on unaligned pairs: the share of pairs of sentences in two languages that say
    the same on which the feature is active in both or in neither, less that share over all pairs that do not. A feature of a
    language, or one that is always on, has score 0 on average; one that follows the meaning up to 1. By chance: in each draw the
    sentences of every language come in another order.
    """
    on_LSF = np.stack([[activations(lm_, sae, encoded(lm_, sentence)).max(0) > 0 for sentence in sentences]
                       for sentences in parallel().values()])
    share_F, languages_F = on_LSF.mean((0, 1)), on_LSF.any(1).sum(0)

    def why(f: int) -> str:
        return f"active on {100 * share_F[f]:.0f} % of the sentences, in {languages_F[f]} of {len(on_LSF)} languages"

    return _tested(multilingual_score(on_LSF), shuffled_meaning(on_LSF), n, why)


def shuffled_meaning(on_LSF: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Null:
    """Chance for `multilingual_score`: its maximum over features when each language has its sentences in an order of its own."""
    rng = np.random.default_rng(seed)
    on_LSF = on_LSF[:, :, on_LSF.any((0, 1))]
    unaligned_F = _agreement_of_all(on_LSF)
    highest_D = np.zeros(draws)
    for draw in range(draws if on_LSF.size else 0):
        order_LS = rng.permuted(np.tile(np.arange(on_LSF.shape[1]), (len(on_LSF), 1)), axis=1)
        highest_D[draw] = _score(np.take_along_axis(on_LSF, order_LS[:, :, None], 1), unaligned_F).max()
    return Null(highest_D)


def multilingual_score(on_LSF: np.ndarray) -> np.ndarray:
    """[F], from which feature is active in which sentence of which language: bool [languages, sentences, F]. Over all pairs."""
    return _score(on_LSF, _agreement_of_all(on_LSF))


def _score(on_LSF: np.ndarray, all_F: np.ndarray) -> np.ndarray:
    """all_F: the agreement over all pairs of sentences of two languages, which no order changes."""
    languages, sentences, _ = on_LSF.shape
    count_SF = on_LSF.sum(0, dtype=np.int32)  # languages in which a sentence has the feature on
    rest_SF = languages - count_SF
    agreeing_F = (count_SF * (count_SF - 1) + rest_SF * (rest_SF - 1)).mean(0)
    aligned_F = agreeing_F / (languages * (languages - 1))
    return aligned_F - (all_F * sentences - aligned_F) / (sentences - 1)


def _agreement_of_all(on_LSF: np.ndarray) -> np.ndarray:
    a, b = np.triu_indices(len(on_LSF), 1)
    share_LF = on_LSF.mean(1)
    x, y = share_LF[a], share_LF[b]
    return (x * y + (1 - x) * (1 - y)).mean(0)
