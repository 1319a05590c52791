"""A study of concepts against frequency: what was measured of every dictionary, and what follows for all of them together."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from saejax.base.errors import ConceptError
from saejax.base.records import Dedicated
from saejax.scaling.concepts import table
from saejax.scaling.concepts.counting import Counts
from saejax.scaling.concepts.fit import Collapse, Size, collapse


@dataclass(frozen=True)
class Measured:
    """Of a sample of `tokens` unmasked tokens: dedicated features, and how many features fired at all."""

    found: Dedicated
    fired: int
    tokens: int

    def to_json(self) -> dict:
        """Plain JSON, `from_json` reads it."""
        return {"found": {key: table.plain(np.asarray(value).tolist()) for key, value in dataclasses.asdict(self.found).items()},
                "fired": self.fired, "tokens": self.tokens}

    @classmethod
    def from_json(cls, values: Mapping) -> "Measured":
        """Raises `ConceptError` for anything else."""
        try:
            columns = dict(values["found"])
            names = tuple(columns.pop("names"))
            kinds = {"sampled_C": np.int64, "feature_C": np.int64, "present_C": bool}
            arrays = {key: np.array(column, kinds.get(key, np.float64)) for key, column in columns.items()}
            if any(array.shape != (len(names),) for array in arrays.values()):
                raise ValueError("columns of different lengths")
            return cls(Dedicated(names, **arrays), int(values["fired"]), int(values["tokens"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConceptError(f"not readable as what was measured of concepts ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Dictionary:
    """An SAE of a study. features: how many it has. trained: tokens. dead_fraction, dead_tokens: of the evaluation that is kept
    beside its run: features that fired on none of so many tokens; None where there is no evaluation.
    """

    label: str
    features: int
    trained: int
    measured: Measured
    dead_fraction: float | None = None
    dead_tokens: int | None = None


@dataclass(frozen=True)
class Study:
    """how: criterion and sample, as plain values."""

    counts: Counts
    dictionaries: tuple[Dictionary, ...]
    how: dict

    @functools.cached_property
    def evaluated(self) -> int | None:
        """Tokens of the evaluations, where every dictionary has one over equally many; else None."""
        tokens = {one.dead_tokens for one in self.dictionaries}
        return tokens.pop() if len(tokens) == 1 else None

    def alive(self, one: Dictionary) -> int:
        """Alive features: those that fired in the evaluations where these are alike (`evaluated`), else in the sample."""
        return one.measured.fired if self.evaluated is None else round(one.features * (1 - one.dead_fraction))

    @functools.cached_property
    def sizes(self) -> list[Size]:
        """Of the concepts that were counted and looked at. Raises `ConceptError` for a dictionary without an alive feature."""
        return [table.size_of(one.label, self.alive(one), self.counts, one.measured.found).found()[0]
                for one in self.dictionaries]

    @functools.cached_property
    def curves(self) -> Collapse:
        return collapse(self.sizes)

    @property
    def lines(self) -> list[dict]:
        """`table.lines_of` every dictionary."""
        return [line for one in self.dictionaries
                for line in table.lines_of(one.label, self.alive(one), self.counts, one.measured.found)]

    @property
    def unsampled(self) -> list[str]:
        """Concepts that were counted, and of which no occurrence was looked at."""
        sampled_C = self.dictionaries[0].measured.found.sampled_C
        return [c.name for c, n, seen in zip(self.counts.concepts, self.counts.occurrences_C, sampled_C, strict=True)
                if n > 0 and seen == 0]

    @property
    def dead(self) -> list[dict]:
        """Dead features by size, as plain values."""
        return [{"label": one.label, "features": one.features, "dead_fraction": one.dead_fraction, "tokens": one.dead_tokens}
                for one in sorted(self.dictionaries, key=lambda one: one.features)]
