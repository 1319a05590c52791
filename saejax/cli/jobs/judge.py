"""`saejax judge`: features of a run, or a baseline of them, put to a judge."""

import json
import re
from pathlib import Path

from saejax import lm
from saejax.base.errors import ConfigError, JudgeError
from saejax.base.logs import say
from saejax.base.storage import file_sha256, text_sha256
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import explanations, one_subject
from saejax.features.index.reader import FeatureIndex
from saejax.judging import material, tasks
from saejax.judging.endpoint import Endpoint, Patience
from saejax.judging.local import LocalJudge
from saejax.judging.questions import TASKS, Judge, Question
from saejax.judging.record import Record, put
from saejax.judging.scores import results
from saejax.pages import judged
from saejax.pages.sheets import Sheets
from saejax.runs.baseline import baseline_of, home_of
from saejax.runs.subject import Subject

JUDGING = "judging"
_DEFAULT = ("explain", "rubric", "detect")
_PER_TOKEN = 4  # characters, about: for what is said before it starts


def start(arguments: Arguments) -> int:
    """Asks what has no answer yet, and reports on all answers. A judge that gives up ends it, with what there is reported."""
    wanted, numbers = _tasks(arguments), _numbers(arguments)
    subject, baseline = one_subject(arguments, "judge"), arguments.option("baseline")
    explained = explanations(arguments) or None
    lm_ = subject.lm
    who = _judge(arguments, subject)
    sae = subject.sae if baseline is None else baseline_of(baseline, subject)
    index = subject.index if baseline is None else FeatureIndex.open(home_of(subject, baseline), sae=sae, lm_=lm_)
    chosen = material.chosen(index, numbers, arguments.option("sample"), subject.seed)
    folder = arguments.out or index.path.parent / JUDGING / index.path.name / _slug(who)
    record = Record(folder, who, index.manifest["sha256"],
                    "own" if explained is None else file_sha256(arguments.option("explanations")))
    text = re.fullmatch(r"text \((\w+)\)", index.manifest["corpus"]["kind"])
    corpus = subject.corpus(split=text[1] if text else None, tokens=index.manifest["totals"]["rows"],
                            hookpoints=sae.cfg.hookpoints)
    found = material.gather(index, sae, corpus, chosen, draw=(arguments.option("draw") or 0) if "rubric" in wanted else 0,
                            progress=subject.progress)
    trouble = None
    try:
        _ask(who, record, found, wanted, explained, progress=subject.progress)
    except JudgeError as error:
        trouble = error
    _report(record, index.path.name, who, arguments.json)
    if trouble is not None:
        raise trouble
    return 0


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


def _report(record: Record, subject: str, who: Judge, as_json: bool) -> None:
    if not record.lines:
        return
    values = results(record.lines.values())
    page = judged.write(record.folder, subject, who.name, values)
    if as_json:
        print(json.dumps(values))
        return
    rows = judged.compared(record.folder, subject, values["overall"])
    for task, (_, label) in enumerate(judged.MEASURES, 1):
        for row in rows:
            if row[task]:
                print(f"{label:<30}  {row[0]:<20}  {row[task]}")
    unscored = sum(values["overall"]["unscored"].values())
    print(f"judged {values['overall']['features']} features: {values['overall']['answers']:,} answers, {unscored:,} unscored\n"
          f"report {page}")


def _tasks(arguments: Arguments) -> tuple[str, ...]:
    given = arguments.option("do")
    wanted = tuple(dict.fromkeys(part.strip() for part in given.split(","))) if given else _DEFAULT
    unknown = [task for task in wanted if task not in TASKS]
    if unknown:
        raise ConfigError(f"--do={given}: {', '.join(map(repr, unknown))} is none of {', '.join(TASKS)}")
    return wanted


def _numbers(arguments: Arguments) -> list[int] | None:
    given = arguments.option("features")
    if (given is None) == (arguments.option("sample") is None):
        raise ConfigError("saejax judge: give the features to judge, as --features=1,2,3, or how many to draw, as --sample=50")
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(f"--features={given}: not a list of feature numbers as 1,2,3")
    return [int(part) for part in parts]


def _judge(arguments: Arguments, subject: Subject) -> Judge:
    given = arguments.option("judge") or ""
    kind, _, rest = given.partition(":")
    if kind == "local" and rest:
        return LocalJudge(subject.lm if _same_model(rest, subject) else lm.load(rest))
    if kind == "csv" and rest:
        return Sheets(Path(rest))
    if kind in ("http", "https"):
        patience = Patience(timeout=float(arguments.option("timeout") or Patience.timeout))
        return Endpoint(given, arguments.option("judge_model") or "", concurrency=arguments.option("concurrency") or 4,
                        patience=patience)
    raise ConfigError(f"--judge={given}: give an endpoint as http://localhost:8000/v1, local:MODEL, or csv:FOLDER")


def _same_model(name: str, subject: Subject) -> bool:
    return name == (subject.config.lm.model if subject.config is not None else subject.lm.name)


def _slug(who: Judge) -> str:
    """A folder name for a judge: readable, and another one for another judge."""
    described = json.dumps(who.describe(), sort_keys=True)
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', who.name).strip('._-') or 'judge'}_{text_sha256(described)[:8]}"
