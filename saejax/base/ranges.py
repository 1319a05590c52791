"""Ranges of features that each go into a file of their own, written by a process that holds them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Shard = tuple[int, int, frozenset[int]]  # first feature, one past the last, the processes that hold them


@dataclass(frozen=True)
class Range:
    """Features first to stop - 1, and the process that writes them."""

    first: int
    stop: int
    process: int = 0


def ranges(shards: Sequence[Shard], most: int) -> list[Range]:
    """Files of at most `most` features. Each lies in shards that one process holds: small neighbours share a file, a larger shard
    has several.
    """
    groups: list[Shard] = []
    for first, stop, processes in shards:
        common = processes & groups[-1][2] if groups else frozenset()
        if common and stop - groups[-1][0] <= most:
            groups[-1] = (groups[-1][0], stop, common)
        else:
            groups.append((first, stop, processes))
    out, taken = [], Counter()
    for first, stop, processes in groups:
        n = -(-(stop - first) // most)
        borders = [first + (stop - first) * i // n for i in range(n + 1)]
        for a, b in zip(borders, borders[1:], strict=False):
            process = min(processes, key=lambda p: (taken[p], p))
            taken[process] += 1
            out.append(Range(a, b, process))
    return out
