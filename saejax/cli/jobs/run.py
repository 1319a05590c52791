"""`saejax run`: harvest, train, evaluate, release, report."""

import gc
import shlex
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import ConfigOptions, DistributedOptions, Job, places


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")


def run(options: Options) -> int:
    """The job, of every run given."""
    from saejax.cli.subjects import configs
    from saejax.train.compilation_cache import kept
    for config in configs(options):
        with kept(Path(config.run_dir)):
            _experiment(config)
    return 0


def _experiment(config) -> None:
    """All stages, of every SAE of a sweep. What is done already is passed over in seconds.

    Raises `NonFiniteError` at the end when an SAE of a sweep was stopped for it; the others are complete.
    """
    from saejax.base.logs import say
    from saejax.formats.release import release
    from saejax.runs.evaluation import evaluated, result_of, scalars
    from saejax.runs.experiment import harvested, preflight, raise_troubles, trained
    from saejax.runs.subject import Given, Subject, forget_language_model
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
    _report(results)
    raise_troubles(outcomes)


def _report(results: list) -> None:
    from saejax.base.storage import is_writer
    from saejax.pages.report import write_report
    from saejax.pages.summary import table
    if not is_writer():
        return
    pages = [write_report(result.paths, result) for result in results]
    print(table(results) if results else "no SAE was trained")
    for result, page in zip(results, pages, strict=True):
        print(f"release  {result.paths.release}\nreport   {page}")
    if results:
        root = shlex.quote(str(results[0].paths.root))
        print(f"next     saejax features {root} && saejax dashboard {root}")


JOB = Job(
    "run", "make", "everything: harvest, train, evaluate, release, report", """
    Reads text and a language model; writes the run directory `config.run_dir` (default runs/<name>): config.json, store/,
    metrics.jsonl, tensorboard/, checkpoints/, eval.json, release/, report.html. The same command again goes on where an
    interrupted one stopped, and only shows the results of a finished one. RUN_DIR goes on with that run's own config.

    A config with a sweep trains several SAEs on the same rows, harvested once, each in a run directory of its own below
    `config.run_dir`, and shows them side by side (docs/how-to/sweeps.md).
    """, "saejax run --config=configs/demo.py", Options, run)
