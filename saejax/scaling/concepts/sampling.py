"""Contexts to look at: some of each concept and some at random, each with the number of contexts that it stands for.

Every context x gets a number u_x, uniform in [0, 1). Of each concept the k contexts with the least u are taken, and of all
contexts the r least; t_g is the least u of a group (a concept's contexts, or all) that is not taken, 1 where all are. A context
is in the sample with probability max t_g over its groups g, and has the inverse as weight (Horvitz-Thompson with rank
conditioning: Cohen and Kaplan 2008). So a rare concept is seen k times without activations of the whole text, and weighted sums
stay those of the text on average.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from saejax.base.errors import ConceptError
from saejax.base.logs import Progress
from saejax.base.records import Occurrences
from saejax.lm.token_text import joined
from saejax.scaling.concepts.counting import Counts, text_of
from saejax.scaling.concepts.lists import Concept
from saejax.scaling.concepts.matching import Matcher


@dataclass(frozen=True)
class SampleOptions:
    """per_concept, random: how many contexts of each concept, and of all; fewer where there are fewer."""

    per_concept: int = 64
    random: int = 8192
    seed: int = 0


class _Group:
    """The k + 1 contexts of a group with the least u."""

    def __init__(self, k: int):
        self._k, self._heap = k, []

    def add(self, u: float, number: int) -> tuple[bool, int | None]:
        """(whether it is among them now, the number of the one that left for it)."""
        if len(self._heap) <= self._k:
            heapq.heappush(self._heap, (-u, number))
            return True, None
        left = heapq.heappushpop(self._heap, (-u, number))[1]
        return left != number, left if left != number else None

    @property
    def bound(self) -> float:
        """t_g."""
        return -self._heap[0][0] if len(self._heap) > self._k else 1.0


@dataclass
class _Context:
    """A context that some groups hold."""

    u: float
    tokens_T: np.ndarray
    keep_T: np.ndarray
    spans: list[tuple[int, int, int]]  # concept, first token, the one behind the last
    holders: int = 0


def find(concepts: Sequence[Concept], contexts: Iterable[tuple[np.ndarray, np.ndarray]], pieces: Sequence[bytes],
         options: SampleOptions = SampleOptions(), *, total: int | None = None, progress: bool = True) -> Occurrences:
    """Where concepts stand as words (`matching`) in a sample of a text's contexts.

    contexts: (tokens [n, T], keep [n, T]) in pieces, in order, as `Corpus.make` gives them. pieces: the bytes of every token
    (`Tokenizer.token_bytes`). total: tokens, for the bar. Memory: (per_concept + 1) C + random + 1 contexts. Raises
    `ConceptError` for a text without one.
    """
    matcher, rng = Matcher(concepts), np.random.default_rng(options.seed)
    groups = [_Group(options.per_concept) for _ in concepts] + [_Group(options.random)]
    held: dict[int, _Context] = {}
    found_C, number = np.zeros(len(concepts), np.int64), 0
    with Progress("find concepts", total, enabled=progress) as bar:
        for tokens_NT, keep_NT in contexts:
            for tokens_T, keep_T, u in zip(tokens_NT, keep_NT, rng.random(len(tokens_NT)), strict=True):
                context = _Context(u, np.array(tokens_T), np.array(keep_T), _spans(matcher, tokens_T, keep_T, pieces))
                np.add.at(found_C, [concept for concept, _, _ in context.spans], 1)
                _offer(groups, held, number, context)
                number += 1
            bar.advance(tokens_NT.size)
    if not number:
        raise ConceptError("find concepts: the text has no whole context; give more text")
    return _sample(concepts, groups, held, number, found_C)


def _spans(matcher: Matcher, tokens_T: np.ndarray, keep_T: np.ndarray, pieces: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """Of concepts with a token that is not masked."""
    own = [pieces[t] for t in tokens_T.tolist()]
    if not matcher.places(text_of(own)):  # of most contexts: no token needs its own text
        return []
    texts = joined(own)[0]
    places = matcher.places("".join(texts))
    end_T = np.cumsum([len(text) for text in texts])
    spans = [(concept, int(np.searchsorted(end_T, first, side="right")), int(np.searchsorted(end_T, stop - 1, side="right")) + 1)
             for concept, first, stop in places]
    return [span for span in spans if keep_T[span[1]:span[2]].any()]


def _groups_of(context: _Context, groups: list[_Group]) -> list[_Group]:
    return [groups[concept] for concept in sorted({concept for concept, _, _ in context.spans})] + groups[-1:]


def _offer(groups: list[_Group], held: dict[int, _Context], number: int, context: _Context) -> None:
    for group in _groups_of(context, groups):
        taken, left = group.add(context.u, number)
        if taken:
            held.setdefault(number, context).holders += 1
        if left is not None:
            held[left].holders -= 1
            if not held[left].holders:
                del held[left]


def _sample(concepts: Sequence[Concept], groups: list[_Group], held: dict[int, _Context], contexts: int,
            found_C: np.ndarray) -> Occurrences:
    bounds = {number: max(group.bound for group in _groups_of(held[number], groups)) for number in sorted(held)}
    taken = [number for number, bound in bounds.items() if held[number].u < bound]
    spans = [(row, *span) for row, number in enumerate(taken) for span in held[number].spans]
    columns = np.array(spans, np.int64).reshape(-1, 4).T
    return Occurrences(tuple(concept.name for concept in concepts), contexts, found_C, np.array(taken, np.int64),
                       np.array([1 / bounds[number] for number in taken]), np.stack([held[n].tokens_T for n in taken]),
                       np.stack([held[n].keep_T for n in taken]), *columns)


def spread(counts: Counts, n: int, least: float, most: float, seed: int = 0) -> list[Concept]:
    """n of the counted concepts, about evenly spread in log frequency from `least` to `most`, in order of frequency.

    The range is cut into n equal parts, and one concept of each is drawn; as long as some are missing, it is cut into as many
    parts as are missing and drawn again from those that are left. With a list of nouns this gives words of all frequencies (say
    400 from 1e-6 to 1e-3). The same seed gives the same words. Raises `ConceptError` where fewer than n lie in the range.
    """
    frequency_C = counts.frequency_C
    left = np.flatnonzero((frequency_C >= least) & (frequency_C <= most))
    if not 0 < least < most or not 0 < n <= len(left):
        raise ConceptError(f"{len(left)} of {len(frequency_C)} concepts have a frequency from {least:g} to {most:g}, {n} are "
                           "wanted; give more candidates or another range")
    rng, chosen = np.random.default_rng(seed), np.empty(0, np.int64)
    while missing := n - len(chosen):
        place = np.log(frequency_C[left] / least) / np.log(most / least)
        part = np.minimum((place * missing).astype(int), missing - 1)
        order = rng.permutation(len(left))
        _, first = np.unique(part[order], return_index=True)
        chosen = np.concatenate([chosen, left[order[first]]])
        left = np.delete(left, order[first])
    return [counts.concepts[i] for i in chosen[np.argsort(frequency_C[chosen], kind="stable")]]
