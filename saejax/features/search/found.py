"""What every search gives."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Found:
    """A feature, how well it fits (the larger the better; what it is differs by the way of search), and why in a few words."""

    feature: int
    score: float
    why: str
