"""`saejax train`: training on a store that is there."""

from pathlib import Path

from saejax.base.storage import is_writer
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import configs
from saejax.data.store import Store
from saejax.runs.experiment import preflight, raise_troubles, trained
from saejax.train.compilation_cache import kept


def start(arguments: Arguments) -> int:
    """The job, of every config given."""
    for config in configs(arguments):
        with kept(config.train.compilation_cache, Path(config.run_dir)):
            outcomes = trained(config, preflight(config), Store.open(config.harvest.store))
        if is_writer():
            for o in outcomes:
                print(f"{'stopped ' if o.trouble else 'trained '} {o.paths.checkpoints / str(o.step)}")
        raise_troubles(outcomes)
    return 0
