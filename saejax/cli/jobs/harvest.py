"""`saejax harvest`: the activation store of a config."""

from pathlib import Path

from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import configs
from saejax.runs.experiment import harvested
from saejax.train.compilation_cache import kept


def start(arguments: Arguments) -> int:
    """The job, of every config given."""
    for config in configs(arguments):
        with kept(config.train.compilation_cache, Path(config.run_dir)):
            store = harvested(config)
        if is_writer():
            where = ", ".join(store.hookpoints)
            print(f"store    {store.path}: {store.rows:,} rows ({store.kept_rows:,} unmasked) at {where}")
    return 0
