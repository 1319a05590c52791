"""`saejax dashboard`: the static site of an index."""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from saejax.cli.options import IndexOptions, Job, SubjectOptions, path, places, refuse, switch, value

_FIGURES = ("SAE", "hookpoint", "step", "L0", "explained variance", "CE recovered", "silent on held-out text")


@dataclass(frozen=True)
class Options(IndexOptions, SubjectOptions):
    paths: tuple[str, ...] = places("SAE_OR_INDEX", "one SAE or one index", most=1)
    explanations: Path | None = value('what somebody says of features, to show and to search: JSON lines {"feature": 12, '
                                      '"explanation": "..."}, or the answers.jsonl or results.json of saejax judge, with its '
                                      'scores', "FILE", path)
    map: bool = switch("a picture of the features by UMAP: near are those of like decoder directions; a sample of them where the "
                       "index has not the neighbours of all (needs pip install 'saejax[umap]')")
    splitting: Path | None = value("the splitting.parquet of saejax split: a feature's page shows what it comes from in smaller "
                                   "dictionaries, and what comes from it in larger ones", "FILE", path)
    out: Path | None = value("where to write (default dashboard/ beside the index)", "DIR", path)


def run(options: Options) -> int:
    """The job, of an index, or of a subject that has one; of a run also with the run's figures."""
    from saejax.base.records import RunPaths
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import one_subject
    from saejax.features.compare.picture import plane
    from saejax.features.index.build import is_index
    from saejax.features.index.reader import FeatureIndex
    from saejax.pages.dashboard import place_of, write_dashboard
    from saejax.pages.report import LINK, link_dashboard
    given = Path(options.paths[0])
    if is_index(given) and not RunPaths(given).config.is_file():
        refuse("dashboard", options, ("index", *(f.name for f in fields(SubjectOptions))), f"as {given} is an index")
        subject, index, figures, title = None, FeatureIndex.open(given), [], given.absolute().parent.name
    else:
        subject = one_subject(options)
        index, figures, title = subject.index, _figures(subject), subject.name
    out = options.out or place_of(index.path)
    beside = RunPaths(out.parent)
    links = [LINK] if beside.report.is_file() else []
    progress = subject is None or subject.progress
    sample = options.map and subject is not None and not index.has_all_neighbours
    picture = plane(index, subject.sae if sample else None, progress=progress) if options.map else None  # by all: it gathers rows
    if is_writer():
        page = write_dashboard(index, out, title=title, figures=figures, links=links, explanations=_said(options),
                               picture=picture, relatives=_relatives(options, index, out), progress=progress)
        if out.name == beside.dashboard.name:
            link_dashboard(beside)
        print(f"dashboard {page}")
        if subject is not None:
            print(f"next     {_next(subject, index)}")
    return 0


def _said(options: Options) -> dict[int, str]:
    """Explanations, each with the judge's score where the file is a judge's."""
    from saejax.cli.subjects import explanations
    from saejax.judging.record import ANSWERS
    from saejax.judging.scores import RESULTS, scores_in
    said, file = explanations(options), options.explanations
    scores = scores_in(file) if file is not None and file.name in (ANSWERS, RESULTS) else {}
    return {feature: f"{text} ({scores[feature]})" if feature in scores else text for feature, text in said.items()}


def _relatives(options: Options, index, out: Path):
    """Of its features in other dictionaries; they are linked to the dashboards that stand beside their indexes."""
    if options.splitting is None:
        return None
    from saejax.features.compare.splitting_file import read
    from saejax.pages.dashboard_relatives import Relatives
    from saejax.pages.splitting import addresses
    found = read(options.splitting)
    return Relatives.of_index(found, index, addresses(found, out / "index.html"))


def _next(subject, index) -> str:
    """To look at what the feature that fires most strongly does to a text."""
    where = f"saejax steer {shlex.quote(str(subject.source))} --prompt='I went to'"
    feature = f"--feature={int(index.column('max').argmax())} --html=steered.html"
    return f"{where} {feature}" if subject.run is not None else f"{where} --index={shlex.quote(str(index.path))} {feature}"


def _figures(subject) -> list[tuple[str, str]]:
    """Those of the evaluation, where one is kept of this step."""
    from saejax.pages.summary import rows
    from saejax.runs.evaluation import known, result_of
    evaluation = known(subject)
    if evaluation is None:
        return []
    found = dict(rows(result_of(subject, evaluation)))
    return [(label, found[label]) for label in _FIGURES]


JOB = Job(
    "dashboard", "understand", "a site of an index that opens from disk", """
    Reads the index of a run (RUN/features), or the one given; writes index.html and its data to DIR. Nothing is loaded from
    elsewhere and no server is needed.
    """, "saejax dashboard runs/demo", Options, run)
