"""The products of a training step as they go to a compiler: python benchmarks/dots.py

Lowers the step of every kind for CUDA and TPU on whatever machine this is, and counts its dots by the dtypes of operands and
result. Nothing is compiled or run.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp

from saejax.base import sharding
from saejax.config import default_config, resolve
from saejax.config.recipes import WITH_K
from saejax.sae import SAESpec
from saejax.train.state import abstract_state
from saejax.train.step import make_step

KINDS = ("relu", "topk", "gated", "jumprelu", "jumprelu_tanh", "batchtopk", "matryoshka", "matryoshka_jumprelu")
D, F, B = 64, 1024, 256
OPERANDS = re.compile(r"\(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>")


def lowered(kind: str, path: str, dtype: str, platform: str) -> str:
    """The step of a recipe, AuxK included, on a path of `train.path` (`lazy`: row-lazy Adam)."""
    c = default_config(kind)
    c.sae.d_sae, c.train.batch, c.train.tokens, c.train.compute_dtype = F, B, 100 * B, dtype
    if path == "lazy":
        c.train.optimizer = "lazy"
    else:
        c.train.path = path
    config = resolve(c)
    spec, mesh = SAESpec.from_options(config.sae, {config.sae.hookpoint: D}, dtype), sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct((B, D), jnp.bfloat16, sharding=sharding.sharding(mesh, "rows_at_rest", None))
        return make_step(config, spec, 100).trace(abstract_state(config, spec, mesh), rows).lower(
            lowering_platforms=(platform,)).as_text()


def counted(text: str) -> Counter:
    """{"16 matrix products bf16 x bf16 -> f32, default": how many}; a product with a vector is none of matrices."""
    found: Counter = Counter()
    for line in text.splitlines():
        if "dot_general" in line:
            a, b, out = (shape.split("x") for shape in OPERANDS.search(line).groups())
            precision = re.search(r"precision = \[(\w+)", line)
            what = "matrices" if len(out) == 3 else "with a vector"
            found[f"{what} {a[-1]} x {b[-1]} -> {out[-1]} {precision[1].lower() if precision else 'default'}"] += 1
    return found


def main() -> None:
    print("| kind, path | compute_dtype | CUDA | TPU |\n|---|---|---|---|")
    for kind in KINDS:
        with_k = resolve(default_config(kind)).sae.kind in WITH_K
        for path in ("dense", "sparse", "lazy") if with_k else ("dense",):
            for dtype in ("bfloat16", "float32"):
                cells = [", ".join(f"{n} {what}" for what, n in sorted(counted(lowered(kind, path, dtype, platform)).items()))
                         for platform in ("cuda", "tpu")]
                name = {"lazy": "lazy rows"}.get(path, path)
                on_tpu = "the same" if cells[1] == cells[0] else cells[1]
                print(f"| {kind}, {name} | {dtype} | {cells[0]} | {on_tpu} |", flush=True)


if __name__ == "__main__":
    main()
