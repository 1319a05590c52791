"""What a compiled program moves between devices, read from its HLO text."""

import re

_COLLECTIVE = re.compile(r" = (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)"
                         r"(?:-start)?\(")


def moved_shapes(hlo: str) -> list[tuple[int, ...]]:
    """Shapes of everything that a collective of the program returns, tuples taken apart."""
    return [tuple(int(n) for n in shape.split(",") if n) for line in hlo.splitlines() if (found := _COLLECTIVE.search(line))
            for shape in re.findall(r"\w\[([\d,]*)\]", found[1])]
