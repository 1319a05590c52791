"""Files of what was found of concepts: one line for every concept of every size, and the curves."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.base.errors import ConceptError
from saejax.base.records import Dedicated
from saejax.base.storage import write_bytes, write_json
from saejax.scaling.concepts.counting import Counts
from saejax.scaling.concepts.fit import Collapse, Size

KIND = "saejax-concept-frequency"
LINES, RESULTS = "concepts.csv", "concepts.json"
COLUMNS = ("size", "alive", "category", "name", "count", "frequency", "sampled", "feature", "precision", "recall", "f1",
           "present")


def size_of(label: str, alive: int, counts: Counts, found: Dedicated) -> Size:
    """The concepts of a dictionary with `alive` features; those without an occurrence in the sample are left out."""
    _check(counts, found)
    there = found.sampled_C > 0
    names = tuple(name for name, here in zip(found.names, there, strict=True) if here)
    return Size(label, alive, names, counts.frequency_C[there], found.present_C[there])


def lines_of(size: str, alive: int, counts: Counts, found: Dedicated) -> list[dict]:
    """{column: value} of every concept. None: no occurrence was looked at, or no feature fires on it."""
    _check(counts, found)
    return [dict(zip(COLUMNS, (
        size, alive, concept.category, concept.name, int(counts.occurrences_C[c]), float(counts.frequency_C[c]),
        int(found.sampled_C[c]), int(found.feature_C[c]) if found.feature_C[c] >= 0 else None,
        *(plain(float(values[c])) for values in (found.precision_C, found.recall_C, found.f1_C)),
        bool(found.present_C[c]) if found.sampled_C[c] else None), strict=True)) for c, concept in enumerate(counts.concepts)]


def write(folder: Path, lines: Sequence[dict], found: Collapse, **more) -> None:
    """`concepts.csv` with the lines of all sizes, and `concepts.json` with the lines, the curves, and `more`. Raises `DiskError`.
    """
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_bytes(folder / LINES, out.getvalue().encode())
    write_json(folder / RESULTS, {"kind": KIND, "schema_version": 1, "curves": plain(dataclasses.asdict(found)),
                                  **more, "concepts": list(lines)})


def _check(counts: Counts, found: Dedicated) -> None:
    if tuple(concept.name for concept in counts.concepts) != found.names:
        raise ConceptError("counts and features are of different concepts; give those of one list")


def plain(value):
    """For JSON, which has neither NaN nor infinity: None instead."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
