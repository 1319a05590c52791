"""What the best of many features scores on sets of prompts by chance: the prompts change sides at random.

Source: permutation test with the maximum statistic (Westfall and Young 1993), p with the observed order counted in (Phipson and
Smyth 2010).
"""

import math
from dataclasses import dataclass

import numpy as np

from saejax.base.errors import FeatureIndexError

DRAWS, LEVEL = 999, 0.05
LEAST_PAIRS = math.ceil(-math.log2(LEVEL))  # 2^-pairs is the least p that pairs can reach
_BLOCK = 8192   # features at once
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Null:
    """The highest score over all features in each draw, [draws]."""

    highest_D: np.ndarray

    def p(self, score: float) -> float:
        """(1 + draws whose highest score is at least `score`) / (1 + draws): corrected for the number of features."""
        return (1 + int((self.highest_D >= score - _ROUNDING).sum())) / (1 + len(self.highest_D))

    @property
    def bound(self) -> float:
        """A score has p <= 0.05 exactly where it is above this one."""
        allowed = int(LEVEL * (1 + len(self.highest_D)) + _ROUNDING) - 1
        return float(np.sort(self.highest_D)[::-1][allowed]) if allowed >= 0 else math.inf

    def above(self, score: float) -> bool:
        """Whether a score stands above chance."""
        return self.p(score) <= LEVEL


def check_sizes(positives: int, negatives: int) -> None:
    """Raises `FeatureIndexError` where so few prompts can change sides in too few ways to tell anything from chance."""
    if not negatives or not positives:
        raise FeatureIndexError(f"search: {positives} positive and {negatives} negative prompts; give at least {LEAST_PAIRS} "
                                "pairs, each of a positive and a negative of the same form")
    ways = 2**positives if positives == negatives else math.comb(positives + negatives, positives)
    if ways * LEVEL < 1:
        what = f"{positives} pair{'s' * (positives > 1)} of prompts" if positives == negatives else (
            f"{positives} positive and {negatives} negative prompts")
        raise FeatureIndexError(f"search: {what} can change sides in {ways} ways only, so that nothing can be told from chance "
                                f"(p <= {LEVEL}); give at least {LEAST_PAIRS} pairs")


def of_sets(on_PF: np.ndarray, on_NF: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Null:
    """Chance for score_i = share of positives with feature i on - share of negatives.

    As many negatives as positives are pairs: in each draw the two of a pair change places or not, each pair by itself. Otherwise
    all prompts are dealt anew. on: bool [prompts, F]. 2 x draws x prompts operations for each feature that is on somewhere.
    """
    positives, negatives = len(on_PF), len(on_NF)
    rng = np.random.default_rng(seed)
    if positives == negatives:
        side_DQ = np.tile(rng.choice(np.float32([-1, 1]), (draws, positives)), 2)
        side_DQ[:, positives:] *= -1
    else:
        side_DQ = rng.permuted(np.tile(np.repeat(np.float32([1, -1]), (positives, negatives)), (draws, 1)), axis=1)
    weight_DQ = np.where(side_DQ > 0, np.float32(1 / positives), np.float32(-1 / negatives))
    on_QF = np.concatenate([on_PF, on_NF])
    on_QF = on_QF[:, on_QF.any(0)]
    highest_D = np.zeros(draws)
    for first in range(0, on_QF.shape[1], _BLOCK):
        highest_D = np.maximum(highest_D, (weight_DQ @ on_QF[:, first:first + _BLOCK].astype(np.float32)).max(1))
    return Null(highest_D)
