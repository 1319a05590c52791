"""Time of choosing the active features of a batch: per row (topk) against over the whole batch (batchtopk).

    python benchmarks/selection_cost.py [ROWS FEATURES K]      # default 1024 4608 32, one device
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from saejax.sae.activations import batchtopk, topk


def milliseconds(function, pre_BF: jax.Array, k: int, repeats: int = 15) -> np.ndarray:
    compiled = jax.jit(lambda pre_BF: function(pre_BF, k).sum(0))  # the sum keeps the result's [B, F] out of the timing
    compiled(pre_BF).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        compiled(pre_BF).block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return np.array(times)


if __name__ == "__main__":
    rows, features, k = map(int, sys.argv[1:] or (1024, 4608, 32))
    pre_BF = jnp.asarray(np.random.default_rng(0).standard_normal((rows, features), np.float32) * 0.3)
    for function in (topk, batchtopk):
        times = milliseconds(function, pre_BF, k)
        print(f"{function.__name__}: {times.min():.1f} ms at best, {np.median(times):.1f} ms median "
              f"({rows} x {features}, k = {k}, {jax.devices()[0].platform})")
