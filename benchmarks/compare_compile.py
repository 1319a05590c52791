"""Matching two dictionaries at pod scale, compiled for a TPU slice that is not there: python benchmarks/compare_compile.py

Needs the TPU compiler (pip install -e '.[tpu-plan]') and no TPU. Prints what a block of queries needs on each chip, and what all
blocks cost, both directions at once: the compiler's word and a model, not a measurement.
"""

import argparse

import jax
import jax.numpy as jnp

from saejax.base import hardware, sharding
from saejax.features.index.neighbours import _both_ways
from saejax.plan.compiled import mesh_for, read

BLOCK = 256


def main(topology: str, features: int, width: int) -> None:
    """F x F features of `width` on all chips along `dict`."""
    chips = hardware.parse(topology)
    n = chips.size
    mesh = mesh_for(chips, 1, n)
    rows = jax.ShapeDtypeStruct((features, width), jnp.float32, sharding=sharding.sharding(mesh, "features", None))
    whole = sharding.sharding(mesh)
    queries = jax.ShapeDtypeStruct((BLOCK, width), jnp.float32, sharding=whole)
    split = sharding.sharding(mesh, "features")
    best = [jax.ShapeDtypeStruct((features,), dtype, sharding=split) for dtype in (jnp.int32, jnp.float32)]
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    with jax.set_mesh(mesh):
        compiled = _both_ways.trace(rows, queries, *best, number, number).lower(lowering_platforms=("tpu",)).compile()
    found = read(compiled, 1, n)
    flops = 2 * features**2 * width
    print(f"{features:,} against {features:,} features of width {width} on {topology}, a block of {BLOCK} queries:")
    print(f"  bytes on a chip: {', '.join(f'{name} {value / 1e9:.2f} GB' for name, value in found['memory'].items())}")
    print(f"  {features // BLOCK:,} blocks, {flops:.2e} FLOPs for both directions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--features", type=int, default=2**20)
    parser.add_argument("--width", type=int, default=2304)
    given = parser.parse_args()
    main(given.topology, given.features, given.width)
