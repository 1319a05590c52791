"""The linear story of each job of the command line."""

import dataclasses
import gc
import json
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax import lm, sharding
from saejax.command_line import Arguments
from saejax.config import Config, MeshOptions
from saejax.data.harvest import harvest, lm_mesh
from saejax.data.store import RECORDS, Store, is_complete
from saejax.errors import CheckpointError, ConfigError
from saejax.evals.evaluate import cache_key, cached, evaluate, remember
from saejax.formats import load
from saejax.formats.loading import newest_step
from saejax.formats.release import release
from saejax.logs import say
from saejax.records import RunPaths, read_config
from saejax.report.report import write_report
from saejax.report.summary import Rates, Result, table, training_rate
from saejax.storage import is_writer, read_json, write_json
from saejax.train.checkpoint import is_step
from saejax.train.loop import check_run_dir, train


def start(job: str, arguments: Arguments) -> int:
    """Runs a job by name; returns the exit code. Raises `SaejaxError` for everything that the user can repair."""
    if job == "inspect":
        from saejax.inspect import inspect_paths
        return inspect_paths(arguments.paths, as_json=arguments.json)
    if job == "eval":
        return _eval(arguments)
    if job == "release":
        return _release(arguments)
    for config in _configs(arguments):
        {"run": run, "harvest": harvest_only, "train": train_only}[job](config)
    return 0


def run(config: Config) -> None:
    """harvest -> train -> evaluate -> release -> report. Every stage that is done already is passed over in seconds."""
    paths = preflight(config)
    say("1/4 harvest")
    store = _timed_harvest(config, paths)
    gc.collect()  # the language model's weights, before the training state needs the memory
    say("2/4 train")
    step = train(config, store).step
    gc.collect()
    say("3/4 evaluate")
    evaluation = _evaluated(config, paths, paths.checkpoints / str(step))
    say("4/4 release")
    release(paths.root, metrics=_scalars(evaluation))
    if is_writer():
        result = _result(config, paths, step, evaluation)
        page = write_report(paths, result)
        print(table([result]))
        print(f"release  {paths.release}\nreport   {page}")


def harvest_only(config: Config) -> None:
    """The activation store of a config."""
    store = _timed_harvest(config, RunPaths(Path(config.run_dir)))
    if is_writer():
        where = ", ".join(store.hookpoints)
        print(f"store    {store.path}: {store.rows:,} rows ({store.kept_rows:,} unmasked) at {where}")


def train_only(config: Config) -> None:
    """Trains on a store that is there."""
    paths = preflight(config)
    trained = train(config, Store.open(config.harvest.store))
    if is_writer():
        print(f"trained  {paths.checkpoints / str(trained.step)}")


def preflight(config: Config) -> RunPaths:
    """What can be known to be wrong before hours of harvesting: mesh, batch, dictionary size, a run directory taken."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, mesh)
    sharding.check_features(config.sae.d_sae, mesh)
    return check_run_dir(config)


def _timed_harvest(config: Config, paths: RunPaths) -> Store:
    """Harvests, and keeps the rate beside the run: a store itself holds nothing that differs between two machines."""
    records = Path(config.harvest.store) / RECORDS
    before, clock = len(list(records.glob("*.json"))), time.monotonic()
    store = harvest(config)
    made = min(store.rows, (len(list(records.glob("*.json"))) - before) * store.spec.shard_rows)
    if made and is_writer():
        seconds = time.monotonic() - clock
        write_json(_rates_file(paths), {"schema_version": 1, "tokens": made, "seconds": seconds,
                                        "tokens_per_second": made / seconds})
    return store


def _rates_file(paths: RunPaths) -> Path:
    return paths.root / "harvest.json"


def _evaluated(config: Config, paths: RunPaths, step_dir: Path) -> dict:
    """The evaluation of a checkpoint step: from `eval.json` when it is there, else measured and kept."""
    key = cache_key(config, int(step_dir.name))
    result = cached(paths, key)
    if result is None:
        stats = Store.open(config.harvest.store).stats(config.sae.hookpoint)
        lm_ = lm.load(config.lm.model, revision=config.lm.revision, dtype=config.lm.dtype,
                       mesh=lm_mesh(config) if config.lm.mesh.model > 1 else None)
        result = evaluate(config, load(step_dir, mesh=_mesh(config)), lm_, stats)
        remember(paths, key, result)
    return result


def _mesh(config: Config) -> Mesh | None:
    """The run's mesh where it fits the devices here, else one that the dictionary fits, or None."""
    n = jax.device_count()
    if n == 1:
        return None
    try:
        return sharding.make_mesh(config.mesh)
    except ConfigError:
        return sharding.make_mesh(MeshOptions(1, -1)) if config.sae.d_sae % n == 0 else None


def _eval(arguments: Arguments) -> int:
    results = []
    for config, path in _located(arguments):
        if arguments.contexts is not None:
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, contexts=arguments.contexts))
        paths = RunPaths(Path(config.run_dir))
        step_dir = path if path != paths.root else newest_step(path)
        results.append(_result(config, paths, int(step_dir.name), _evaluated(config, paths, step_dir)))
    if is_writer():
        if arguments.json:
            print(json.dumps([{"run": str(r.paths.root), "step": r.step, **r.evaluation} for r in results], indent=1))
        else:
            print(table(results))
    return 0


def _release(arguments: Arguments) -> int:
    located = _located(arguments)
    if len(located) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax release: --out={arguments.out} takes one run; release them one by one")
    for config, path in located:
        paths = RunPaths(Path(config.run_dir))
        step_dir = path if path != paths.root else newest_step(path)
        evaluation = cached(paths, cache_key(config, int(step_dir.name)))
        out = release(step_dir, arguments.out, metrics=_scalars(evaluation or {}))
        if is_writer():
            print(f"release  {out} (step {step_dir.name})")
    return 0


def _result(config: Config, paths: RunPaths, step: int, evaluation: dict) -> Result:
    rates = read_json(_rates_file(paths)) if _rates_file(paths).is_file() else {}
    return Result(config=config, paths=paths, step=step, evaluation=evaluation,
                  rates=Rates(harvest=rates.get("tokens_per_second"), train=training_rate(paths)))


def _scalars(evaluation: dict) -> dict:
    """The figures of an evaluation without its histogram: what a release keeps."""
    return {k: v for k, v in evaluation.items() if not isinstance(v, dict)}


def _configs(arguments: Arguments) -> list[Config]:
    if arguments.config is not None:
        return [arguments.config]
    return [saved_config(path) for path in arguments.paths]


def _located(arguments: Arguments) -> list[tuple[Config, Path]]:
    """(config, run directory or checkpoint step) of every path given."""
    if arguments.config is not None:
        run_dir = Path(arguments.config.run_dir)
        return [(_as_given(saved_config(run_dir), arguments.config), run_dir)]
    out = []
    for path in arguments.paths:
        step = is_step(path)
        path = path.absolute() if step else path
        out.append((saved_config(path.parent.parent if step else path), path))
    return out


def _as_given(saved: Config, given: Config) -> Config:
    """The config of a run with what does not change its results (log, eval, meshes, a store that was moved) as it is given now.

    Raises `ConfigError` that names every other difference: what was trained cannot be measured as something else.
    """
    different = config_lib.differences(saved, given)
    if different:
        raise ConfigError(f"{saved.run_dir}: this run was made with another config ({'; '.join(different)}); give the directory "
                          "in place of --config, or the config that it was made with")
    store = given.harvest.store if is_complete(given.harvest.store) else saved.harvest.store
    return dataclasses.replace(saved, eval=given.eval, log=given.log, mesh=given.mesh,
                               lm=dataclasses.replace(saved.lm, mesh=given.lm.mesh),
                               harvest=dataclasses.replace(saved.harvest, store=store))


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
    harvest_options = dataclasses.replace(config.harvest, store=str(store))
    return dataclasses.replace(config, run_dir=str(run_dir), harvest=harvest_options)
