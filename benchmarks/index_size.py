"""Time and memory of a whole feature index, stage by stage, where the dictionary is large.

    JAX_NUM_CPU_DEVICES=8 JAX_PLATFORMS=cpu python benchmarks/index_size.py [FEATURES [CONTEXTS [KIND [NEIGHBOURS]]]]

Default: 131072 8 topk auto. A topk (k = 32) or relu SAE of width 256, random rows in contexts of 128 tokens, a small random
language model of the tests; all devices along `dict`. The time of a stage is without that of the stages inside it, but with that
of compiling; memory is the most that the process held.
"""

import contextlib
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the tests' language model

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.data.arrays import store_of
from saejax.features.index import build as building
from saejax.features.index import corpus, tables
from saejax.lm import load
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from tests import tiny_experiment as tiny
from tests.lm import tiny_llama

WIDTH, K, CONTEXT, HOOKPOINT = 256, 32, 128, "blocks.1.hook_resid_post"
STAGES = {"pass 1": (building, "_states"), "examples": (building, "_examples"), "pass 2": (building, "_surroundings"),
          "weights": (tables, "_weights"), "logits": (tables, "_logits"), "cosines": (tables, "nearest"),
          "parts": (tables, "write_parts"), "activity": (tables, "_activity"), "top tokens": (tables, "_tokens"),
          "firing together": (tables, "_together"),
          "writing tables": (tables, "write"), "manifest": (tables, "write_manifest")}


class Clock:
    """Seconds of each stage, without those of the stages inside it."""

    def __init__(self):
        self.seconds, self._running, self._since = Counter(), ["rest"], time.perf_counter()

    def turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def stage(self, name: str):
        self.turn()
        self._running.append(name)
        yield
        self.turn()
        self._running.pop()

    def watch(self) -> None:
        for name, (module, function) in STAGES.items():
            setattr(module, function, self._timed(name, getattr(module, function)))

    def _timed(self, name: str, function):
        def timed(*given, **more):
            with self.stage(name):
                return function(*given, **more)

        return timed


def make_sae(features: int, kind: str) -> SAE:
    W = np.random.default_rng(0).standard_normal((features, WIDTH), np.float32) / WIDTH**0.5
    b_enc = np.full(features, 0 if kind == "topk" else -3, np.float32)  # relu: a thousandth of the features fires
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.asarray(b_enc), W_dec=jnp.asarray(W), b_dec=jnp.zeros(WIDTH))
    cfg = SAEConfig(kind, WIDTH, features, K if kind == "topk" else 0, False, (HOOKPOINT,), "tiny")
    return SAE(params, cfg, sharding.make_mesh(MeshOptions(1, -1)))


def main(features: int, contexts: int, kind: str, neighbours: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rng = np.random.default_rng(1)
        store = store_of({HOOKPOINT: rng.standard_normal((contexts, CONTEXT, WIDTH), np.float32)}, folder / "store",
                         tokens=rng.integers(3, 31, (contexts, CONTEXT)))
        config = tiny_llama.CONFIG | {"hidden_size": WIDTH, "num_attention_heads": 8}
        lm_ = load(str(tiny.write_model(folder / "lm", config)))
        sae, clock = make_sae(features, kind), Clock()
        clock.watch()
        index = building.build(folder / "index", sae, corpus.from_store(store, (HOOKPOINT,)), lm_,
                               building.BuildOptions(neighbours=neighbours, progress=False))
        clock.turn()
        totals = index.manifest["totals"]
        size = sum(file.stat().st_size for file in index.path.iterdir())
    near = index.manifest["settings"]["neighbours"]
    print(f"{kind}, {features:,} features, neighbours of {near}, {contexts * CONTEXT:,} tokens, {sae.mesh.size} devices: "
          f"{sum(clock.seconds.values()):.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB; "
          f"{totals['alive']:,} alive, {totals['examples']:,} examples, {size / 2**20:,.0f} MiB")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.seconds.most_common()))


if __name__ == "__main__":
    given = [*sys.argv[1:], *("131072", "8", "topk", "auto")[len(sys.argv) - 1:]]
    main(int(given[0]), int(given[1]), *given[2:])
