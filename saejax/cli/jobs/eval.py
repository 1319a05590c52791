"""`saejax eval`: SAEs measured on held-out text, side by side."""

import json

from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import subjects
from saejax.pages.summary import columns, measured, rows
from saejax.runs.evaluation import evaluated, result_of
from saejax.runs.subject import Subject, forget_language_model


def start(arguments: Arguments) -> int:
    """The job."""
    waiting, found = subjects(arguments), []
    while waiting:
        subject = waiting.pop(0)  # not kept: the next one's dictionary needs the memory
        evaluation = evaluated(subject, arguments.option("contexts"))
        found.append((_title(subject), _rows(subject, evaluation), _plain(subject, evaluation)))
    forget_language_model()
    if is_writer():
        print(json.dumps([plain for _, _, plain in found], indent=1) if arguments.json else
              columns([(title, shown) for title, shown, _ in found]))
    return 0


def _title(subject: Subject) -> str:
    return str(subject.run if subject.trained_here else subject.source)


def _rows(subject: Subject, evaluation: dict) -> list[tuple[str, str]]:
    """Lines of its column."""
    if subject.trained_here:
        return rows(result_of(subject, evaluation))
    return [("SAE", f"{subject.sae.cfg.kind}, {subject.sae.cfg.d_sae} features"), *measured(evaluation)]


def _plain(subject: Subject, evaluation: dict) -> dict:
    if subject.trained_here:
        return {"run": str(subject.run), "step": int(subject.step_dir.name), **evaluation}
    return {"sae": str(subject.source), **evaluation}
