"""Everything that the collectives of a compiled program return, whether the program can reach them or not."""

from saejax.plan.hlo import COLLECTIVE, SHAPE


def moved_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes, tuples taken apart; `saejax.plan.hlo.moved` knows axes and bytes of those that run."""
    return [tuple(int(n) for n in shape.split(",") if n) for line in hlo.splitlines() if (found := COLLECTIVE.search(line))
            for _, shape in SHAPE.findall(found[1])]
