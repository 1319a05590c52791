"""Training steps of topk with Adam over all rows and over those that fired: python benchmarks/lazy_rows.py

    [--features 65536] [--width 768] [--batch 128 512 2048] [--k 32] [--steps 8]

Prints a Markdown table: milliseconds of a whole step (gradients, Adam, constraints) at best and at worst of the steps timed, and
the share of features that fire in one. Random rows, other ones at each step; all states are without first moment (beta1 = 0),
and nothing is dead, so AuxK does nothing.
"""

import argparse
import time

import jax
import numpy as np

from saejax.base import sharding
from saejax.base.records import ActivationStats
from saejax.config import default_config, resolve
from saejax.sae import SAESpec
from saejax.train.state import initial_state
from saejax.train.step import make_step

CASES = {"dense gradients, all rows": ("dense", "second"), "sparse path, all rows": ("sparse", "second"),
         "sparse path, all rows, 6 B": ("sparse", "second_bf16"), "lazy rows": ("sparse", "lazy"),
         "lazy rows, 6 B": ("sparse", "lazy_bf16")}


def timed(case: str, args, batch: int, x: np.ndarray) -> tuple[np.ndarray, float]:
    """(seconds of each step, mean share of the rows that fire in one)."""
    path, optimizer = CASES[case]
    c = default_config("topk")
    c.lm.model, c.sae.d_sae, c.sae.k, c.sae.dead_tokens = "synthetic", args.features, args.k, 10**9
    c.train.batch, c.train.tokens, c.train.path, c.train.optimizer = batch, batch * 1000, path, optimizer
    config = resolve(c)
    norms = np.linalg.norm(x, axis=1)
    stats = ActivationStats(len(x), x.mean(0).astype(np.float64), norms.mean(), np.square(norms).mean(), np.median(norms))
    spec, mesh = SAESpec.from_options(config.sae, {config.sae.hookpoint: args.width}), sharding.single_device_mesh()
    state, step, times, touched = initial_state(config, spec, [stats], x, mesh), make_step(config, spec, 1000), [], []
    with jax.set_mesh(mesh):
        for i in range(args.steps + 1):  # the first one compiles
            first = i * batch % (len(x) - batch + 1)
            rows = sharding.place(x[first:first + batch], sharding.sharding(mesh, "rows_at_rest", None))
            start = time.perf_counter()
            state, metrics = step(state, rows)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
            touched.append(float((np.asarray(state.tokens_since_fired_F) == 0).mean()))
    return np.array(times[1:]), float(np.mean(touched[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((4 * max(args.batch), args.width), np.float32)
    print(f"topk {args.width} -> {args.features}, k = {args.k}, {jax.devices()[0].platform}\n")
    print("| batch | step | ms at best | ms at worst | rows touched |\n|---|---|---|---|---|")
    for batch in args.batch:
        for case in CASES:
            times, share = timed(case, args, batch, x)
            print(f"| {batch} | {case} | {1e3 * times.min():.0f} | {1e3 * times.max():.0f} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
