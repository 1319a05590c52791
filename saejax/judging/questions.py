"""What a judge is asked and what it may answer. What is not one of the allowed answers has no score, never a guessed one."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

TASKS = ("explain", "rubric", "detect", "fuzz", "simulate")
LEVELS = 10           # activations are shown and predicted as whole numbers 0 .. 9
LONGEST_SENTENCE = 600
RULES = {
    "explain": "Answer with the explanation alone: one sentence, nothing before or behind it.",
    "rubric": "Answer with one digit alone: 0, 1, 2 or 3.",
    "detect": "Answer with one word alone: yes or no.",
    "fuzz": "Answer with one word alone: yes or no.",
    "simulate": "Answer with the JSON list alone: whole numbers from 0 to 9, one for each line, in their order.",
}
_CHOICES = {"rubric": {str(i): i for i in range(4)}}
_NUMBER = r"[-+]?\d+(?:[.,]\d+)*"
_YES_NO = {"yes": 1, "no": 0, "1": 1, "0": 0}


@dataclass(frozen=True)
class Question:
    """One question about one feature.

    interval: of the activation in question, 1 .. 10; 0 where there is none. level: activation / maximum of the feature. truth:
    what is right where that is known: 1 or 0 (detect, fuzz), activations / maximum of every token (simulate). tokens: what the
    lines of a simulation show. context, position: which token of the corpus it is about. drawn: it is one of the activations
    drawn from the whole corpus.
    """

    id: str
    task: str
    feature: int
    prompt: str
    interval: int = 0
    level: float = 0.0
    truth: int | tuple[float, ...] | None = None
    tokens: tuple[str, ...] = ()
    context: int = -1
    position: int = -1
    drawn: bool = False


@dataclass(frozen=True)
class Reply:
    """What came back: the judge's own words, or None and why there are none. usage: tokens that an endpoint counted."""

    text: str | None
    trouble: str = ""
    usage: dict | None = None


class Judge(Protocol):
    """Answers questions: a model behind an endpoint, a local one, or people with a sheet.

    retries: ask once more, with a reminder, what could not be read. `ask` yields (question, reply) in any order; what it leaves
    out has no answer yet and is asked again another time.
    """

    name: str
    retries: bool

    def describe(self) -> dict:
        """What a record says of it: plain JSON without secrets."""

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]: ...


def understood(question: Question, text: str):
    """The score that an answer states (int, list of levels, or sentence); None where it states none, or more than one.

    What a reasoning model thinks aloud (up to the last `</think>`) does not count. Choices are looked for in the last line:
    exactly one of them must stand there, at its end (yes and no also as its beginning), and no other number.
    """
    text = text.rpartition("</think>")[2].strip()
    if question.task == "explain":
        return _sentence(text)
    if question.task == "simulate":
        return _levels(text, len(question.tokens))
    line = text.splitlines()[-1].lower() if text else ""
    if question.task == "rubric":
        return _CHOICES["rubric"].get(_single(line, _NUMBER))
    return _YES_NO.get(_single(line, rf"\byes\b|\bno\b|{_NUMBER}", first=True))


def _single(line: str, pattern: str, *, first: bool = False) -> str | None:
    """The only match in a line, if no word follows it; or, with `first`, if it opens the line as a clause ("No, ...")."""
    found = list(re.finditer(pattern, line))
    if len(found) != 1:
        return None
    before, after = line[:found[0].start()], line[found[0].end():]
    opens = first and not re.search(r"\w", before) and re.match(r"\W*[.,;:!]", after)
    return found[0][0] if opens or not re.search(r"\w", after) else None


def _sentence(text: str) -> str | None:
    text = " ".join(re.sub(r"(?i)^explanation\s*:", "", text).split())
    return text if 3 <= len(text) <= LONGEST_SENTENCE and re.search(r"\w", text) else None


def _levels(text: str, n: int) -> list[float] | None:
    """The last [...] of an answer, if it holds n numbers from 0 to 9 and nothing else."""
    lists = re.findall(r"\[[^\[\]]*\]", text)
    try:
        values = json.loads(lists[-1]) if lists else None
    except ValueError:
        return None
    sound = values is not None and len(values) == n and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= LEVELS - 1 for v in values)
    return values if sound else None
