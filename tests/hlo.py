"""Everything that the collectives of a compiled program return, whether the program can reach them or not."""

from saejax.plan.hlo import COLLECTIVE, SHAPE, group_of


def moved_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes, tuples taken apart; those among groups of one device move nothing. `saejax.plan.hlo.moved` knows axes and bytes."""
    return [tuple(int(n) for n in shape.split(",") if n) for line in hlo.splitlines() if (found := COLLECTIVE.search(line))
            and group_of(line, 2)[0] > 1 for _, shape in SHAPE.findall(found[1])]
