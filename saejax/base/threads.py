"""Threads: how many are worth having, and a function over many items side by side with the results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def processors(most: int) -> int:
    """Processors that this process may use, at most `most`."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, mine)


def in_order(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    """`map`, a few items ahead in threads. However many items there are, few of them and of their results are in memory."""
    pool, ahead = ThreadPoolExecutor(threads, "saejax-map"), deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
