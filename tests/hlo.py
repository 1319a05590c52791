"""Everything that the collectives of a compiled program return, whether the program can reach them or not."""

import re

from saejax.plan.hlo import COLLECTIVE, SHAPE, group_of


def widest_sort(hlo: str) -> int:
    """How many entries the rows have that are sorted; `lax.top_k` is none where it is left to the platform's own."""
    return max((int(width) for width in re.findall(r"\[(?:\d+,)*(\d+)\]\S* sort\(", hlo)), default=0)


def moved_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes, tuples taken apart; those among groups of one device move nothing. `saejax.plan.hlo.moved` knows axes and bytes."""
    return [tuple(int(n) for n in shape.split(",") if n) for line in hlo.splitlines() if (found := COLLECTIVE.search(line))
            and group_of(line, 2)[0] > 1 for _, shape in SHAPE.findall(found[1])]
