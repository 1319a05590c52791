"""Training steps of topk, batchtopk and matryoshka on the dense and on the sparse path, the same random rows for all.

    python benchmarks/step_paths.py [--features 18432] [--width 576] [--batch 512 2048] [--k 50]

Prints a Markdown table: milliseconds of a whole step (gradients, Adam, constraints) at best and at worst of the steps timed, and
rows per second at best. Nothing is dead, so AuxK does nothing.
"""

import argparse
import time

import jax
import numpy as np

from saejax import sharding
from saejax.config import default_config, resolve
from saejax.records import ActivationStats
from saejax.sae import SAESpec
from saejax.train.state import initial_state
from saejax.train.step import make_step

STEPS = 8


def seconds(kind: str, path: str, args, batch: int, x: np.ndarray) -> np.ndarray:
    c = default_config(kind)
    c.lm.model, c.sae.d_sae, c.sae.k, c.sae.dead_tokens = "synthetic", args.features, args.k, 10**9
    c.train.batch, c.train.tokens, c.train.sparse = batch, batch * 1000, {"dense": "never", "sparse": "always"}[path]
    config = resolve(c)
    norms = np.linalg.norm(x, axis=1)
    stats = ActivationStats(len(x), x.mean(0).astype(np.float64), norms.mean(), np.square(norms).mean(), np.median(norms))
    spec, mesh = SAESpec.from_options(config.sae, {config.sae.hookpoint: args.width}), sharding.single_device_mesh()
    state, step, times = initial_state(config, spec, [stats], x, mesh), make_step(config, spec, 1000), []
    with jax.set_mesh(mesh):
        rows = sharding.place(x[:batch], sharding.sharding(mesh, "rows_at_rest", None))
        for _ in range(STEPS + 1):  # the first one compiles
            start = time.perf_counter()
            state, metrics = step(state, rows)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    return np.array(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=18_432)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--k", type=int, default=50)
    args = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((max(4096, *args.batch), args.width), np.float32)
    print(f"{args.width} -> {args.features}, k = {args.k}, {jax.devices()[0].platform}\n")
    print("| kind | batch | path | ms at best | ms at worst | rows/s |\n|---|---|---|---|---|---|")
    for kind in ("topk", "batchtopk", "matryoshka"):
        for batch in args.batch:
            for path in ("dense", "sparse"):
                times = seconds(kind, path, args, batch, x)
                print(f"| {kind} | {batch} | {path} | {1e3 * times.min():.0f} | {1e3 * times.max():.0f} | "
                      f"{batch / times.min():,.0f} |", flush=True)


if __name__ == "__main__":
    main()
