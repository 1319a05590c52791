"""Lists of concepts: words for things, by category. Some come with saejax; a user's own is a file with one concept a line.

A line is a name, or several spellings of it (`caesium/cesium`). A name is one word of letters, or several words with a blank,
hyphen or apostrophe between them. ` *` behind it marks a name with another common meaning: another part of speech, a person, a
place, a colour or a product (`lead`, `Reading`, `turkey`). Those are left out unless they are asked for. Lines with `#` in front
are remarks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from saejax.base.errors import ConceptError

_NAME = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+)*")
_AMBIGUOUS = " *"


@dataclass(frozen=True)
class Concept:
    """name: the first of its spellings."""

    category: str
    spellings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.spellings[0]


def categories() -> tuple[str, ...]:
    """Of the lists that come with saejax."""
    return tuple(sorted(file.name.removesuffix(".txt") for file in _folder().iterdir() if file.name.endswith(".txt")))


def shipped(*names: str, ambiguous: bool = False) -> list[Concept]:
    """The concepts of these categories, of all without a name. ambiguous: with those that have another common meaning.

    Raises `ConceptError` for a category that there is not.
    """
    if unknown := [name for name in names if name not in categories()]:
        raise ConceptError(f"there is no list of concepts {unknown[0]!r}; choose one of {', '.join(categories())}, or "
                           "give a file")
    return [concept for name in names or categories()
            for concept in parsed(_folder().joinpath(f"{name}.txt").read_text("utf-8"), name, ambiguous=ambiguous)]


def named(name: str) -> list[Concept]:
    """The concepts of a file, or of a category that comes with saejax. Raises `ConceptError`."""
    return read(name) if Path(name).is_file() or Path(name).name != name or Path(name).suffix else shipped(name)


def read(path: str | Path, *, ambiguous: bool = False) -> list[Concept]:
    """The concepts of a file; the category is its name without suffix. Raises `ConceptError`."""
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptError(f"{path}: not readable as a list of concepts ({' '.join(str(error).split())[:200]})") from error
    return parsed(text, path.stem, ambiguous=ambiguous)


def parsed(text: str, category: str, *, ambiguous: bool = False) -> list[Concept]:
    """The concepts of a list. Raises one `ConceptError` with every line that is no name, and without any concept."""
    out, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#") or (line.endswith(_AMBIGUOUS) and not ambiguous):
            continue
        spellings = tuple(name.strip() for name in line.removesuffix(_AMBIGUOUS).split("/"))
        if all(map(_NAME.fullmatch, spellings)):
            out.append(Concept(category, spellings))
        else:
            problems.append(f"line {number} ({line[:40]!r})")
    if problems:
        raise ConceptError(f"{category}: {', '.join(problems[:10])} {'are' if len(problems) > 1 else 'is'} no name of letters; "
                           "give one concept a line")
    if not out:
        raise ConceptError(f"{category}: no concepts; give one a line")
    return out


def spelled(concepts: Sequence[Concept]) -> dict[str, int]:
    """{spelling: number of its concept}. Raises `ConceptError` where two concepts are spelled alike."""
    out: dict[str, int] = {}
    for number, concept in enumerate(concepts):
        for spelling in concept.spellings:
            if out.setdefault(spelling, number) != number:
                other = concepts[out[spelling]]
                raise ConceptError(f"{spelling!r} is in {other.category} and in {concept.category}; leave one out" if
                                   other.category != concept.category else f"{spelling!r} is twice in {concept.category}")
    return out


def _folder():
    return resources.files("saejax.scaling.concepts").joinpath("lists")
