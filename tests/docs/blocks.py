"""Code blocks of the documents that are marked to be run.

A block is marked by a comment on the line before it, which no reader sees:

    <!-- run -->                            as it stands
    <!-- run, but not: judge, path/to -->   without the lines that hold one of these words
"""

import re
from pathlib import Path
from typing import NamedTuple

_MARKED = re.compile(r"<!-- run(?:, but not: (?P<left_out>[^\n]+?))? -->\n```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^```$",
                     re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!--\s*run\b")


class Block(NamedTuple):
    page: str
    line: int
    language: str   # bash or python
    body: str       # what is run


def blocks(page: Path, name: str) -> list[Block]:
    """The marked blocks of a page. Raises `ValueError` for a mark that stands before no block."""
    text = page.read_text()
    found = []
    for match in _MARKED.finditer(text):
        words = [word.strip() for word in (match["left_out"] or "").split(",") if word.strip()]
        lines = match["body"].splitlines()
        for word in words:
            if not any(word in line for line in lines):
                raise ValueError(f"{name}: no line of the block holds {word!r}, which its mark leaves out")
        body = "\n".join(line for line in lines if not any(word in line for word in words))
        found.append(Block(name, text[:match.start("body")].count("\n") + 1, match["language"], body))
    if len(found) != len(_MARK.findall(text)):
        raise ValueError(f"{name}: a mark stands before no block")
    return found
