"""`saejax dashboard`: the static site of an index."""

from pathlib import Path

from saejax.base.errors import ConfigError
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import explanations, one_subject
from saejax.features.compare.picture import plane
from saejax.features.index.build import is_index
from saejax.features.index.reader import FeatureIndex
from saejax.pages.dashboard import write_dashboard
from saejax.pages.summary import rows
from saejax.runs.evaluation import known, result_of
from saejax.runs.subject import Subject

DASHBOARD = "dashboard"
_FIGURES = ("SAE", "hookpoint", "step", "L0", "explained variance", "CE recovered", "silent on held-out text")


def start(arguments: Arguments) -> int:
    """The job, of an index, or of a subject that has one; of a run also with the run's figures."""
    if len(arguments.paths) > 1:
        raise ConfigError("saejax dashboard: give one SAE or one index")
    path, = arguments.paths
    if is_index(path) and not RunPaths(path).config.is_file():
        index, figures, title = FeatureIndex.open(path), [], path.absolute().parent.name
    else:
        subject = one_subject(arguments, "dashboard")
        index, figures, title = subject.index, _figures(subject), subject.name
    out = arguments.out or _beside(index.path)
    links = [("Report of the run", "../report.html")] if (out.parent / "report.html").is_file() else []
    if is_writer():
        explained = explanations(arguments)
        places_F2 = plane(index) if arguments.option("map") else None
        page = write_dashboard(index, out, title=title, figures=figures, links=links, explanations=explained, places_F2=places_F2)
        print(f"dashboard {page}")
    return 0


def _beside(index: Path) -> Path:
    return index.absolute().parent / DASHBOARD if index.is_absolute() else index.parent / DASHBOARD


def _figures(subject: Subject) -> list[tuple[str, str]]:
    """Those of the evaluation, where one is kept of this step."""
    evaluation = known(subject)
    if evaluation is None:
        return []
    found = dict(rows(result_of(subject, evaluation)))
    return [(label, found[label]) for label in _FIGURES]
