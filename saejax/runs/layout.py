"""Run directories: the config that one keeps, moved ones too, the SAEs of a sweep, the mesh that a run fits here."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax.base import sharding
from saejax.base.errors import CheckpointError, ConfigError
from saejax.base.records import MeshOptions, RunPaths
from saejax.config import Config, read_config
from saejax.data.store import is_complete
from saejax.scaling.sweep import is_sweep, members
from saejax.train.checkpoint import is_step
from saejax.train.step_cost import mesh_options

_FILES = (".json", ".html", ".csv", ".svg", ".png")  # of a sweep: its config, rates, points and report


def saved_config(run_dir: Path) -> Config:
    """The config that a run directory keeps, read as JSON; a directory that was moved is where it is now.

    Raises `CheckpointError` when `run_dir` is not a run.
    """
    file = RunPaths(run_dir).config
    if not file.is_file():
        raise CheckpointError(f"{run_dir}: not a run directory (no config.json)" if run_dir.exists() else
                              f"{run_dir}: does not exist")
    config = read_config(file)
    store = Path(config.harvest.store)
    if store.is_relative_to(config.run_dir):
        store = run_dir / store.relative_to(config.run_dir)
    elif not store.exists() and store.is_relative_to(Path(config.run_dir).parent):  # a member of a sweep that was moved
        store = run_dir.parent / store.relative_to(Path(config.run_dir).parent)
    harvest_options = dataclasses.replace(config.harvest, store=str(store))
    return dataclasses.replace(config, run_dir=str(run_dir), harvest=harvest_options)


def run_of(path: Path) -> Path | None:
    """The run directory that a path belongs to: itself, or that of one of its checkpoint steps or of its release."""
    path = Path(path)
    if is_step(path):
        return path.absolute().parent.parent
    inside = path.absolute().parent
    for place in (path, inside):
        if RunPaths(place).config.is_file() and (RunPaths(place).checkpoints.is_dir() or RunPaths(place).metrics.is_file()):
            return place
    return None


def located(path: Path, given: Config | None = None) -> list[tuple[Config, Path]]:
    """(config, run directory or checkpoint step) of a path of a run; a sweep stands for all its SAEs.

    given: a config of the same run, whose evaluation, log and meshes count. Raises `CheckpointError` and `ConfigError`.
    """
    step = is_step(path)
    path = path.absolute() if step else path
    config = saved_config(path.parent.parent if step else path)
    config = config if given is None else as_given(config, given)
    runs = [Path(member.run_dir) for member in members(config)] if is_sweep(config) else []
    return [(saved_config(run), run) for run in runs] or [(config, path)]


def without_parts(sources: Iterable[Path | str]) -> list[Path | str]:
    """Paths less what else `SWEEP/*` names where there are several: store and files of a sweep; names stay."""
    sources = list(sources)
    return [source for source in sources if len(sources) == 1 or isinstance(source, str) or not _beside_members(source)]


def _beside_members(path: Path) -> bool:
    return ((path.name in ("store", "profile") or path.suffix in _FILES) and RunPaths(path.parent).config.is_file()
            and is_sweep(saved_config(path.parent)))


def as_given(saved: Config, given: Config) -> Config:
    """The config of a run with what does not change its results (log, eval, meshes, a store that was moved) as it is given now.

    Raises `ConfigError` that names every other difference: what was trained cannot be measured as something else.
    """
    if given.train.compute_dtype == "auto":  # measured on other hardware than it was trained on
        train = dataclasses.replace(given.train, compute_dtype=saved.train.compute_dtype)
        given = dataclasses.replace(given, train=train)
    different = config_lib.differences(saved, given)
    if different:
        raise ConfigError(f"{saved.run_dir}: this run was made with another config ({'; '.join(different)}); give the directory "
                          "in place of the config, or the config that it was made with")
    store = given.harvest.store if is_complete(given.harvest.store) else saved.harvest.store
    return dataclasses.replace(saved, eval=given.eval, log=given.log, mesh=given.mesh,
                               lm=dataclasses.replace(saved.lm, model_parallel=given.lm.model_parallel),
                               harvest=dataclasses.replace(saved.harvest, store=store))


def mesh_of(config: Config) -> Mesh | None:
    """The run's mesh where it fits the devices here, else one that the dictionary fits, or None."""
    n = jax.device_count()
    if n == 1:
        return None
    try:
        return sharding.make_mesh(mesh_options(config, jax.devices()))
    except ConfigError:
        return sharding.make_mesh(MeshOptions(1, -1)) if config.sae.d_sae % n == 0 else None
