"""`saejax judge`: features of an SAE, or a baseline of them, put to a judge."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.cli.options import (
    BASELINES,
    CorpusOptions,
    IndexOptions,
    Job,
    Json,
    SubjectOptions,
    count,
    features,
    number,
    path,
    places,
    refuse,
    value,
    words,
)

_DEFAULT = ("explain", "rubric", "detect")


@dataclass(frozen=True)
class Options(Json, IndexOptions, SubjectOptions, CorpusOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE", most=1)
    judge: str | None = value("http://localhost:8000/v1: an OpenAI-compatible endpoint, whose key, if it needs one, is read from "
                              "the environment variable SAEJAX_JUDGE_KEY and written nowhere; local:MODEL: a language model that "
                              "runs here, named as in config.lm.model; csv:FOLDER: people: writes sheets (HTML and CSV) to "
                              "FOLDER and reads filled ones from it", "WHO", required=True)
    judge_model: str = value("the model as the endpoint calls it", "NAME", default="")
    features: tuple[int, ...] | None = value("features to judge, or", "1,2,3", features)
    sample: int | None = value("so many, drawn at random from those that fire", "N", count)
    do: tuple[str, ...] = value("of explain, rubric, detect, fuzz, simulate", "TASKS", words, default=_DEFAULT)
    draw: int | None = value("rubric: N activations of each feature drawn from the whole corpus instead of the "
                             "index' examples", "N", count)
    explanations: Path | None = value('JSON lines {"feature": 12, "explanation": "..."}, or the answers.jsonl of another judge, '
                                      "instead of asking for explanations", "FILE", path)
    baseline: str | None = value("judge a baseline (index it first)", "NAME", choices=BASELINES)
    concurrency: int = value("requests at a time", "N", count, default=4)
    timeout: float = value("seconds of one request; each question is tried up to 5 times", "SECONDS", number, default=120.0)
    out: Path | None = value("where to write", "DIR", path)


def run(options: Options) -> int:
    """Asks what has no answer yet, and reports on all answers. A judge that gives up ends it, with what there is reported."""
    from saejax.cli.subjects import one_subject
    from saejax.judging.questions import TASKS
    from saejax.runs import missing
    from saejax.runs.judging import Asked, judge, judge_of
    unknown = [task for task in options.do if task not in TASKS]
    if unknown:
        raise ConfigError(f"--do={','.join(options.do)}: {', '.join(map(repr, unknown))} is none of {', '.join(TASKS)}")
    if (options.features is None) == (options.sample is None):
        raise ConfigError("saejax judge: give the features to judge, as --features=1,2,3, or how many to draw, as --sample=50")
    if not options.judge.startswith(("http:", "https:")):
        refuse("judge", options, ("judge_model", "concurrency", "timeout"), "on a judge that is no endpoint")
    if "rubric" not in options.do:
        refuse("judge", options, ("draw",), "without rubric in --do")
    if set(options.do) == {"explain"}:
        refuse("judge", options, ("explanations",), "where nothing but explanations is asked for")
    subject = one_subject(options)
    subject.require(*[missing.INDEX] if subject.index_home is None else [], text=options.store is None)
    who = judge_of(options.judge, subject, model=options.judge_model, concurrency=options.concurrency, timeout=options.timeout)
    asked = Asked(tuple(dict.fromkeys(options.do)), options.features, options.sample, options.draw or 0, options.explanations,
                  options.baseline)
    found = judge(subject, who, asked, options.out)
    _report(found, who.name, options.json)
    if found.trouble is not None:
        raise found.trouble
    return 0


def _report(found, who: str, as_json: bool) -> None:
    from saejax.judging.scores import results
    from saejax.pages import judged
    record, subject, lines = found.record, found.name, list(found.record.lines.values())
    if not lines:
        return
    values = results(lines, found.explanations)
    page = judged.write(record.folder, subject, who, values, lines)
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


JOB = Job(
    "judge", "understand", "how specific features are and how well they can be explained, by a model or by people", """
    Reads an SAE, its index (`saejax features`) and its store or language model; writes prompts, raw answers and scores to
    judging/ beside the index, as RUN/judging/features/JUDGE: answers.jsonl, results.json, report.html, answers/ (pages of single
    answers). Says how many questions
    there are, then asks those that have no answer yet: the same command again goes on, other features are added.
    docs/how-to/judging.md describes methods and files.
    """, "saejax judge runs/demo --judge=http://localhost:11434/v1 --judge-model=qwen3:8b --sample=50", Options, run)
