"""Specificity of several dictionaries side by side: the rubric's scores by tenth of the maximum, of one judge.

Every mean is over features, of each feature's mean; its standard error is that of these means. So answers about the same feature
do not count as independent ones.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import FeatureIndexError, JudgeError
from saejax.base.storage import read_json
from saejax.features.index import baselines
from saejax.features.index.examples import INTERVALS
from saejax.features.index.reader import MANIFEST, FeatureIndex
from saejax.judging.record import ANSWERS, JUDGE, read_answers
from saejax.judging.scores import SCORES, of_one_sampling

LEAST = 10  # answers behind a point
_SAME = ("judge", "prompts")  # of judge.json


@dataclass(frozen=True)
class Level:
    """Scored answers about activations of one tenth of the maximum, or about all: how many with each score, about how many
    features. mean, standard_error: None where there are too few answers, or those of one feature only.
    """

    counts: tuple[int, ...]
    features: int
    mean: float | None
    standard_error: float | None

    @property
    def answers(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Dictionary:
    """What a judge said of features of one dictionary. levels: by tenth of the maximum; overall: of all.

    unscored: rubric questions without a score. drawn: "index", "corpus" or "both": where its activations were drawn from.
    explained: "own" or "given". baseline: its name, of one that lies where `saejax features` puts it. size, density (of the
    median judged feature), place, tokens: what its index says; None where there is none.
    """

    label: str
    levels: tuple[Level, ...]
    overall: Level
    unscored: int
    drawn: str
    explained: str
    baseline: str | None = None
    size: int | None = None
    density: float | None = None
    place: str | None = None
    tokens: int | None = None

    def to_json(self) -> dict:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Compared:
    """Dictionaries that one judge has judged. judge: what its records say of it; prompts: their digest. least: answers behind a
    point.
    """

    judge: dict
    prompts: str
    least: int
    dictionaries: tuple[Dictionary, ...]


def compare(records: Sequence[tuple[str, Path]], least: int = LEAST) -> Compared:
    """Reads (label, folder) of each record. Raises `JudgeError` where judges or prompts differ, where some explanations were
    given and others asked for, and for a record without rubric answers.
    """
    if not records:
        raise JudgeError("specificity: no records of answers are given")
    about = [_about(folder) for _, folder in records]
    for (_, folder), values in zip(records, about, strict=True):
        differs = [key for key in _SAME if values[key] != about[0][key]]
        if differs:
            raise JudgeError(f"{folder}: the answers there have another {' and another '.join(differs)} than those in "
                             f"{records[0][1]}; only answers of one judge to the same prompts can be compared")
        if _explained(values) != _explained(about[0]):
            raise JudgeError(f"{folder}: explanations there are {_explained(values)}, in {records[0][1]} "
                             f"{_explained(about[0])}; give them to all, or ask for them all")
    found = tuple(_dictionary(label, folder, values, least) for (label, folder), values in zip(records, about, strict=True))
    return Compared(about[0]["judge"], about[0]["prompts"], least, found)


def level_of(lines: Sequence[dict], least: int) -> Level:
    """Of scored rubric answers."""
    by_feature: dict[int, list[int]] = {}
    for line in lines:
        by_feature.setdefault(line["feature"], []).append(line["score"])
    counts = np.bincount([line["score"] for line in lines], minlength=SCORES)
    means = [float(np.mean(scores)) for scores in by_feature.values()]
    if len(lines) < least or len(means) < 2:
        return Level(tuple(counts.tolist()), len(means), None, None)
    return Level(tuple(counts.tolist()), len(means), float(np.mean(means)), float(np.std(means, ddof=1) / len(means) ** 0.5))


def _about(folder: Path) -> dict:
    if not (folder / JUDGE).is_file():
        raise JudgeError(f"{folder}: no record of a judge ({JUDGE} is missing); ask one first (saejax judge)")
    values = read_json(folder / JUDGE, JudgeError)
    if not isinstance(values, dict) or not {"index", "explanations", *_SAME} <= values.keys() or (
            not isinstance(values["judge"], dict)):
        raise JudgeError(f"{folder / JUDGE}: not the record of a judge, or of another version")
    return values


def _explained(about: dict) -> str:
    return "own" if about["explanations"] == "own" else "given"


def _dictionary(label: str, folder: Path, about: dict, least: int) -> Dictionary:
    lines = of_one_sampling(list(read_answers(folder / ANSWERS, mend=False).values()))
    lines = [line for line in lines if line["task"] == "rubric"]
    scored = [line for line in lines if line["score"] is not None]
    if not all(line.get("interval") in range(1, INTERVALS + 1) and line["score"] in range(SCORES) for line in scored):
        raise JudgeError(f"{folder / ANSWERS}: an answer to the rubric has no interval or no score from 0 to 3; it is of another "
                         "version")
    levels = tuple(level_of([line for line in scored if line["interval"] == i], least) for i in range(1, INTERVALS + 1))
    if not scored:
        unread = f", but {len(lines):,} that are unscored" if lines else ""
        raise JudgeError(f"{folder}: no rubric answers{unread}; ask for some first (saejax judge, do=rubric)")
    drawn = {bool(line.get("drawn")) for line in scored}
    return Dictionary(label, levels, level_of(scored, least), len(lines) - len(scored),
                      "both" if len(drawn) > 1 else "corpus" if drawn == {True} else "index", _explained(about),
                      _baseline(folder), **_of_index(folder, about["index"], sorted({line["feature"] for line in scored})))


def _baseline(folder: Path) -> str | None:
    found = [name for name in baselines.NAMES if folder.absolute().parent.name.endswith(f"_{name}")]
    return max(found, key=len, default=None)


def _of_index(folder: Path, digest: str, features: list[int]) -> dict:
    """What the index says, where it still lies where it was judged: JUDGING/INDEX/JUDGE beside INDEX."""
    home = folder.absolute().parent.parent.parent / folder.absolute().parent.name
    if not (home / MANIFEST).is_file():
        return {}
    try:
        index = FeatureIndex.open(home)
    except FeatureIndexError:
        return {}
    if index.manifest["sha256"] != digest:
        return {}
    sae = index.manifest["sae"]
    return {"size": sae["d_sae"], "place": " ".join(sae["hookpoints"]), "tokens": int(index.manifest["totals"]["kept_rows"]),
            "density": float(np.median(index.column("density")[features]))}
