"""The judging of a subject: who judges, what is asked, in which order, where the answers go."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saejax import lm
from saejax.base.errors import ConfigError, JudgeError
from saejax.base.logs import say
from saejax.base.storage import file_sha256, text_sha256
from saejax.features.index.explanations import load_explanations
from saejax.features.index.reader import FeatureIndex
from saejax.judging import material, tasks
from saejax.judging.endpoint import Endpoint, Patience
from saejax.judging.local import LocalJudge
from saejax.judging.questions import Judge, Question
from saejax.judging.record import JUDGE, Record, put
from saejax.pages.sheets import Sheets
from saejax.runs.baseline import baseline_of, corpus_of, home_of
from saejax.runs.subject import INDEX, Subject

JUDGING = "judging"
_PER_TOKEN = 4  # characters, about: for what is said before it starts


@dataclass(frozen=True)
class Asked:
    """What is judged. features: their numbers, or None for `sample` of those that fire. draw: activations of each feature drawn
    from the whole corpus. explanations: a file of them, instead of asking for some.
    """

    tasks: tuple[str, ...]
    features: Sequence[int] | None = None
    sample: int | None = None
    draw: int = 0
    explanations: Path | None = None
    baseline: str | None = None


def judge_of(given: str, subject: Subject, *, model: str = "", concurrency: int = 4, timeout: float = Patience.timeout) -> Judge:
    """The judge that a text means: an endpoint's address, local:MODEL, or csv:FOLDER. Raises `ConfigError` for none of them."""
    kind, _, rest = given.partition(":")
    if kind == "local" and rest:
        return LocalJudge(subject.lm if _same_model(rest, subject) else lm.load(rest))
    if kind == "csv" and rest:
        return Sheets(Path(rest))
    if kind in ("http", "https"):
        return Endpoint(given, model, concurrency=concurrency, patience=Patience(timeout=timeout))
    raise ConfigError(f"judge={given}: give an endpoint as http://localhost:8000/v1, local:MODEL, or csv:FOLDER")


def _same_model(name: str, subject: Subject) -> bool:
    return name == (subject.config.lm.model if subject.config is not None else subject.lm.name)


@dataclass(frozen=True)
class Judged:
    """The record of all answers, the name of what was judged, the explanations that were given, why the judge gave up or None."""

    record: Record
    name: str
    explanations: dict[int, str]
    trouble: JudgeError | None = None


def judge(subject: Subject, who: Judge, asked: Asked, out: Path | None = None) -> Judged:
    """Asks what has no answer yet.

    out: default judging/NAME/JUDGE beside the index. Raises `JudgeError` and `FeatureIndexError` for features that are none.
    """
    explained = None if asked.explanations is None else load_explanations(asked.explanations)
    sae = subject.sae if asked.baseline is None else baseline_of(asked.baseline, subject)
    index = subject.index if asked.baseline is None else FeatureIndex.open(home_of(subject, asked.baseline), sae=sae,
                                                                           lm_=subject.lm)
    chosen = material.chosen(index, asked.features, asked.sample, subject.seed)
    folder = out or index.path.parent / JUDGING / index.path.name / _slug(who)
    record = Record(folder, who, index.manifest["sha256"], "own" if explained is None else file_sha256(asked.explanations))
    found = material.gather(index, sae, corpus_of(index, subject, sae.cfg.hookpoints), chosen,
                            draw=asked.draw if "rubric" in asked.tasks else 0, progress=subject.progress)
    try:
        _ask(who, record, found, asked.tasks, explained, progress=subject.progress)
    except JudgeError as error:
        return Judged(record, index.path.name, explained or {}, error)
    return Judged(record, index.path.name, explained or {})


def records(places: Sequence[Path], judge: str | None = None) -> list[tuple[str, Path]]:
    """(label, folder) of the records of one judge in runs: of each its features, then their baselines. A place may be a record's
    folder itself. judge: the name of its folders (JUDGE). Raises `JudgeError` where there are none, or those of several judges.
    """
    found, judges = {}, set()
    for place, name in zip(places, _names(places), strict=True):
        if (place / JUDGE).is_file():
            found[place] = _label(name, place.resolve().parent.name) if _in_run(place) else name
            continue
        folders = sorted(file.parent for file in place.glob(f"{JUDGING}/*/{judge or '*'}/{JUDGE}"))
        if not folders:
            whose = f"the judge {judge}" if judge else "a judge"
            raise JudgeError(f"{place}: holds no answers of {whose}; ask for some first (saejax judge)")
        found |= {folder: _label(name, folder.parent.name) for folder in folders}
        judges |= {folder.name for folder in folders}
    if len(judges) > 1:
        raise JudgeError(f"answers of several judges, {', '.join(sorted(judges))}: only those of one can be compared; give "
                         "judge=NAME")
    return [(label, folder) for folder, label in found.items()]


def _in_run(record: Path) -> bool:
    return record.resolve().parent.parent.name == JUDGING


def _names(places: Sequence[Path]) -> list[str]:
    """The names of the runs, or records, that these are or lie in; whole paths where two have the same name."""
    wholes = [place.resolve().parents[2] if (place / JUDGE).is_file() and _in_run(place) else place.resolve() for place in places]
    names = [whole.name for whole in dict.fromkeys(wholes)]
    return [whole.name if names.count(whole.name) == 1 else str(whole) for whole in wholes]


def _label(run: str, index: str) -> str:
    return f"{run} {index.removeprefix(INDEX).strip('_')}".strip()


def _ask(who: Judge, record: Record, found: dict[int, material.Material], wanted: tuple[str, ...],
         explained: dict[int, str] | None, *, progress: bool) -> None:
    """Explanations first, where they are not given; then the tasks, of the features that have one."""
    if explained is None:
        questions = [tasks.explain(one) for one in found.values()]
        _announce("explain", record.missing(questions), len(questions))
        put(who, questions, record, title="explain", progress=progress)
        explained = {q.feature: record.lines[q.id]["score"] for q in questions
                     if q.id in record.lines and record.lines[q.id]["score"] is not None}
    bare = [feature for feature in found if feature not in explained]
    if bare:
        say(f"{len(bare)} features have no explanation yet and are not scored: {', '.join(map(str, bare[:10]))}"
            f"{' ...' if len(bare) > 10 else ''}")
    for task in (task for task in wanted if task != "explain"):
        questions = [q for feature, one in found.items() if feature in explained
                     for q in tasks.scored(task, one, explained[feature])]
        _announce(task, record.missing(questions), len(questions))
        put(who, questions, record, title=task, progress=progress)


def _announce(task: str, missing: list[Question], total: int) -> None:
    tokens = sum(len(question.prompt) for question in missing) // _PER_TOKEN
    say(f"{task}: {len(missing):,} questions to ask, about {tokens:,} tokens to read ({total - len(missing):,} answered already)")


def _slug(who: Judge) -> str:
    """A folder name for a judge: readable, and another one for another judge."""
    described = json.dumps(who.describe(), sort_keys=True)
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', who.name).strip('._-') or 'judge'}_{text_sha256(described)[:8]}"
