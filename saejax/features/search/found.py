"""What every search gives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """A feature, how well it fits (the larger the better; what it is differs by the way of search), and why in a few words."""

    feature: int
    score: float
    why: str


@dataclass(frozen=True)
class TokenFound:
    """The features of one token of a prompt, best first."""

    position: int
    token: str
    found: list[Found]


@dataclass(frozen=True)
class Tested:
    """Features that stand above chance, best first, and what they were held against.

    best: the highest score of any feature. bound: a score above it has p <= 0.05. p: of `best`, as `null.Null` has it.
    """

    found: list[Found]
    best: float
    bound: float
    p: float

    def __str__(self) -> str:
        said = f"best score {self.best:.3g}, bound {self.bound:.3g}, p = {self.p:.2g}"
        return f"above chance: {said}" if self.found else f"nothing above chance, {said}"
