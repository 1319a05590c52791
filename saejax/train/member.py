"""One SAE of a run: its config, state, run directory, checkpoints and counters, and whether it still trains."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax.base import hardware, sharding
from saejax.base.errors import CheckpointCorruptError, CheckpointError, SaejaxError
from saejax.base.records import MADE_ELSEWHERE, RunPaths
from saejax.base.storage import barrier, decided, is_writer, write_json
from saejax.config import Config, read_config
from saejax.data import kept
from saejax.data.order import ORDER_VERSION
from saejax.data.store import Store, check_matches
from saejax.data.stream import order_of
from saejax.sae import SAESpec
from saejax.train import optim
from saejax.train.checkpoint import Checkpoints, RunCounters, restore_scalar, steps_in
from saejax.train.hyperparameters import Hyperparameters, alike
from saejax.train.state import TrainState, abstract_state
from saejax.train.step import MAX_SKIPPED


@dataclass(frozen=True)
class Outcome:
    """How a member of a run ended: at which step, and why earlier than it should have (empty: it did not)."""

    config: Config
    paths: RunPaths
    step: int
    trouble: str


def settled(config: Config) -> Config:
    """The config with `train.compute_dtype` said: as the run began where it has checkpoints, else as the devices of this job
    decide. Raises `ConfigError` where they have not what is asked for.
    """
    wanted, paths = config.train.compute_dtype, RunPaths(Path(config.run_dir))
    if wanted == "auto" and paths.config.exists() and steps_in(paths.checkpoints):
        wanted = read_config(paths.config).train.compute_dtype
    dtype = hardware.compute_dtype_here(wanted)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compute_dtype=dtype))


def check_run_dir(config: Config) -> RunPaths:
    """The paths of a run directory, free or holding checkpoints of the same computation.

    Raises `CheckpointError` naming every differing key. A directory without a checkpoint is free: a run that failed at its
    first step because of a wrong key can be started again with the right one.
    """
    paths = RunPaths(Path(config.run_dir))
    if paths.config.exists() and steps_in(paths.checkpoints):
        saved = read_config(paths.config)
        different = config_lib.differences(saved, config)
        if different:
            raise CheckpointError(f"{paths.root}: this run directory belongs to another config ({'; '.join(different)}); "
                                  "choose another config.run_dir, or delete it")
    return paths


def has_checkpoints(config: Config) -> bool:
    """Whether a run goes on, as process 0 sees it."""
    return decided(bool(steps_in(RunPaths(Path(config.run_dir)).checkpoints)))


def claim_run_dir(config: Config) -> RunPaths:
    """`check_run_dir`, then the config is written into it."""
    paths = check_run_dir(config)
    barrier("claim-run-dir")
    if is_writer():
        write_json(paths.config, config_lib.to_json(config))
    return paths


def total_steps(config: Config) -> int:
    """Steps of a run: `train.tokens` rounded up to whole batches."""
    return math.ceil(config.train.tokens / config.train.batch)


def checkpoint_steps(config: Config) -> int:
    """Steps between checkpoints."""
    return max(1, config.checkpoint.every_tokens // config.train.batch)


def check_all(configs: Sequence[Config], mesh: Mesh, store: Store | None = None) -> None:
    """Raises what is wrong between configs, mesh, store and run directories, of all of them at once."""
    errors: list[SaejaxError] = []
    for config in configs:
        try:
            sharding.check_batch(config.train.batch, mesh, parts=config.train.accumulate)
            sharding.check_features(config.sae.d_sae, mesh)
            if store is not None:
                check_matches(store, hookpoints=config.sae.hookpoints, d_in=config.sae.d_in, model=config.lm.model,
                              context=config.text.context, batch=config.train.batch)
            check_run_dir(config)
        except SaejaxError as error:
            errors.append(error)
    if errors:
        raise type(errors[0])("; ".join(dict.fromkeys(str(error) for error in errors)))


class Member:
    """`training` until its last step or until it is stopped; then `trouble` says why. `counters` are those of its newest step,
    `state` is there while it trains, and at the end of one that is alone.
    """

    def __init__(self, config: Config, store: Store, mesh: Mesh, compiled: Callable, *, alone: bool):
        """compiled: `shared_step`, the same function for the same arguments in all members of a run."""
        self.config, self.mesh, self.alone = config, mesh, alone
        self._compiled, self._own = compiled, Hyperparameters.of(config).on(mesh)
        self.state: TrainState | None = None
        self.paths = claim_run_dir(config)
        widths = {hookpoint: store.width(hookpoint) for hookpoint in config.sae.hookpoints}
        self.spec = SAESpec.from_options(config.sae, widths, config.train.compute_dtype)
        self.total, self.every = total_steps(config), checkpoint_steps(config)
        self._annealing = optim.annealing_steps(config.sae, config.train, self.total)
        self._step_fn = functools.cache(self._compiled_step)
        often, batch = config.checkpoint.keep_every_tokens, config.train.batch
        kept_steps = None if often is None else -(-often // (batch * self.every)) * self.every
        # Several SAEs resume where all of them can: one may have saved a step more than another when they are killed.
        self.checkpoints = Checkpoints(self.paths.checkpoints, keep_every_steps=kept_steps,
                                       keep=config.checkpoint.keep if alone else max(2, config.checkpoint.keep))
        measured = kept.of_store(store, config.sae.hookpoints)
        if is_writer():
            kept.keep(self.paths.statistics, measured)
        self.stats = [measured.stats[hookpoint] for hookpoint in config.sae.hookpoints]
        self.data = {"hookpoints": list(config.sae.hookpoints), "store_digest": store.digest, "normalize": config.sae.normalize,
                     "stream_order": str(ORDER_VERSION), **({MADE_ELSEWHERE: True} if store.spec.made_elsewhere else {})}
        start = order_of(store, config.stream, config.train.batch, config.seed_of_data).start(config.seed_of_data)
        self.counters = RunCounters(stream=start, tokens_seen=0, resamples=0)
        self.training, self.trouble = True, ""
        self.saved_on: dict[str, str] = {}  # the machine of the checkpoint that was restored

    def step(self, number: int, rows_BW: jax.Array) -> dict[str, jax.Array]:
        """Dispatches a step and returns its metrics."""
        self.state, metrics = self._step_fn(number <= self._annealing)(self.state, rows_BW, self._own)
        return metrics

    def _compiled_step(self, annealing: bool) -> Callable:
        """While k falls a step with room for `sae.k_start`, in which k is a value, then one of k features."""
        spec = dataclasses.replace(self.spec, k=self.config.sae.k_start) if annealing else self.spec
        return self._compiled(alike(self.config), spec, self.total)

    def restore(self, step: int) -> tuple[TrainState, RunCounters] | None:
        """State and counters of a step; None when it does not verify. Raises `CheckpointError` for other data."""
        restored = self.checkpoints.restore(step, abstract_state(self.config, self.spec, self.mesh))
        if restored is None:
            return None
        state, meta = restored
        self.saved_on = meta.machine
        if meta.data != self.data:
            changed = "; ".join(f"{k}: {meta.data.get(k)} -> {v}" for k, v in self.data.items() if meta.data.get(k) != v)
            raise CheckpointError(f"{self.paths.checkpoints}/{step}: was trained on other data ({changed}); choose another "
                                  "config.run_dir, or restore the store")
        if self.alone and int(state.skipped_in_row) >= MAX_SKIPPED:  # stopped for it: gets another chance
            state = state.replace(skipped_in_row=state.skipped_in_row * 0)
        return state, meta.counters

    def find_end(self) -> TrainState | None:
        """The state of the last step where that is there and verifies. A member of several that was stopped stays stopped."""
        steps = self.checkpoints.steps()
        if self.total in steps and (restored := self.restore(self.total)) is not None:
            (state, self.counters), self.training = restored, False
            return state
        if not self.alone and steps and self._stopped_at(steps[-1]):
            self.stop(steps[-1])
        return None

    def _stopped_at(self, step: int) -> bool:
        try:
            skipped = restore_scalar(self.paths.checkpoints / str(step), "skipped_in_row", self.mesh)
        except CheckpointCorruptError:
            return False  # restoring will say so
        return skipped >= MAX_SKIPPED

    def stop(self, step: int) -> None:
        """Ends its training, the reason kept in `trouble`."""
        self.training = False
        again = "" if self.alone else f", and go on with `saejax train {self.paths.root}`"
        self.trouble = (f"{self.paths.root}: loss or gradient not finite in {MAX_SKIPPED} steps in a row up to "
                        f"step {step}; the parameters from before them are saved. Lower config.train.lr, or look for outlier "
                        f"tokens (config.stream.mask_outliers){again}")

    def save(self, step: int) -> None:
        """Starts to write a checkpoint."""
        self.checkpoints.save(step, self.state, self.spec, self.data, self.counters)

    @property
    def outcome(self) -> Outcome:
        """How it ended."""
        return Outcome(self.config, self.paths, self.checkpoints.steps()[-1], self.trouble)
