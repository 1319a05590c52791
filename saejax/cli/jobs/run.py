"""`saejax run`: harvest, train, evaluate, release, report."""

import gc
from pathlib import Path

from saejax.base.logs import say
from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import configs
from saejax.config import Config
from saejax.formats.release import release
from saejax.pages.report import write_report
from saejax.pages.summary import table
from saejax.runs.evaluation import evaluated, result_of, scalars
from saejax.runs.experiment import harvested, preflight, raise_troubles, trained
from saejax.runs.subject import Given, Subject, forget_language_model
from saejax.train.compilation_cache import kept


def start(arguments: Arguments) -> int:
    """The job, of every run given."""
    for config in configs(arguments):
        with kept(config.train.compilation_cache, Path(config.run_dir)):
            run(config)
    return 0


def run(config: Config) -> None:
    """All stages, of every SAE of a sweep. What is done already is passed over in seconds.

    Raises `NonFiniteError` at the end when an SAE of a sweep was stopped for it; the others are complete.
    """
    members = preflight(config)
    say("1/4 harvest")
    store = harvested(config)
    gc.collect()  # the language model's weights, before the training state needs the memory
    say("2/4 train")
    outcomes = trained(config, members, store)
    gc.collect()
    say("3/4 evaluate and release")
    results = []
    for outcome in (outcome for outcome in outcomes if not outcome.trouble):
        paths = outcome.paths
        subject = Subject(paths.root, Given(), outcome.config, paths.checkpoints / str(outcome.step))
        evaluation = evaluated(subject)
        release(subject.sae, paths.release, scalars(evaluation))
        results.append(result_of(subject, evaluation))
    forget_language_model()
    say("4/4 report")
    if is_writer():
        pages = [write_report(result.paths, result) for result in results]
        print(table(results) if results else "no SAE was trained")
        for result, page in zip(results, pages, strict=True):
            print(f"release  {result.paths.release}\nreport   {page}")
    raise_troubles(outcomes)
