"""`benchmarks/gpu.py world`: the synthetic world sampled and trained on the device within a time, and scores."""

import functools
import json
import signal
import threading
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from synthetic_quality import FIGURES, PUBLISHED, SIZES, Size, recipe

from saejax.base import sharding
from saejax.base.records import ActivationStats
from saejax.config import Config
from saejax.evals.synthetic import World, WorldOptions, score
from saejax.sae import SAESpec
from saejax.sae.inference import SAE, SAEConfig, fold, folded_kind
from saejax.train.member import settled
from saejax.train.state import TrainState, initial_state
from saejax.train.step import Hyperparameters, one_step

WORLD_SEED = 42
SAMPLE = 8192      # rows that normalisation and first biases are taken from
MARGIN = 1.1       # of the measured time of a step
SAY = 15.0         # seconds between lines
TOLERANCE = 1.03   # a plan that is late by more is made anew
CHECKS = (0.1, 0.35, 0.7)  # shares of the steps after which that is looked at: AuxK costs time once features are dead


@dataclass(frozen=True)
class Plan:
    """What does not change while a world is trained on. chunk: steps in one call of the device; held: rows of the scores;
    reserve: seconds kept for the scores.
    """

    kind: str
    size: Size
    world: World
    chunk: int
    held: int
    reserve: float
    args: Namespace

    def config(self, steps: int) -> tuple[Config, SAESpec]:
        size = replace(self.size, tokens=steps * self.size.batch)
        c = settled(recipe(self.kind, size, Path("unused"), self.args))
        return c, SAESpec.from_options(c.sae, {c.sae.hookpoint: size.d_in}, c.train.compute_dtype)


def plan_of(args) -> Plan:
    size = SIZES["small" if args.tiny else "published"]
    size = replace(size, batch=args.batch or (size.batch if args.tiny else 2048))
    world = World.make(WorldOptions(features=size.features, d_in=size.d_in, roots=size.roots), WORLD_SEED)
    chunk, held, reserve = (10, 2**13, 10.0) if args.tiny else (100, 2**16, 50.0)
    return Plan(args.kind, size, world, chunk, held, reserve, args)


def key_of(plan: Plan, purpose: int) -> jax.Array:
    """Of rows; the generator that is fast on accelerators."""
    return jax.random.key(1000 * (1 + plan.args.seed) + purpose, impl="rbg")


def first_state(plan: Plan, steps: int, mesh) -> TrainState:
    c, spec = plan.config(steps)
    x = np.asarray(plan.world.draw(key_of(plan, 0), SAMPLE)[0])
    norms = np.linalg.norm(x, axis=1)
    stats = ActivationStats(len(x), x.mean(0).astype(np.float64), norms.mean(), np.square(norms).mean(), np.median(norms))
    return initial_state(c, spec, [stats], x, mesh)


def trainer(plan: Plan, steps: int):
    """`go(state, world, start) -> (state, l0, explained variance)`: `plan.chunk` steps on rows that are drawn on the way, means
    over them. The schedule is that of `steps`.
    """
    c, spec = plan.config(steps)
    own = Hyperparameters.of(c)

    def step(world: World, state: TrainState, number: jax.Array):
        x_BD, _ = world.draw(jax.random.fold_in(key_of(plan, 1), number), plan.size.batch)
        x_BD = jax.sharding.reshard(x_BD, sharding.spec("rows_at_rest", None))
        state, metrics = one_step(c, spec, steps, own, state, x_BD)
        return state, (metrics["l0"], metrics["explained_variance"])

    @functools.partial(jax.jit, donate_argnums=0)
    def go(state: TrainState, world: World, start: jax.Array):
        state, seen = lax.scan(functools.partial(step, world), state, start + jnp.arange(plan.chunk))
        return state, *(value.mean() for value in seen)

    return go


class Training:
    """A state, the program that moves it on, and the clock."""

    def __init__(self, plan: Plan, mesh, say):
        self.plan, self.mesh, self.say, self.stopped = plan, mesh, say, False
        self.done, self.total, self.each, self.compiled, self.spoken = 0, 0, 0.0, 0.0, 0.0  # each, compiled: seconds

    def calibrate(self) -> None:
        """Seconds of a step and of a compilation, by some chunks of a run that is thrown away."""
        start = time.monotonic()
        state, go = first_state(self.plan, 10_000, self.mesh), trainer(self.plan, 10_000)
        state = self._chunk(go, state, 0)[0]
        first, times = time.monotonic() - start, []
        while len(times) < 3 or sum(times) < min(6.0, first):
            start = time.monotonic()
            state = self._chunk(go, state, self.plan.chunk * (len(times) + 1))[0]
            times.append(time.monotonic() - start)
        self.each = MARGIN * max(float(np.median(times)), float(np.mean(times))) / self.plan.chunk
        self.compiled = max(0.0, first - min(times))
        self.say(f"{1e3 * self.each / MARGIN:.2f} ms a step of {self.plan.size.batch:,} rows, drawing them included; "
                 f"compilation {self.compiled:.1f} s")

    def _chunk(self, go, state: TrainState, start: int):
        return jax.block_until_ready(go(state, self.plan.world, jnp.int32(start)))

    def fitting(self, left: float) -> int:
        """Steps in all, such that those that are still to come take no more than `left` seconds after another compilation."""
        chunk, wanted = self.plan.chunk, max(1, self.plan.args.samples // self.plan.size.batch)
        more = max(0.0, left - self.compiled) / self.each
        return max(chunk, self.done + chunk, min(int(self.done + more), wanted) // chunk * chunk)

    def run(self, deadline: float) -> TrainState:
        """Trains until the schedule ends; until the deadline or `stop` where that comes first."""
        self.total = self.fitting(deadline - time.monotonic())
        self.say(f"plan: {self.total:,} steps, {self.total * self.plan.size.batch / 1e6:.1f} M samples")
        state, go = first_state(self.plan, self.total, self.mesh), trainer(self.plan, self.total)
        mark, checks = None, list(CHECKS)
        while self.done < self.total:
            state, l0, explained = self._chunk(go, state, self.done)
            self.done += self.plan.chunk
            now = time.monotonic()
            mark = mark or (now, self.done)  # the first chunk compiles
            self._tell(now, float(l0), float(explained))
            if (self.stopped or now > deadline) and self.done < self.total:
                self.say(f"out of time at step {self.done:,} of {self.total:,}: the schedule has not ended; this state is scored")
                break
            if checks and self.done >= checks[0] * self.total and self.done > mark[1] + self.plan.chunk:
                checks.pop(0)
                self.each = (now - mark[0]) / (self.done - mark[1])
                mark = now, self.done
                if self.each * (self.total - self.done) > (deadline - now) * TOLERANCE:
                    go, mark = self._replanned(deadline - now), None
        return state

    def _replanned(self, left: float):
        """The program of fewer steps, where those so far were slower than planned: the same state goes on in it."""
        self.total = self.fitting(left / TOLERANCE)
        self.say(f"slower than planned: {self.total:,} steps, {self.total * self.plan.size.batch / 1e6:.1f} M samples")
        return trainer(self.plan, self.total)

    def stop(self, *_) -> None:
        """After the chunk that runs."""
        self.stopped = True

    def _tell(self, now: float, l0: float, explained: float) -> None:
        if now - self.spoken >= SAY or self.done >= self.total:
            self.spoken = now
            self.say(f"step {self.done:,} of {self.total:,}: L0 {l0:.2f}, explained variance of fresh rows {explained:.4f}")


def sae_of(plan: Plan, state: TrainState, steps: int, mesh) -> SAE:
    """As a checkpoint of it would be loaded."""
    _, spec = plan.config(steps)
    params = state.params
    if spec.kind == "batchtopk":
        params = params.replace(per_feature={"threshold": jnp.zeros_like(params.b_enc) + state.moving["threshold"]})
    kind = folded_kind(spec.kind, params)
    with jax.set_mesh(mesh):
        params = jax.jit(fold, static_argnums=0)(spec, params, state.normalization)
    params = jax.device_put(params, jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
    return SAE(params, SAEConfig(kind=kind, d_in=spec.d_in, d_sae=spec.d_sae, k=spec.k if kind == "topk" else 0,
                                 pre_bias=spec.pre_bias, hookpoints=("synthetic",), model="synthetic"))


def scored(plan: Plan, sae: SAE) -> dict:
    """Scores on rows that no training saw, the same for all kinds and seeds."""
    key, rows = jax.random.key(777, impl="rbg"), min(4096, plan.held)
    batches = (plan.world.draw(jax.random.fold_in(key, i), rows) for i in range(plan.held // rows))
    return score(sae, batches, np.asarray(plan.world.directions_FD))


def shown(plan: Plan, result: dict) -> str:
    """Markdown: the scores above the published ones."""
    head = (*FIGURES, "dead_features", "samples")
    cells = [f"{result[name]:.4f}" for name in FIGURES] + [str(result["dead_features"]), f"{result['samples'] / 1e6:.1f} M"]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|", f"| {plan.kind}, saejax | {' | '.join(cells)} |"]
    if plan.kind in PUBLISHED:
        published = " | ".join(f"{value:.4f}" for value in PUBLISHED[plan.kind])
        lines.append(f"| {plan.kind}, published, 16,384 features | 25 | {published} | | 200 M |")
    else:
        lines.append(f"| {plan.kind}, published | none |" + " |" * (len(head) - 1))
    return "\n".join(lines)


class Clock:
    """Lines with the seconds since the start; one at least every `SAY` seconds, whatever the program is at."""

    def __init__(self):
        self.started = self.last = time.monotonic()
        threading.Thread(target=self._beat, daemon=True).start()

    def __call__(self, text: str) -> None:
        self.last = time.monotonic()
        print(f"[{self.last - self.started:4.0f} s] {text}", flush=True)

    def _beat(self) -> None:
        while True:
            time.sleep(1.0)
            if time.monotonic() - self.last > SAY + 2:
                self("...")


def world(args) -> None:
    say = Clock()
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    plan, mesh = plan_of(args), sharding.single_device_mesh()
    jax.block_until_ready(plan.world.directions_FD)
    say(f"world of {plan.size.features:,} features in {plan.size.d_in} dimensions; {plan.kind}, {plan.size.d_sae:,} features")
    with jax.set_mesh(mesh):
        training = Training(plan, mesh, say)
        training.calibrate()
        signal.signal(signal.SIGTERM, training.stop)
        state = training.run(say.started + args.seconds - plan.reserve)
    sae = sae_of(plan, state, training.total, mesh)
    result = scored(plan, sae)
    dtype = plan.config(training.total)[1].compute_dtype
    result |= {"kind": plan.kind, "seed": args.seed, "set": args.set, "compute_dtype": dtype,
               "samples": training.done * plan.size.batch, "complete": training.done >= training.total,
               "seconds": round(time.monotonic() - say.started, 1), "card": jax.devices()[0].device_kind, "tiny": args.tiny}
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "gpu.jsonl", "a") as file:
        file.write(json.dumps({"section": "world"} | result) + "\n")
    say(json.dumps(result))
    print(f"\n{shown(plan, result)}", flush=True)
