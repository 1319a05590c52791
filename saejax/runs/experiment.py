"""The stages of an experiment as functions of its config: harvest and train."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax

from saejax.base import sharding
from saejax.base.errors import NonFiniteError
from saejax.base.logs import say
from saejax.base.records import RunPaths
from saejax.base.storage import is_writer, write_json
from saejax.config import Config
from saejax.data.harvest import harvest
from saejax.data.store import Store, finished_shards
from saejax.formats import load
from saejax.scaling.sweep import is_sweep, members
from saejax.train.loop import train, train_all
from saejax.train.member import Outcome, check_all, check_run_dir, claim_run_dir, has_checkpoints, settled
from saejax.train.step_cost import mesh_options


def preflight(config: Config, chosen: Sequence[Config] | None = None) -> list[Config]:
    """The configs of the SAEs to train, after what can be known to be wrong before hours of harvesting: mesh, batch, dictionary
    sizes, a run directory taken. chosen: of the members some, at least one (None: all).
    """
    configs = [settled(member) for member in (members(config) if chosen is None else chosen)]
    check_run_dir(settled(config))
    going_on = has_checkpoints(configs[0])
    check_all(configs, sharding.make_mesh(mesh_options(configs[0], jax.devices(), going_on=going_on)))
    return configs


def harvested(config: Config, *, repair: bool = False) -> Store:
    """The store of a config; the rate is kept beside the run: a store itself holds nothing that differs between two machines."""
    path = Path(config.harvest.store)
    before, clock = len(finished_shards(path)), time.monotonic()
    store = harvest(config, repair=repair)
    made = min(store.rows, (len(finished_shards(path)) - before) * store.spec.shard_rows)
    if made and is_writer():
        seconds = time.monotonic() - clock
        write_json(rates_file(RunPaths(Path(config.run_dir))),
                   {"schema_version": 1, "tokens": made, "seconds": seconds, "tokens_per_second": made / seconds})
    return store


def rates_file(paths: RunPaths) -> Path:
    """How fast a run's store was harvested."""
    return paths.root / "harvest.json"


def trained(config: Config, configs: list[Config], store: Store) -> list[Outcome]:
    """SAEs of an experiment, trained to their end. configs: of `preflight`; of a sweep all or some of them."""
    if not is_sweep(config):
        step = train(config, store, load).step
        return [Outcome(configs[0], RunPaths(Path(config.run_dir)), step, "")]
    claim_run_dir(settled(config))
    if len(configs) > 1:
        say(f"{len(configs)} SAEs side by side")
    return train_all(configs, store, load)


def raise_troubles(outcomes: list[Outcome]) -> None:
    """Raises `NonFiniteError` where an SAE of a sweep was stopped for it; the others are complete."""
    troubles = [outcome.trouble for outcome in outcomes if outcome.trouble]
    if troubles:
        raise NonFiniteError("; ".join(troubles))
