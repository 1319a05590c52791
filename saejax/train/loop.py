"""A training run, read from top to bottom: claim the directory, resume or start, step, log one step late, checkpoint."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax import sharding
from saejax.config import Config
from saejax.data.store import Store, check_matches
from saejax.data.stream import ORDER_VERSION, Stream
from saejax.errors import CheckpointError, NonFiniteError
from saejax.logs import MetricWriter, Progress, say
from saejax.recipes import WITH_K
from saejax.records import RunPaths, StreamState
from saejax.sae import SAESpec
from saejax.storage import barrier, is_writer, read_json, write_json
from saejax.train import optim
from saejax.train.checkpoint import Checkpoints, RunCounters, steps_in
from saejax.train.preemption import Preempted, Preemption
from saejax.train.resample import due, resample
from saejax.train.state import TrainState, abstract_state, initial_state
from saejax.train.step import make_step


@dataclass(frozen=True)
class Trained:
    """A finished run: the state on its mesh, the description of the SAE, and where the checkpoint is."""

    state: TrainState
    spec: SAESpec
    mesh: Mesh
    step: int


def check_run_dir(config: Config) -> RunPaths:
    """The paths of a run directory, free or holding checkpoints of the same computation.

    Raises `CheckpointError` naming every differing key. A directory without a checkpoint is free: a run that failed at its
    first step because of a wrong key can be started again with the right one.
    """
    paths = RunPaths(Path(config.run_dir))
    if paths.config.exists() and steps_in(paths.checkpoints):
        saved = config_lib.from_json(read_json(paths.config, CheckpointError), str(paths.config))
        different = config_lib.differences(saved, config)
        if different:
            raise CheckpointError(f"{paths.root}: this run directory belongs to another config ({'; '.join(different)}); "
                                  "choose another config.run_dir, or delete it")
    return paths


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


def train(config: Config, store: Store) -> Trained:
    """Trains the SAE of a config on a store, resuming the newest checkpoint that verifies.

    Raises `ConfigError` / `StoreError` when config, mesh and store do not fit, `NonFiniteError` when the loss or a batch is
    not finite, `Preempted` after SIGTERM or Ctrl-C (state saved).
    """
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, mesh)
    sharding.check_features(config.sae.d_sae, mesh)
    check_matches(store, hookpoints=config.sae.hookpoints, d_in=config.sae.d_in, model=config.lm.model,
                  context=config.text.context)
    paths = claim_run_dir(config)
    widths = {hookpoint: store.width(hookpoint) for hookpoint in config.sae.hookpoints}
    spec = SAESpec.from_options(config.sae, widths, config.train.compute_dtype)
    with jax.set_mesh(mesh):
        return _Run(config, store, mesh, paths, spec).go()


class _Run:
    """The moving parts of one run."""

    def __init__(self, config: Config, store: Store, mesh: Mesh, paths: RunPaths, spec: SAESpec):
        self.config, self.store, self.mesh, self.paths, self.spec = config, store, mesh, paths, spec
        self.total = total_steps(config)
        self.every = max(1, config.checkpoint.every_tokens // config.train.batch)
        keep_every = -(-config.checkpoint.keep_every_tokens // config.train.batch)
        self.checkpoints = Checkpoints(paths.checkpoints, keep=config.checkpoint.keep, strict=config.checkpoint.strict,
                                       keep_every_steps=-(-keep_every // self.every) * self.every)
        self.rest = sharding.sharding(mesh, "rows_at_rest", None)
        self.stats = [store.stats(hookpoint) for hookpoint in config.sae.hookpoints]
        self.data = {"hookpoints": list(config.sae.hookpoints), "store_digest": store.digest, "normalize": config.sae.normalize,
                     "stream_order": str(ORDER_VERSION)}

    def go(self) -> Trained:
        try:
            state, counters, start = self.resume() or self.start()
            if start < self.total:
                state = self.steps(state, counters, start)
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
        return Trained(state=state, spec=self.spec, mesh=self.mesh, step=self.total)

    def resume(self) -> tuple[TrainState, RunCounters, int] | None:
        restored = self.checkpoints.restore_latest(abstract_state(self.config, self.spec, self.mesh))
        if restored is None:
            return None
        state, meta, step = restored
        if int(state.skipped_in_row) >= self.config.train.max_skipped:  # a run that was stopped for it gets another chance
            state = state.replace(skipped_in_row=state.skipped_in_row * 0)
        if meta.data != self.data:
            changed = "; ".join(f"{k}: {meta.data.get(k)} -> {v}" for k, v in self.data.items() if meta.data.get(k) != v)
            raise CheckpointError(f"{self.paths.checkpoints}/{step}: was trained on other data ({changed}); choose another "
                                  "config.run_dir, or restore the store")
        say(f"resuming {self.paths.root} at step {step} of {self.total}" if step < self.total else
            f"{self.paths.root} is already trained ({step} steps)")
        return state, meta.counters, step

    def start(self) -> tuple[TrainState, RunCounters, int]:
        origin = StreamState(seed=self.config.seed, epoch=0, position=0)
        if self.config.sae.aux_k and self.config.sae.dead_tokens >= self.config.train.tokens:
            say(f"config.sae.dead_tokens = {self.config.sae.dead_tokens:,} is not less than config.train.tokens = "
                f"{self.config.train.tokens:,}: no feature can count as dead, and AuxK has nothing to do")
        rows = min(self.config.train.init_rows, self.store.kept_rows)
        with self.stream(origin) as stream:
            n = math.ceil(rows / self.config.train.batch)
            sample_NW = np.concatenate([b.x_BW.astype(np.float32) for b in itertools.islice(stream, n)])[:rows]
        state = initial_state(self.config, self.spec, self.stats, sample_NW, self.mesh)
        return state, RunCounters(stream=origin, tokens_seen=0, resamples=0), 0

    def stream(self, state: StreamState) -> Stream:
        return Stream(self.store, self.config.sae.hookpoints, self.config.train.batch, self.config.stream, state)

    def steps(self, state: TrainState, counters: RunCounters, start: int) -> TrainState:
        config, batch = self.config, self.config.train.batch
        k_at = optim.annealed_k(config.sae.k, config.sae.k_start, config.train.k_anneal, self.total)
        tensorboard = self.paths.tensorboard if config.log.tensorboard else None
        with (self.stream(counters.stream) as stream, Preemption() as preemption,
              Progress("train", self.total * batch, initial=start * batch, enabled=config.log.progress) as bar,
              _Log(config, self.paths, MetricWriter(self.paths.metrics, tensorboard=tensorboard, wandb_project=config.log.wandb,
                                                    name=config.name, config=config_lib.to_json(config), resume_step=start),
                   stream, bar) as log):
            for step, rows in zip(range(start + 1, self.total + 1), stream, strict=False):  # the stream has no end
                state, metrics = self.step_fn(k_at(step))(state, sharding.place(rows.x_BW, self.rest))
                counters = dataclasses.replace(counters, stream=stream.state, tokens_seen=step * batch)
                if log.step(step, metrics):
                    self.stop_broken(state, counters, step)
                if due(config.train.resample, (step - 1) * batch, step * batch) and step < self.total:
                    state, counters = self.resample(state, counters, log, step)
                leaving = preemption.requested(step) and step < self.total
                if leaving or step % self.every == 0 or step == self.total:
                    log.flush()
                    self.checkpoints.save(step, state, self.spec, self.data, counters)
                if leaving:
                    self.checkpoints.wait()
                    raise Preempted(f"{self.paths.root}: stopped at step {step} of {self.total} on request, state saved; "
                                    "start the same command again to go on")
        return state

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run lives as long as its program
    def step_fn(self, k: int):
        """The compiled step while k features are active."""
        return make_step(self.config, dataclasses.replace(self.spec, k=k if self.spec.kind in WITH_K else 0), self.total)

    def stop_broken(self, state: TrainState, counters: RunCounters, step: int) -> None:
        """Too many steps in a row were left out: the last good parameters are saved, and the run ends."""
        self.checkpoints.save(step, state, self.spec, self.data, counters)
        self.checkpoints.wait()
        n = self.config.train.max_skipped
        raise NonFiniteError(f"{self.paths.root}: loss or gradient not finite in {n} steps in a row up to step {step}; the "
                             "parameters from before them are saved. Lower config.train.lr, or look for outlier tokens "
                             "(config.stream.mask_outliers)")

    def resample(self, state: TrainState, counters: RunCounters, log: "_Log", step: int) -> tuple[TrainState, RunCounters]:
        """Candidates come from a second, differently seeded stream over the same store: the training order is not touched."""
        occasion = counters.resamples
        n = max(1, self.config.train.resample.sample_rows // self.config.train.batch)
        n = min(n, max(1, self.store.kept_rows // self.config.train.batch))
        origin = StreamState(seed=self.config.seed + 1 + occasion, epoch=0, position=0)

        def batches() -> Iterator[jax.Array]:
            with self.stream(origin) as stream:
                for rows in itertools.islice(stream, n):
                    yield sharding.place(rows.x_BW, self.rest)

        state, replaced = resample(self.config, self.spec, state, (batches(), batches()), occasion)
        log.note(step, resampled=replaced)
        return state, dataclasses.replace(counters, resamples=occasion + 1)


class _Log:
    """Metrics of step n are read after step n + 1 was dispatched, so that the devices never wait for the host."""

    def __init__(self, config: Config, paths: RunPaths, writer: MetricWriter, stream: Stream, bar: Progress):
        self.config, self.paths, self.writer, self.stream, self.bar = config, paths, writer, stream, bar
        self.pending: tuple[int, dict] | None = None
        self.extra: dict[str, float] = {}
        self.clock: tuple[int, float, float] | None = None  # step, time, seconds waited for data at the last reading

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.flush()
        finally:
            self.writer.close()

    def step(self, step: int, metrics: dict[str, jax.Array]) -> bool:
        """Takes the metrics of a step, reads those of the one before; True when that one was the last that may be left out."""
        previous, self.pending = self.pending, (step, metrics)
        if previous is None:
            return False
        self._read(*previous)
        return int(previous[1]["skipped_in_row"]) >= self.config.train.max_skipped

    def note(self, step: int, **values: float) -> None:
        """Values that appear in the next metric line."""
        self.extra.update(values)

    def flush(self) -> None:
        previous, self.pending = self.pending, None
        if previous is not None:
            self._read(*previous)

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        jax.block_until_ready(metrics["loss"])
        if self.clock is None:  # rates count from the end of the first step: compilation is not throughput
            self._rates(step)
        batch = self.config.train.batch
        if step % self.config.log.every_steps and step != total_steps(self.config) and self.pending is not None:
            self.bar.advance(batch)
            return
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # those of a step that was left out
        self.writer.write(step, {"tokens_seen": step * batch, **values, **self._rates(step), **self.extra})
        self.extra = {}
        shown = ["loss", "l0", "fvu", "dead_fraction"] + (["skipped"] if values["skipped"] else [])
        self.bar.advance(batch, **{name.removesuffix("_fraction"): values.get(name, math.nan) for name in shown})

    def _rates(self, step: int) -> dict[str, float]:
        before, self.clock = self.clock, (step, time.monotonic(), self.stream.wait_seconds)
        if before is None or before[0] == step:
            return {}
        seconds = self.clock[1] - before[1]
        return {"tokens_per_second": (step - before[0]) * self.config.train.batch / seconds,
                "data_wait_share": min(1.0, (self.clock[2] - before[2]) / seconds)}
