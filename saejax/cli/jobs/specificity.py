"""`saejax specificity`: the rubric's scores of several dictionaries side by side."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import Job, Json, count, path, places, value


@dataclass(frozen=True)
class Options(Json):
    paths: tuple[str, ...] = places("RUN", "runs whose features, or baselines of them, were judged (saejax judge); or records of "
                                    "a judge, as RUN/judging/features/JUDGE")
    out: Path | None = value("where to write", "DIR", path, required=True)
    judge: str | None = value("whose answers, as the folder JUDGE is called; needed where several judges have answered", "JUDGE")
    least: int = value("answers behind a point; with fewer there is none", "N", count, default=10)


def run(options: Options) -> int:
    """Writes the comparison and prints a line for each dictionary."""
    from saejax.judging.specificity import compare
    from saejax.pages import specificity
    from saejax.runs.judging import records
    found = compare(records([Path(given) for given in options.paths], options.judge), options.least)
    page = specificity.write(options.out, found)
    if options.json:
        print(json.dumps({"page": str(page), "judge": found.judge, "least": found.least,
                          "dictionaries": [one.to_json() for one in found.dictionaries]}))
        return 0
    table = specificity.summary(found)
    for label, mean, answers, features, unscored in zip(*(table.column(name) for name in (
            "dictionary", "mean", "answers", "features", "unscored")), strict=True):
        print(f"{label:<30}  {mean:<16}  {answers} answers, {features} features, {unscored} unscored")
    print(f"judge {specificity.judge_of(found)}: its opinion, worth what the judge is\npage {page}")
    return 0


JOB = Job(
    "specificity", "understand", "how specific features of several dictionaries and baselines are, by level of activation", """
    Reads the answers of one judge about several SAEs, neurons, random directions and untrained SAEs; writes
    DIR/specificity.html, specificity.csv, specificity.json and figures (SVG, PNG): share of each score and mean by tenth of the
    maximum, with the number of answers behind each point. Asks nothing. Answers of different judges, or to different prompts,
    are refused. docs/how-to/judging.md describes it.
    """, "saejax specificity runs/f4096 runs/f16384 runs/f65536 --out=specificity", Options, run)
