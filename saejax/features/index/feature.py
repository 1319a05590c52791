"""One feature of an index, for programs and notebooks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    """Where a feature fires: texts of the tokens around its place, and its activation at each of them.

    interval: 0 for the contexts of the highest activations, else 1 to 10, by how high it is. position: of the token in its
    context, which starts at token `position - start` of `texts`.
    """

    interval: int
    value: float
    texts: list[str]
    acts: np.ndarray
    context: int
    position: int


@dataclass(frozen=True)
class Feature:
    """What an index knows of a feature.

    density: share of the tokens on which it fires; mean: over those. tokens: (text, share of its total activation). promotes and
    demotes: (text, effect on its logit per unit of activation). neighbours: (feature, cosine of the decoder rows).
    """

    number: int
    fired: int
    density: float
    max: float
    mean: float
    tokens: list[tuple[str, float]]
    promotes: list[tuple[str, float]]
    demotes: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    examples: list[Example]
    card: Callable[["Feature"], str] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        tokens = " ".join(repr(text) for text, _ in self.tokens[:4])
        return f"Feature({self.number}, density {self.density:.2g}, max {self.max:.4g}, fires on {tokens})"[:150]

    def _repr_html_(self) -> str | None:
        return None if self.card is None else self.card(self)
