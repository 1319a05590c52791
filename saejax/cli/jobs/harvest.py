"""`saejax harvest`: the activation store of a config."""

from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import ConfigOptions, DistributedOptions, Job, places, switch


@dataclass(frozen=True)
class Options(ConfigOptions, DistributedOptions):
    paths: tuple[str, ...] = places("RUN_DIR", "a run directory")
    repair: bool = switch("check every byte that is there, and write again what does not verify")


def run(options: Options) -> int:
    """The job, of every config given."""
    from saejax.base.storage import is_writer
    from saejax.cli.subjects import configs
    from saejax.runs.experiment import harvested
    from saejax.train.compilation_cache import kept
    for config in configs(options):
        with kept(Path(config.run_dir)):
            store = harvested(config, repair=options.repair)
        if is_writer():
            where = ", ".join(store.hookpoints)
            print(f"store    {store.path}: {store.rows:,} rows ({store.kept_rows:,} unmasked) at {where}")
    return 0


JOB = Job(
    "harvest", "make", "language model activations of a text -> activation store", """
    Reads text and a language model; writes the activation store `config.harvest.store` (default <run_dir>/store). An
    interrupted harvest goes on at the next shard and gives the same bytes; a finished store is left as it is, or grows where
    config.harvest.tokens asks for more.
    """, "saejax harvest --config=configs/demo.py --config.harvest.tokens=1000000", Options, run)
