"""A whole experiment: harvest, train, evaluate, release, report."""

import gc
from pathlib import Path

from ml_collections import ConfigDict

from saejax.base import lease
from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer
from saejax.config import Config, resolve
from saejax.formats.release import release
from saejax.pages.report import write_report
from saejax.pages.summary import Result
from saejax.runs.evaluation import evaluated_all, result_of, scalars
from saejax.runs.experiment import harvested, preflight, raise_troubles, trained
from saejax.runs.opening import open_all
from saejax.runs.subject import Given, Subject, forget_language_model
from saejax.scaling.sweep import is_sweep
from saejax.train.compilation_cache import kept
from saejax.train.member import Outcome


def run(config: Config | ConfigDict) -> Subject | list[Subject]:
    """Runs an experiment to its end, as `saejax run` does, and opens what it made: of a sweep a list of its SAEs. Called again
    it goes on where it was interrupted, and only opens a finished run.

    config: of `saejax.config.default_config`, or a resolved one. Raises `NonFiniteError` for an SAE that was stopped for it, when
    all others are finished.
    """
    config = config if isinstance(config, Config) else resolve(config)
    raise_troubles(made(config)[1])
    found = open_all(config.run_dir)
    return found if is_sweep(config) else found[0]


def made(config: Config) -> tuple[list[Result], list]:
    """(results of every SAE that was trained to its end, outcomes of all). What is done already is passed over in seconds."""
    members = preflight(config)
    with lease.writing(config.run_dir), kept(Path(config.run_dir)):
        say("1/4 harvest")
        store = harvested(config)
        gc.collect()  # the language model's weights, before the training state needs the memory
        say("2/4 train")
        outcomes = trained(config, members, store)
        gc.collect()
        say("3/4 evaluate and release")
        results, done = [], [outcome for outcome in outcomes if not outcome.trouble]
        for subject, evaluation in evaluated_all([subject_of(outcome) for outcome in done]):
            release(subject.sae, RunPaths(subject.run).release, scalars(evaluation))
            results.append(result_of(subject, evaluation))
            del subject
        forget_language_model()
        say("4/4 report")
        for result in results if is_writer() else []:
            write_report(result.paths, result)
        return results, outcomes


def subject_of(outcome: Outcome) -> Subject:
    """A member of a run as it ended."""
    paths = outcome.paths
    return Subject(paths.root, Given(), outcome.config, paths.checkpoints / str(outcome.step))
