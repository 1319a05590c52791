"""`saejax run`: harvest, train, evaluate, release, report."""

import shlex
from dataclasses import dataclass

from saejax.cli.options import ConfigOptions, DistributedOptions, Job, places


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")


def run(options: Options) -> int:
    """The job, of every run given. Raises `NonFiniteError` at the end when an SAE of a sweep was stopped for it; the others are
    complete.
    """
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import configs
    from saejax.runs.everything import made
    from saejax.runs.experiment import raise_troubles
    for config in configs(options):
        results, outcomes = made(config)
        if is_writer():
            _say(results)
        raise_troubles(outcomes)
    return 0


def _say(results: list) -> None:
    from saejax.pages.summary import table
    print(table(results) if results else "no SAE was trained")
    for result in results:
        print(f"release  {result.paths.release}\nreport   {result.paths.report}")
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
