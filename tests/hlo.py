"""What a compiled program makes, and what its collectives return, whether the program can reach them or not."""

import re
from collections.abc import Iterator

from saejax.plan.hlo import COLLECTIVE, SHAPE, group_of

_MADE = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")


def arrays(hlo: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(dtype, shape, instruction) of all that the instructions give, tuples taken apart; inside fusions nothing is in memory."""
    for line in hlo.splitlines():
        if found := _MADE.match(line):
            for dtype, shape in SHAPE.findall(found[1]):
                yield dtype, tuple(int(n) for n in shape.split(",") if n), found[2]


def widest_sort(hlo: str) -> int:
    """How many entries the rows have that are sorted; `lax.top_k` is none where it is left to the platform's own."""
    return max((int(width) for width in re.findall(r"\[(?:\d+,)*(\d+)\]\S* sort\(", hlo)), default=0)


def moved_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes, tuples taken apart; those among groups of one device move nothing. `saejax.plan.hlo.moved` knows axes and bytes."""
    return [tuple(int(n) for n in shape.split(",") if n) for line in hlo.splitlines() if (found := COLLECTIVE.search(line))
            and group_of(line, 2)[0] > 1 for _, shape in SHAPE.findall(found[1])]
