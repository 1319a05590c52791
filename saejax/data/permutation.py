"""A keyed permutation of [0, n) with random access: position i of the shuffled order costs O(1) and no memory.

Balanced Feistel network over 2h bits, where 4^h >= n, with cycle walking: values that fall outside [0, n) are sent
through the network again until they land inside, which keeps it a bijection of [0, n) (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002). Round function and key schedule are splitmix64, so the order depends on no
library's generator and is the same on every machine; `VERSION` names it and any change of the values it gives must
raise it.
"""

import numpy as np

VERSION = 1
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key of a sequence of non-negative integers; (1,), (1, 0) and (0, 1) give different keys."""
    key = mix(len(parts) + VERSION * _GOLDEN & _MASK)
    for part in parts:
        key = mix((key + _GOLDEN + part) & _MASK)
    return key


def _round(right: np.ndarray, key: np.uint64) -> np.ndarray:
    x = right + key
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


class Permutation:
    """`Permutation(n, key)(positions)` -> int64 values of the permutation of [0, n) at these positions.

    Vectorised; `positions` is an integer array with values in [0, n). Two keys give unrelated permutations.
    """

    def __init__(self, n: int, key: int):
        if n < 0:
            raise ValueError(f"Permutation: n = {n} is negative")
        self.n = n
        half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
        self._half = np.uint64(half)
        self._low = np.uint64((1 << half) - 1)
        self._keys = [np.uint64(mix((key + (r + 1) * _GOLDEN) & _MASK)) for r in range(_ROUNDS)]

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._low
        for key in self._keys:
            left, right = right, left ^ (_round(right, key) & self._low)
        return (left << self._half) | right

    def __call__(self, positions) -> np.ndarray:
        positions = np.asarray(positions)
        if positions.size and not (0 <= positions.min() and positions.max() < self.n):
            raise IndexError(f"Permutation: a position lies outside [0, {self.n})")
        out = self._network(positions.astype(np.uint64).ravel())
        n = np.uint64(self.n)
        outside = np.flatnonzero(out >= n)
        while outside.size:
            walked = self._network(out[outside])
            out[outside] = walked
            outside = outside[walked >= n]
        return out.astype(np.int64).reshape(positions.shape)


def shuffled(n: int, key: int) -> np.ndarray:
    """A whole permutation of [0, n), int64 [n], of what is in memory anyway: numbers in the order of splitmix64 of number, key.
    """
    return np.argsort(_round(np.arange(n, dtype=np.uint64) * np.uint64(_GOLDEN), np.uint64(key)), kind="stable")
