"""`saejax train`: training on a store that is there."""

from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import ConfigOptions, DistributedOptions, Job, places


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")


def run(options: Options) -> int:
    """The job, of every config given."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import configs
    from saejax.data.store import Store
    from saejax.runs.experiment import preflight, raise_troubles, trained
    from saejax.train.compilation_cache import kept
    for config in configs(options):
        with kept(Path(config.run_dir)):
            outcomes = trained(config, preflight(config), Store.open(config.harvest.store))
        if is_writer():
            for o in outcomes:
                print(f"{'stopped ' if o.trouble else 'trained '} {o.paths.checkpoints / str(o.step)}")
        raise_troubles(outcomes)
    return 0


JOB = Job(
    "train", "make", "activation store -> checkpoints of a sparse autoencoder", """
    Reads a finished activation store; writes metrics.jsonl, tensorboard/ and checkpoints/ in the run directory. Resumes the
    newest checkpoint that verifies. SIGTERM or Ctrl-C saves the state first (exit code 75). All SAEs of a sweep train on the
    same rows; one that diverges is stopped by itself, and the exit code is 2 at the end.
    """, "saejax train runs/demo", Options, run)
