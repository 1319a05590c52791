"""Training steps as a run makes them, on random rows that stay on the device."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.base.records import ActivationStats, MeshOptions
from saejax.bench.options import BenchOptions, figure
from saejax.config import default_config, resolve
from saejax.config.recipes import WITH_K
from saejax.sae import SAESpec
from saejax.sae.activations import batchtopk, topk
from saejax.train.member import settled
from saejax.train.state import initial_state
from saejax.train.step import make_step

_STEPS = 1_000_000  # of the schedule: no step that is measured lies at its end


def random_rows(batch: int, width: int) -> np.ndarray:
    """float32 [batch or more, width], the same for the same width."""
    return np.random.default_rng(0).standard_normal((max(4096, batch), width), np.float32)


class Training:
    """A state and the compiled steps that move it on. Nothing is dead, so AuxK does nothing."""

    def __init__(self, kind: str, options: BenchOptions, mesh: Mesh, **changes):
        """changes: keys of the config, by path. Raises `ConfigError`."""
        c = default_config(kind)
        c.lm.model, c.sae.d_sae, c.sae.dead_tokens = "random", options.d_sae, 10**9
        c.train.batch, c.train.tokens = options.batch, options.batch * _STEPS
        if c.sae.kind in WITH_K:
            c.sae.k = options.k
        c.train.compute_dtype = options.compute_dtype
        c.update_from_flattened_dict(changes)
        self.config, self.mesh, self.batch = settled(resolve(c)), mesh, options.batch
        self.spec = SAESpec.from_options(self.config.sae, {self.config.sae.hookpoint: options.d_in},
                                         self.config.train.compute_dtype)
        x = random_rows(options.batch, options.d_in)
        norms = np.linalg.norm(x, axis=1)
        stats = ActivationStats(len(x), x.mean(0).astype(np.float64), norms.mean(), np.square(norms).mean(), np.median(norms))
        self.state = initial_state(self.config, self.spec, [stats], x, mesh)
        with jax.set_mesh(mesh):
            self.rows = sharding.place(x[:options.batch], sharding.sharding(mesh, "rows_at_rest", None))
        self._steps = {}

    def seconds(self, path: str, steps: int) -> float:
        """Of `steps` steps on a path of `train.path`; waits at the end only. The first call of a path compiles."""
        if path not in self._steps:
            train = dataclasses.replace(self.config.train, path=path)
            self._steps[path] = make_step(dataclasses.replace(self.config, train=train), self.spec, _STEPS)
        step = self._steps[path]
        with jax.set_mesh(self.mesh):
            jax.block_until_ready(self.state)
            start = time.perf_counter()
            for _ in range(steps):
                self.state, metrics = step(self.state, self.rows)
            jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start


class Selection:
    """Activation functions of the kinds with k on random pre-activations."""

    def __init__(self, options: BenchOptions):
        pre_BF = np.random.default_rng(0).standard_normal((options.batch, options.d_sae), np.float32) * 0.3
        self.batch, self._pre_BF = options.batch, jax.device_put(pre_BF)
        # The sum keeps the result's [B, F] out of the timing.
        self._compiled = {function.__name__: jax.jit(lambda pre_BF, of=function: of(pre_BF, options.k).sum(0))
                          for function in (topk, batchtopk)}

    def seconds(self, name: str, times: int) -> float:
        """Of `times` selections, one after the other."""
        start = time.perf_counter()
        for _ in range(times):
            out = self._compiled[name](self._pre_BF)
        jax.block_until_ready(out)
        return time.perf_counter() - start


def selection(options: BenchOptions) -> Iterator[dict]:
    """What the kind adds to the products, by itself."""
    yield from _figures(Selection(options), {"topk": "topk", "batchtopk": "batchtopk"}, options)


def step(options: BenchOptions) -> Iterator[dict]:
    """The paths alternate: what else the machine does meets both."""
    for kind in options.kinds:
        training = Training(kind, options, sharding.single_device_mesh())
        paths = ("dense", "sparse") if training.spec.kind in WITH_K else ("dense",)
        yield from _figures(training, {f"{kind}, {path}": path for path in paths}, options)
        del training


def devices(options: BenchOptions) -> Iterator[dict]:
    """The first kind, on the path that training takes by itself; numbers of devices that divide batch and features."""
    kind = options.kinds[0]
    counts = [n for n in options.device_counts if n <= len(jax.devices()) and options.batch % n == options.d_sae % n == 0]
    if not counts:
        raise ConfigError(f"devices={options.devices}: none of them is at most the {len(jax.devices())} here and "
                          "divides batch and d_sae")
    for n in counts:
        training = Training(kind, options, sharding.make_mesh(MeshOptions(1, n), jax.devices()[:n]))
        yield from _figures(training, {f"{kind}, {n} device{'s' if n > 1 else ''}": "auto"}, options)
        del training


def _figures(training: Training | Selection, paths: dict[str, str], options: BenchOptions) -> Iterator[dict]:
    first = {name: training.seconds(path, 1) for name, path in paths.items()}
    seconds = {name: [] for name in paths}
    for _ in range(options.repeats):
        for name, path in paths.items():
            seconds[name].append(training.seconds(path, options.steps) / options.steps)
    for name, values in seconds.items():
        yield figure(name, "rows/s", [training.batch / value for value in values], ms=1e3 * float(np.median(values)),
                     first_call_s=first[name])
