"""Cost of the feature index: both passes against encoding alone, and device memory against its formula.

    python benchmarks/feature_index.py [--memory_only] [FEATURES ...]      # default 4096 16384 65536; k = 32, width 576

Rows and SAE are random; the time does not depend on what fires where, but for how often a maximum grows: the first batches, in
which it does so most, are not timed. One device, or all of them along `dict`.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.features.index import accumulate
from saejax.features.index.examples import Examples
from saejax.features.index.lookup import Lookup
from saejax.features.index.state import BYTES_PER_FEATURE
from saejax.features.index.windows import Windows
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.model import encode
from saejax.sae.sparse import tile_size

WIDTH, K, CONTEXT, ROWS, EXAMPLES_PER_ROW = 576, 32, 128, 4096, 1


def make_sae(features: int) -> SAE:
    mesh = sharding.make_mesh(MeshOptions(1, -1))
    W = jnp.asarray(np.random.default_rng(0).standard_normal((features, WIDTH), np.float32) / WIDTH**0.5)
    params = SAEParams(W_enc=W, b_enc=jnp.zeros(features), W_dec=W, b_dec=jnp.zeros(WIDTH))
    return SAE(params, SAEConfig("topk", WIDTH, features, K, False, ("h",), "random"), mesh)


def batch(sae: SAE, contexts: int, number: int):
    x = np.random.default_rng(number).standard_normal((contexts * CONTEXT, WIDTH), np.float32)
    return (sharding.place(x, sharding.sharding(sae.mesh, "rows", "d_in")),
            sharding.place(np.ones(len(x), bool), sharding.sharding(sae.mesh, "rows")))


def seconds(function, repeats: int = 7) -> float:
    """Median; the first call is not counted."""
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(i))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def gather_of(sae: SAE, rows: int, folder):
    """The second pass' lookup of a random feature's window for every row."""
    rng = np.random.default_rng(1)
    n = rows * EXAMPLES_PER_ROW
    examples = Examples(np.sort(rng.integers(0, sae.cfg.d_sae, n)).astype(np.int32), np.zeros(n, np.int8), np.ones(n, np.float32),
                        rng.integers(0, rows, n).astype(np.uint32))
    (folder / "windows.bin").write_bytes(bytes(4 * n * 32))
    windows = Windows(folder, examples, CONTEXT, 0)
    lookup = Lookup.of(sae, windows.window)
    start = (windows.context_E * CONTEXT + windows.start_E).astype(np.int32)
    return lambda x, keep: lookup.gather(sae.params, lookup.prepare(sae.params, x), keep, start, examples.feature)


def formula(features: int, contexts: int, devices: int) -> float:
    """Bytes on a device while the first pass adds a batch, beyond the SAE's parameters; see docs/explanation/feature_index.md."""
    batch = contexts * (accumulate.PEAK * features / devices + CONTEXT * K * accumulate.PAIR)
    return features / devices * 2 * BYTES_PER_FEATURE + batch + 8 * tile_size(features // devices, jax.default_backend())


def main(features: int, memory_only: bool) -> None:
    import pathlib
    import tempfile
    sae = make_sae(features)
    contexts = accumulate.batch_contexts(sae, CONTEXT, ROWS // CONTEXT)
    rows, devices = contexts * CONTEXT, sae.mesh.size
    step, state = accumulate.make_step(sae, CONTEXT, contexts), accumulate.empty_state(features, sae.mesh)
    with jax.set_mesh(sae.mesh):
        x, keep = batch(sae, contexts, 0)
        memory = step.lower(state, sae.params, x, keep, np.uint32(0)).compile().memory_analysis()
        used = BYTES_PER_FEATURE * features / devices + memory.temp_size_in_bytes
        print(f"{features:>8} features, {rows} rows a batch: {used / 2**20:,.0f} MiB a device, formula "
              f"{formula(features, contexts, devices) / 2**20:,.0f} MiB, {devices} device(s)")
        if memory_only:
            return
        encoder = jax.jit(lambda params, x: encode(sae.cfg.spec, params, x).sum(0))
        batches = [batch(sae, contexts, i) for i in range(12)]
        for i in range(4):
            state = step(state, sae.params, *batches[i], np.uint32(i * rows))
        held = [state]

        def advance(i):
            held[0] = step(held[0], sae.params, *batches[4 + i], np.uint32((4 + i) * rows))
            return held[0]

        with tempfile.TemporaryDirectory() as folder:
            gather = gather_of(sae, rows, pathlib.Path(folder))
            times = {"encode": seconds(lambda i: encoder(sae.params, batches[i][0])), "pass 1": seconds(advance),
                     "pass 2": seconds(lambda i: gather(*batches[i]))}
    for name, t in times.items():
        print(f"          {name}: {rows / t:,.0f} tokens/s, {t / times['encode']:.2f} x encode")


if __name__ == "__main__":
    sizes = [int(a) for a in sys.argv[1:] if not a.startswith("--")] or [4096, 16384, 65536]
    for size in sizes:
        main(size, "--memory_only" in sys.argv)
