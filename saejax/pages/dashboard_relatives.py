"""What a dashboard says of a feature's relatives in smaller and larger dictionaries: the tree from the feature that it comes from
to those that come from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saejax.base.errors import FeatureIndexError
from saejax.base.text import LONGEST, visible
from saejax.features.compare.splitting import Splitting
from saejax.features.index.reader import FeatureIndex

_NAME = 120


@dataclass(frozen=True)
class Relatives:
    """A splitting as the dictionary of one of its levels sees it. addresses: of each level what the number of a feature completes
    to the address of its page in another dashboard; None where there is none.
    """

    found: Splitting
    own: int
    addresses: Sequence[str | None]

    @classmethod
    def of_index(cls, found: Splitting, index: FeatureIndex, addresses: Sequence[str | None]) -> "Relatives":
        """Raises `FeatureIndexError` where the dictionary of the index is none of the levels."""
        fingerprint = index.manifest["sae"]["fingerprint"]
        for number, level in enumerate(found.levels):
            if level.fingerprint == fingerprint and level.features == index.features:
                return cls(found, number, addresses)
        names = ", ".join(level.name for level in found.levels)
        raise FeatureIndexError(f"{index.path}: its SAE is none of those that were split ({names}); split it with them")

    def meta(self) -> dict:
        """What holds for every feature."""
        names = [visible(level.name.rstrip("/").rsplit("/", 1)[-1], _NAME) for level in self.found.levels]
        return {"own": self.own, "least": self.found.least, "sizes": [level.features for level in self.found.levels],
                "names": names, "addresses": list(self.addresses)}

    def of(self, feature: int) -> list[tuple[tuple, list[str]]]:
        """((level, feature, cosine to its parent or None, children that are not shown), tokens it fires on) of every line of the
        tree; empty where a feature has no relatives.
        """
        if not self.found.has_relatives(self.own, feature):
            return []
        return [((line.level, line.feature, None if line.cosine is None else float(f"{line.cosine:.3g}"), line.more),
                 [visible(text, LONGEST + 1) for text in self.found.fires_on(line.level, line.feature)])
                for line in self.found.family(self.own, feature)]
