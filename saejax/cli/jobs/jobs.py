"""The linear story of each job of the command line."""

import dataclasses
import functools
import gc
import json
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax import lm
from saejax.base import sharding
from saejax.base.distributed import check_agreement
from saejax.base.errors import CheckpointError, ConfigError, NonFiniteError
from saejax.base.logs import say
from saejax.base.records import MeshOptions, RunPaths
from saejax.base.storage import is_writer, read_json, text_sha256, write_json
from saejax.bench import run as bench
from saejax.cli.arguments import Arguments
from saejax.config import Config, LMOptions, read_config
from saejax.data.harvest import harvest, lm_mesh
from saejax.data.store import RECORDS, Store, check_matches, is_complete
from saejax.data.stream import Stream
from saejax.evals.evaluate import cache_key, cached, evaluate, remember
from saejax.formats import load
from saejax.formats.loading import newest_step
from saejax.formats.release import release
from saejax.pages.report import write_report
from saejax.pages.summary import Rates, Result, table, training_rate
from saejax.scaling.sweep import is_sweep, members
from saejax.train.checkpoint import is_step, machine_of, read_meta
from saejax.train.compilation_cache import kept, trusted
from saejax.train.determinism import promise
from saejax.train.loop import train, train_all
from saejax.train.member import Outcome, check_all, check_run_dir, claim_run_dir, settled
from saejax.train.step_cost import mesh_options

CALIBRATION_ROWS = 65_536  # rows that `release --jumprelu` measures its threshold on, or all that the store has


def start(job: str, arguments: Arguments) -> int:
    """Runs a job by name; returns the exit code. Raises `SaejaxError` for everything that the user can repair."""
    if arguments.distributed is not None:
        _check_agreement(job, arguments)
    if job == "inspect":
        from saejax.runs.inspect import inspect_paths
        return inspect_paths(arguments.paths, as_json=arguments.json)
    if job == "bench":
        return _bench(arguments)
    if job == "plan":
        return _plan(arguments)
    if job == "convert":
        return _convert(arguments)
    if job == "push-to-hub":
        return _push(arguments)
    if job == "eval":
        return _eval(arguments)
    if job == "release":
        return _release(arguments)
    if job in ("features", "dashboard", "search"):
        from saejax.cli.jobs import feature_jobs
        return getattr(feature_jobs, job)(arguments)
    if job in ("steer", "attribute", "neurons"):
        from saejax.cli.jobs import effect_jobs
        return {"steer": effect_jobs.steer, "attribute": effect_jobs.attribute_, "neurons": effect_jobs.neurons}[job](arguments)
    if job == "judge":
        from saejax.cli.jobs.judge import judge
        return judge(arguments)
    for config in _configs(arguments):
        with kept(config.train.compilation_cache, Path(config.run_dir)):
            {"run": run, "harvest": harvest_only, "train": train_only}[job](config)
    return 0


def _check_agreement(job: str, arguments: Arguments) -> None:
    """Raises `ConfigError` when the processes were not started alike; how each of them shows its progress is its own affair."""
    given = {"job": job, "options": (arguments.paths, dict(arguments.options))}
    for config in _configs(arguments):
        given |= {f"config.{key}": value for key, value in config_lib.flat(config).items() if not key.startswith("log.")}
    check_agreement(given)


def run(config: Config) -> None:
    """harvest -> train -> evaluate -> release -> report, of every SAE of a sweep. What is done already is passed over in seconds.

    Raises `NonFiniteError` at the end when an SAE of a sweep was stopped for it; the others are complete.
    """
    configs = preflight(config)
    say("1/4 harvest")
    store = _timed_harvest(config, RunPaths(Path(config.run_dir)))
    gc.collect()  # the language model's weights, before the training state needs the memory
    say("2/4 train")
    outcomes = _trained(config, configs, store)
    gc.collect()
    sound = [outcome for outcome in outcomes if not outcome.trouble]
    say("3/4 evaluate")
    evaluations = [_evaluated(o.config, o.paths, o.paths.checkpoints / str(o.step)) for o in sound]
    _language_model.cache_clear()
    say("4/4 release")
    results = []
    for o, evaluation in zip(sound, evaluations, strict=True):
        release(o.paths.checkpoints / str(o.step), metrics=_scalars(evaluation), mesh=mesh_of(o.config))
        results.append(_result(o.config, o.paths, o.step, evaluation))
    if is_writer():
        pages = [write_report(result.paths, result) for result in results]
        print(table(results) if results else "no SAE was trained")
        for result, page in zip(results, pages, strict=True):
            print(f"release  {result.paths.release}\nreport   {page}")
    _raise_troubles(outcomes)


def harvest_only(config: Config) -> None:
    """The activation store of a config."""
    store = _timed_harvest(config, RunPaths(Path(config.run_dir)))
    if is_writer():
        where = ", ".join(store.hookpoints)
        print(f"store    {store.path}: {store.rows:,} rows ({store.kept_rows:,} unmasked) at {where}")


def train_only(config: Config) -> None:
    """Trains on a store that is there."""
    outcomes = _trained(config, preflight(config), Store.open(config.harvest.store))
    if is_writer():
        for o in outcomes:
            print(f"{'stopped ' if o.trouble else 'trained '} {o.paths.checkpoints / str(o.step)}")
    _raise_troubles(outcomes)


def preflight(config: Config) -> list[Config]:
    """The configs of the SAEs to train, after what can be known to be wrong before hours of harvesting: mesh, batch, dictionary
    sizes, a run directory taken.
    """
    configs = [settled(member) for member in members(config)]
    check_run_dir(settled(config))
    check_all(configs, sharding.make_mesh(mesh_options(config, jax.devices())))
    return configs


def _trained(config: Config, configs: list[Config], store: Store) -> list[Outcome]:
    if not is_sweep(config):
        step = train(config, store, load).step
        return [Outcome(configs[0], RunPaths(Path(config.run_dir)), step, "")]
    claim_run_dir(settled(config))
    say(f"{len(configs)} SAEs side by side")
    return train_all(configs, store, load)


def _raise_troubles(outcomes: list[Outcome]) -> None:
    troubles = [outcome.trouble for outcome in outcomes if outcome.trouble]
    if troubles:
        raise NonFiniteError("; ".join(troubles))


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
    key = evaluation_key(config, step_dir)
    result = cached(paths, key)
    if result is None:
        store = Store.open(config.harvest.store)
        stats = {hookpoint: store.stats(hookpoint) for hookpoint in config.sae.hookpoints}
        lm_ = _language_model(config.lm, lm_mesh(config) if config.lm.mesh.model > 1 else None)
        result = evaluate(config, load(step_dir, mesh=mesh_of(config)), lm_, stats)
        remember(paths, key, result)
    return result


@functools.lru_cache(maxsize=1)
def _language_model(options: LMOptions, mesh: Mesh | None) -> lm.LM:
    """Loaded once for all SAEs that are measured with it."""
    return lm.load(options.model, revision=options.revision, dtype=options.dtype, mesh=mesh)


def evaluation_key(config: Config, step_dir: Path) -> dict:
    """Under what the evaluation of a checkpoint step is kept."""
    fingerprints = json.dumps(read_meta(step_dir).fingerprints, sort_keys=True)
    return cache_key(config, int(step_dir.name), text_sha256(fingerprints))


def mesh_of(config: Config) -> Mesh | None:
    """The run's mesh where it fits the devices here, else one that the dictionary fits, or None."""
    n = jax.device_count()
    if n == 1:
        return None
    try:
        return sharding.make_mesh(mesh_options(config, jax.devices()))
    except ConfigError:
        return sharding.make_mesh(MeshOptions(1, -1)) if config.sae.d_sae % n == 0 else None


def _eval(arguments: Arguments) -> int:
    results = []
    for config, path in located(arguments):
        if arguments.option("contexts") is not None:
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, contexts=arguments.option("contexts")))
        paths = RunPaths(Path(config.run_dir))
        step_dir = path if path != paths.root else newest_step(path, mesh_of(config))
        results.append(_result(config, paths, int(step_dir.name), _evaluated(config, paths, step_dir)))
    _language_model.cache_clear()
    if is_writer():
        if arguments.json:
            print(json.dumps([{"run": str(r.paths.root), "step": r.step, **r.evaluation} for r in results], indent=1))
        else:
            print(table(results))
    return 0


def _bench(arguments: Arguments) -> int:
    if arguments.paths:
        raise ConfigError(f"saejax bench: takes no path ({arguments.paths[0]})")
    given = {name: value for name, value in arguments.options.items()
             if value is not None and name not in ("threads", "out", "json")}
    result = bench.run(given, arguments.option("threads"), arguments.out)
    print(json.dumps(result) if arguments.json else bench.markdown(result))
    return 0


def _plan(arguments: Arguments) -> int:
    from saejax import plan
    if arguments.option("compile") and arguments.option("topology") is None:
        raise ConfigError("saejax plan: --compile needs --topology, for example --topology=v5p:4x4x4")
    for config in _configs(arguments):
        made = plan.make_plan(config, arguments.option("topology"), width=arguments.option("d_in"),
                              compiled=arguments.option("compile"))
        print(plan.as_json(made) if arguments.json else plan.as_table(made))
    return 0


def result_of(config: Config, step_dir: Path, evaluation: dict) -> Result:
    """A run with what was measured of one of its checkpoint steps."""
    return _result(config, RunPaths(Path(config.run_dir)), int(step_dir.name), evaluation)


def _release(arguments: Arguments) -> int:
    found = located(arguments)
    if len(found) > 1 and arguments.out is not None:
        raise ConfigError(f"saejax release: --out={arguments.out} takes one run; release them one by one")
    for config, path in found:
        paths = RunPaths(Path(config.run_dir))
        step_dir = path if path != paths.root else newest_step(path, mesh_of(config))
        evaluation = cached(paths, evaluation_key(config, step_dir))
        rows = _rows_ahead(config, step_dir) if arguments.option("jumprelu") and config.sae.kind == "topk" else None
        out = release(step_dir, arguments.out, metrics=_scalars(evaluation or {}), mesh=mesh_of(config), rows=rows)
        if is_writer():
            print(f"release  {out} (step {step_dir.name})")
    return 0


def _rows_ahead(config: Config, step_dir: Path) -> np.ndarray:
    """The rows that come next in the run's order, bfloat16 [N, width]: unseen ones as long as an epoch has not ended. In another
    store than that of the run, the first ones.
    """
    if not is_complete(config.harvest.store):
        raise ConfigError(f"saejax release --jumprelu: measures the threshold on activations, and {config.harvest.store} is no "
                          "complete store; run saejax harvest with the run's config, or name a store of the same model and "
                          "hookpoints: --config=FILE --config.harvest.store=DIR")
    store, meta = Store.open(config.harvest.store), read_meta(step_dir)
    check_matches(store, hookpoints=config.sae.hookpoints, d_in=config.sae.d_in, model=config.lm.model)
    place = meta.counters.stream
    if store.digest != meta.data["store_digest"]:
        place = dataclasses.replace(place, epoch=0, position=0)
    n = min(CALIBRATION_ROWS, store.kept_rows)
    with Stream(store, config.sae.hookpoints, n, config.stream, place) as stream:
        return next(stream).x_BW[:stream.rows_per_epoch]


def _convert(arguments: Arguments) -> int:
    from saejax.formats.convert import convert
    if len(arguments.paths) != 2 or not arguments.option("to"):
        raise ConfigError("saejax convert: give SRC, DST and --to=FORMAT, for example: saejax convert runs/demo my_sae "
                          "--to=dictionary_learning")
    if arguments.option("approximate") != (arguments.option("rows") is not None):
        raise ConfigError("saejax convert: --approximate and --rows=FILE.npy go together: the error is measured on those rows")
    source, directory = arguments.paths
    to = arguments.option("to")
    sae, compared = convert(str(source), directory, to, _rows(arguments.option("rows")))
    if is_writer():
        print(f"converted {directory}: {to}, {sae}\ncompared  {compared}")
    return 0


def _push(arguments: Arguments) -> int:
    from saejax.formats.publish import publish
    if len(arguments.paths) != 1 or not arguments.option("repo"):
        raise ConfigError("saejax push-to-hub: give one release directory and --repo=ORG/NAME")
    said = publish(arguments.paths[0], arguments.option("repo"), arguments.option("license"),
                   upload=arguments.option("yes"))
    if is_writer():
        print(said)
    return 0


def _rows(path: str | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--rows={path}: not a readable .npy file of numbers ({error})") from error


def _result(config: Config, paths: RunPaths, step: int, evaluation: dict) -> Result:
    rates = read_json(_rates_file(paths)) if _rates_file(paths).is_file() else {}
    return Result(config=config, paths=paths, step=step, evaluation=evaluation,
                  rates=Rates(harvest=rates.get("tokens_per_second"), train=training_rate(paths)),
                  resume=promise(config.train.deterministic, machine_of(paths.checkpoints / str(step))))


def _scalars(evaluation: dict) -> dict:
    """The figures of an evaluation without its histogram: what a release keeps."""
    return {k: v for k, v in evaluation.items() if not isinstance(v, dict)}


def _configs(arguments: Arguments) -> list[Config]:
    if arguments.config is not None:
        return [arguments.config]
    return [saved_config(path) for path in arguments.paths]


def located(arguments: Arguments) -> list[tuple[Config, Path]]:
    """(config, run directory or checkpoint step) of every path given; a sweep stands for all its SAEs."""
    given = arguments.config
    paths = arguments.paths if given is None else (Path(given.run_dir),)
    out = []
    for path in paths:
        if len(paths) > 1 and _beside_members(path):
            continue
        step = is_step(path)
        path = path.absolute() if step else path
        config = saved_config(path.parent.parent if step else path)
        config = config if given is None else _as_given(config, given)
        runs = [Path(member.run_dir) for member in members(config)] if is_sweep(config) else []
        out += [(saved_config(run), run) for run in runs] or [(config, path)]
    return out


def _beside_members(path: Path) -> bool:
    """True for what else `SWEEP/*` names: store, config and rates of a sweep."""
    return (path.name in ("store", "config.json", "harvest.json", "profile") and RunPaths(path.parent).config.is_file()
            and is_sweep(saved_config(path.parent)))


def _as_given(saved: Config, given: Config) -> Config:
    """The config of a run with what does not change its results (log, eval, meshes, a store that was moved) as it is given now.

    Raises `ConfigError` that names every other difference: what was trained cannot be measured as something else.
    """
    if given.train.compute_dtype == "auto":  # measured on other hardware than it was trained on
        train = dataclasses.replace(given.train, compute_dtype=saved.train.compute_dtype)
        given = dataclasses.replace(given, train=train)
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
    elif not store.exists() and store.is_relative_to(Path(config.run_dir).parent):  # a member of a sweep that was moved
        store = run_dir.parent / store.relative_to(Path(config.run_dir).parent)
    harvest_options = dataclasses.replace(config.harvest, store=str(store))
    return dataclasses.replace(trusted(config), run_dir=str(run_dir), harvest=harvest_options)
