"""Training, read from top to bottom: claim the directories, resume or start, step, log one step late, checkpoint.

A run drives its members side by side over one stream of rows. Members of equal shape share a compiled step; one SAE is a sweep of
one.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from saejax import config as config_lib
from saejax.base import lease, sharding
from saejax.base.distributed import check_agreement
from saejax.base.errors import CheckpointError, NonFiniteError, Preempted
from saejax.base.logs import MetricWriter, Progress, say
from saejax.base.preemption import Preemption
from saejax.base.records import RunPaths, StreamState
from saejax.config import Config
from saejax.data.store import Store
from saejax.data.stream import Stream, order_of
from saejax.sae import SAESpec
from saejax.train import compilation_cache, determinism
from saejax.train.member import Member, Outcome, check_all, checkpoint_steps, has_checkpoints, settled
from saejax.train.profile import Profile, window
from saejax.train.rates import Rates, flops_of_step, on_bar
from saejax.train.resample import due, resample
from saejax.train.start_from import Load, started_from
from saejax.train.state import INIT_ROWS, TrainState, initial_state, measured
from saejax.train.step import MAX_SKIPPED, shared_step
from saejax.train.step_cost import mesh_options


@dataclass(frozen=True)
class Trained:
    """A finished run: the state on its mesh, the description of the SAE, and where the checkpoint is."""

    state: TrainState
    spec: SAESpec
    mesh: Mesh
    step: int


def train(config: Config, store: Store, load: Load | None = None) -> Trained:
    """Trains the SAE of a config on a store, resuming the newest checkpoint that verifies.

    load: `saejax.load`, for `train.init_from`.

    Raises `ConfigError` / `StoreError` when config, mesh and store do not fit, `NonFiniteError` when the loss or a batch is
    not finite, `Preempted` after SIGTERM or Ctrl-C (state saved), `LeaseError` where another job writes in the run
    directory.
    """
    with _claimed([config], store, load, alone=True) as run:
        run.go()
    [member] = run.members
    if member.trouble:
        raise NonFiniteError(member.trouble)
    return Trained(state=member.state, spec=member.spec, mesh=run.mesh, step=member.total)


def train_all(configs: Sequence[Config], store: Store, load: Load | None = None) -> list[Outcome]:
    """Trains many SAEs side by side on the same rows, and says how each ended, in the order given.

    All configs have the same mesh, batch, data seed and checkpoint steps. They resume at the newest step that all unfinished ones
    have. One whose steps are not finite is stopped by itself. Raises what `train` raises but for that.
    """
    with _claimed(configs, store, load, alone=False) as run:
        run.go()
    return [member.outcome for member in run.members]


@contextlib.contextmanager
def _claimed(configs: Sequence[Config], store: Store, load: Load | None, *, alone: bool) -> Iterator["_Run"]:
    """A run that may write into its directories. What does not fit is refused before anything is made."""
    configs = list(map(settled, configs))
    given, going_on = configs[0].mesh, has_checkpoints(configs[0])
    options = mesh_options(configs[0], jax.devices(), store.width, going_on=going_on)
    if options != given and (given.data, given.dict) != (-1, -1):
        say(f"config.mesh: {given.data} x {given.dict} does not use the {jax.device_count()} devices here; the run goes on with "
            f"{options.data} x {options.dict} (data x dict)")
    mesh = sharding.make_mesh(options)
    check_agreement({"the activation store": store.digest}, "give a directory that all of them share, or equal copies of it")
    check_all(configs, mesh, store)
    with lease.writing(*[config.run_dir for config in configs]):
        yield _Run(configs, mesh, store, load, alone)


class _Run:
    """The moving parts of one run. alone: of an SAE by itself, not of a sweep, of which one may be left."""

    def __init__(self, configs: Sequence[Config], mesh: Mesh, store: Store, load: Load | None, alone: bool):
        self.store, self.load, self.alone, self.mesh = store, load, alone, mesh
        compiled = functools.cache(shared_step)  # once for all members of a shape
        self.members = [Member(config, store, self.mesh, compiled, alone=self.alone) for config in configs]
        self.flops = {member: flops_of_step(member, self.mesh) for member in self.members}  # of a step, on one device
        self.batch, self.every, self.log_options = configs[0].train.batch, checkpoint_steps(configs[0]), configs[0].log
        self.hookpoints = tuple(dict.fromkeys(name for config in configs for name in config.sae.hookpoints))
        self.rest = sharding.sharding(self.mesh, "rows_at_rest", None)
        self.where = self.members[0].paths.root if self.alone else self.members[0].paths.root.parent

    @property
    def training(self) -> list[Member]:
        """Members that are not at their end."""
        return [member for member in self.members if member.training]

    def go(self) -> None:
        try:
            with compilation_cache.kept(self.where), jax.set_mesh(self.mesh):
                start = self.resume()
                if self.training:
                    self.steps(start)
            self.wait()
        finally:
            for member in self.members:
                member.checkpoints.close()

    def wait(self) -> None:
        """Until all checkpoints are on disk."""
        for member in self.members:
            member.checkpoints.wait()

    def resume(self) -> int:
        """The step at which those go on that are not finished, their states loaded; 0: they start."""
        ended = {member: state for member in self.members if (state := member.find_end()) is not None and self.alone}
        start, states = self.restored()
        if self.training and not start:
            states = self.initial()
        for member, state in (states | ended).items():
            member.state = state
        total = max(member.total for member in self.members)
        self.say_what_bits_depend_on()
        if start:
            say(f"resuming {self.where} at step {start} of {total}" + ("" if self.alone else f" ({len(self.training)} SAEs)"))
        elif not self.training:
            say(f"{self.where} is already trained ({total} steps)")
        return start

    def say_what_bits_depend_on(self) -> None:
        """Once, before anything trains: what makes a GPU slow, and a machine that is not the one of the checkpoint."""
        for member in self.training[:1]:
            options = member.config.train
            for line in [*determinism.notes(options),
                         determinism.moved(options.deterministic, member.saved_on, determinism.machine())]:
                if line:
                    say(line)

    def restored(self) -> tuple[int, dict[Member, TrainState]]:
        """The newest step that every unfinished member has and that verifies, and the states there; (0, nothing) without one."""
        while self.training:
            common = set.intersection(*(set(member.checkpoints.steps()) for member in self.training))
            if not common:
                break
            found = {member: member.restore(max(common)) for member in self.training}
            if None in found.values():
                continue
            for member, (_, counters) in found.items():
                member.counters = counters
            places = {member.counters.stream for member in self.training}
            if len(places) > 1:
                raise CheckpointError(f"{self.where}: the SAEs stand at different rows of the stream ({places}); finish them one "
                                      "by one with `saejax train`")
            return max(common), {member: state for member, (state, _) in found.items()}
        for member in self.training:
            if len(member.checkpoints.steps()) > 1 and not self.alone:  # a kill leaves no more than one step that others lack
                without = [str(other.paths.root) for other in self.training if not other.checkpoints.steps()] or ["the others"]
                raise CheckpointError(
                    f"{member.paths.root}: its steps {member.checkpoints.steps()} are not among those of {', '.join(without)}; "
                    f"finish it first with `saejax train {member.paths.root}`, or delete it to start all again")
        return 0, {}

    def initial(self) -> dict[Member, TrainState]:
        """States of step 0; members that read the same rows share the sample."""
        samples: dict[tuple, np.ndarray] = {}
        states, origin = {}, self.training[0].counters.stream
        for member in self.training:
            config = member.config
            if config.sae.aux_k and config.sae.dead_tokens >= config.train.tokens:
                say(f"config.sae.dead_tokens = {config.sae.dead_tokens:,} is not less than config.train.tokens = "
                    f"{config.train.tokens:,}: no feature can count as dead, and AuxK has nothing to do")
            key = (config.sae.hookpoints, min(INIT_ROWS, self.store.kept_rows))
            if key not in samples:
                samples[key] = self.sample(*key, origin)
            stats = measured(samples[key], member.stats) if config.stream.mask_outliers else member.stats
            states[member] = initial_state(config, member.spec, stats, samples[key], self.mesh)
            if config.train.init_from:
                states[member] = started_from(states[member], config, member.spec, self.mesh, self.load)
        return states

    def sample(self, hookpoints: tuple[str, ...], rows: int, origin: StreamState) -> np.ndarray:
        """The first rows of the stream."""
        with self.stream(hookpoints, origin) as stream:
            batches = itertools.islice(stream, math.ceil(rows / self.batch))
            return np.concatenate([x_BW.astype(np.float32) for x_BW in batches])[:rows]

    def stream(self, hookpoints: tuple[str, ...], state: StreamState | int, lanes: Sequence[int] | None = None) -> Stream:
        return Stream(self.store, hookpoints, self.batch, self.members[0].config.stream, state, lanes)

    def own_stream(self, hookpoints: tuple[str, ...], state: StreamState | int) -> Stream:
        """A stream of the lanes that the rows of this process's devices touch, for `place`."""
        lanes = order_of(self.store, self.members[0].config.stream, self.batch, state).lanes
        return self.stream(hookpoints, state, sharding.pieces_here(self.rest, self.batch, self.batch // lanes))

    def place(self, stream: Stream, x_BW: np.ndarray) -> jax.Array:
        """The whole batch [B, W] on the devices, of the lanes that this process has read. Copied when this returns."""
        return sharding.place_pieces(x_BW, self.rest, self.batch, stream.lanes, stream.lane_rows)

    def steps(self, start: int) -> None:
        """All steps of all members, from after `start`."""
        last = max(member.total for member in self.training)
        totals = sum(member.total for member in self.training)
        with (self.own_stream(self.hookpoints, self.training[0].counters.stream) as stream, Preemption() as preemption,
              Progress("train", totals * self.batch, initial=start * self.batch * len(self.training),
                       enabled=self.log_options.progress) as bar, self.logs(start, stream, bar) as logs,
              self.profile(start, last) as profile):
            for number in range(start + 1, last + 1):
                with profile.step(number):
                    with jax.profiler.TraceAnnotation("wait for rows"):
                        rows = next(stream)
                    self.step(number, rows, stream, logs, bar)
                leaving = preemption.requested(number) and number < last
                self.save(number, logs, leaving)
                if leaving:
                    self.wait()
                    raise Preempted(f"{self.where}: stopped at step {number} of {last} on request, state saved; start the same "
                                    "command again to go on")
                if not self.training:
                    break

    def profile(self, start: int, last: int) -> Profile:
        def settle() -> None:
            jax.block_until_ready([member.state for member in self.members])

        steps = window(self.members[0].config.train.profile, start, last, self.every)
        return Profile(RunPaths(self.where).profile, steps, settle)

    def step(self, number: int, x_BW: np.ndarray, stream: Stream, logs: dict[Member, "_Log"], bar: Progress) -> None:
        """Dispatches one step of every member that trains, then does whatever is due for single ones."""
        placed: dict[tuple[str, ...], jax.Array] = {}
        dispatched: dict[Member, dict[str, jax.Array]] = {}
        for member in self.training:
            hookpoints = member.config.sae.hookpoints
            if hookpoints not in placed:
                placed[hookpoints] = self.place(stream, self.columns(x_BW, hookpoints))
            dispatched[member] = member.step(number, placed[hookpoints])
        state = stream.state
        epochs = dict(zip(("epochs_least", "epochs_most"), state.epochs, strict=True))
        for member, metrics in dispatched.items():
            member.counters = dataclasses.replace(member.counters, stream=state, tokens_seen=number * self.batch)
            if logs[member].step(number, metrics | epochs):
                self.stop_broken(member, number, bar)
            elif due(member.config.train.resample, (number - 1) * self.batch, number * self.batch, member.total * self.batch):
                self.resample(member, logs[member])

    def columns(self, x_BW: np.ndarray, hookpoints: tuple[str, ...]) -> np.ndarray:
        """The columns of these hookpoints, of rows of all of them."""
        if hookpoints == self.hookpoints:
            return x_BW
        ends = dict(zip(self.hookpoints, itertools.accumulate(map(self.store.width, self.hookpoints)), strict=True))
        parts = [x_BW[:, ends[name] - self.store.width(name):ends[name]] for name in hookpoints]
        return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts, axis=1)

    def save(self, number: int, logs: dict[Member, "_Log"], leaving: bool) -> None:
        """Checkpoints of the members that are due; none begins before those of the step before are on every disk."""
        due_now = [member for member in self.training if leaving or number % self.every == 0 or number == member.total]
        if due_now and not self.alone:
            self.wait()
        for member in due_now:
            logs[member].flush()
            member.save(number)
        for member in due_now:
            member.training = number < member.total
            if not (self.alone or member.training):
                member.state = None  # nobody reads it any more

    def stop_broken(self, member: Member, number: int, bar: Progress) -> None:
        """Too many steps in a row were left out: the last good parameters are saved, and the member ends."""
        member.save(number)
        member.checkpoints.wait()
        member.stop(number)
        member.state = None
        bar.shorten((member.total - number) * self.batch)
        if not self.alone:
            say(member.trouble)

    def resample(self, member: Member, log: "_Log") -> None:
        """Candidates come from a second, differently seeded stream over the same store: the training order is not touched."""
        config, occasion = member.config, member.counters.resamples
        n = max(1, config.train.resample.sample_rows // self.batch)
        n = min(n, max(1, self.store.kept_rows // self.batch))
        seed = config.seed + 1 + occasion

        def batches() -> Iterator[jax.Array]:
            with self.own_stream(config.sae.hookpoints, seed) as stream:
                for x_BW in itertools.islice(stream, n):
                    yield self.place(stream, x_BW)

        member.state, replaced = resample(config, member.spec, member.state, (batches(), batches()), occasion)
        log.note(resampled=replaced)
        member.counters = dataclasses.replace(member.counters, resamples=occasion + 1)

    @contextlib.contextmanager
    def logs(self, start: int, stream: Stream, bar: Progress):
        """A log for every member that trains."""
        shown = _Shown(bar, len(self.training))
        with contextlib.ExitStack() as stack:
            logs = {}
            for member in self.training:
                config, paths = member.config, member.paths
                tensorboard = paths.tensorboard if config.log.tensorboard else None
                writer = MetricWriter(paths.metrics, tensorboard=tensorboard, wandb_project=config.log.wandb,
                                      name=config.name, config=config_lib.to_json(config), resume_step=start)
                rates = Rates(self.batch, lambda: sum(self.flops[member] for member in self.training),
                              lambda: stream.wait_seconds, self.mesh.devices.flat[0])
                logs[member] = stack.enter_context(_Log(config, writer, rates, shown.of(len(logs))))
            yield logs


class _Shown:
    """The one bar of all SAEs. Behind it: of one SAE its figures; of several the first's loss, its FVU and the worst."""

    def __init__(self, bar: Progress, n: int):
        self.bar, self.fvu, self.loss = bar, [math.nan] * n, math.nan

    def of(self, who: int) -> Callable:
        """`advance(n, **figures)` of one SAE."""
        def advance(n: int, **figures: float) -> None:
            if figures and len(self.fvu) > 1:  # losses of different kinds do not compare; FVU does
                self.fvu[who], self.loss = figures["fvu"], figures["loss"] if who == 0 else self.loss
                own = ("loss", "l0", "fvu", "dead", "skipped")
                figures = {"loss": self.loss, "fvu": self.fvu[0], "worst_fvu": np.nanmax([*self.fvu, 0.0])} | {
                    name: value for name, value in figures.items() if name not in own}
            self.bar.advance(n, **figures)

        return advance


class _Log:
    """Metrics of step n are read after step n + 1 was dispatched, so that the devices never wait for the host."""

    def __init__(self, config: Config, writer: MetricWriter, rates: Rates, advance: Callable):
        self.config, self.writer, self.rates, self.advance = config, writer, rates, advance
        self.pending: tuple[int, dict] | None = None
        self.extra: dict[str, float] = {}

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
        with jax.profiler.TraceAnnotation("wait for the step before"):
            self._read(*previous)
        broken = int(np.asarray(previous[1]["skipped_in_row"])) >= MAX_SKIPPED
        self.pending = None if broken else self.pending
        return broken

    def note(self, **values: float) -> None:
        """Values that appear in the next metric line."""
        self.extra.update(values)

    def flush(self) -> None:
        previous, self.pending = self.pending, None
        if previous is not None:
            self._read(*previous)

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        jax.block_until_ready(metrics["loss"])
        if self.rates.before is None:  # rates count from the end of the first step: compilation is not throughput
            self.rates.at(step)
        batch = self.config.train.batch
        if step % self.config.log.every_steps and self.pending is not None:
            self.advance(batch)
            return
        jax.block_until_ready(metrics)
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # those of a step that was left out
        rates = self.rates.at(step)
        lease.confirm()
        self.writer.write(step, {"tokens_seen": step * batch, **values, **rates, **self.extra})
        self.extra = {}
        names = ["loss", "l0", "fvu", "dead_fraction"] + (["skipped"] if values["skipped"] else [])
        self.advance(batch, **{name.removesuffix("_fraction"): values.get(name, math.nan) for name in names}, **on_bar(rates))
