"""The training step at pod scale, compiled for TPU slices that are not there: python benchmarks/tpu_compile.py [NAME ...]

Needs the TPU compiler (pip install -e '.[tpu-plan]') and no TPU; a case takes up to three minutes and 2 GB on one core. What
is printed is the compiler's word and this project's model, not a measurement.
"""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable

from saejax.config import Config, default_config, resolve
from saejax.config.recipes import WITH_K
from saejax.plan import make_plan

SIX, LAZY = {"optimizer": "second_bf16"}, {"optimizer": "lazy_bf16"}
CASES = {  # name: recipe, features, width, batch, topology, keys of config.train
    "topk-34M-v5p": ("topk", 2**25, 4096, 16_384, "v5p:4x8x8"),
    "relu-34M-v5p": ("relu", 2**25, 4096, 16_384, "v5p:4x8x8"),
    "topk-34M-v5e": ("topk", 2**25, 4096, 16_384, "v5e:16x16"),
    "topk-34M-v5e-small-batch": ("topk", 2**25, 4096, 4096, "v5e:16x16"),
    "topk-4M-v5e": ("topk", 2**22, 4096, 16_384, "v5e:8x8"),
    "relu-4M-v5e": ("relu", 2**22, 4096, 4096, "v5e:8x8"),
    "topk-1M-v5e": ("topk", 2**20, 2304, 4096, "v5e:4x4"),
    "relu-1M-v5e": ("relu", 2**20, 2304, 4096, "v5e:4x4"),
    "topk-34M-v5e-6-bytes": ("topk", 2**25, 4096, 4096, "v5e:16x16", SIX),
    "relu-34M-v5e-6-bytes": ("relu", 2**25, 4096, 4096, "v5e:16x16", SIX),
    "relu-34M-v5e-6-bytes-large-batch": ("relu", 2**25, 4096, 16_384, "v5e:16x16", SIX),
    "topk-34M-v5e-lazy": ("topk", 2**25, 4096, 4096, "v5e:16x16", LAZY),
    "topk-1M-v5e-6-bytes": ("topk", 2**20, 2304, 4096, "v5e:4x4", SIX),
    "topk-1M-v5e-lazy": ("topk", 2**20, 2304, 4096, "v5e:4x4", LAZY),
}


def config_of(recipe: str, features: int, width: int, batch: int, *changes: dict) -> Config:
    """What a case trains, its dictionary split over all chips."""
    c = default_config(recipe)
    c.train.update(*changes)
    c.name, c.sae.d_in, c.sae.d_sae, c.train.batch, c.train.compute_dtype = recipe, width, features, batch, "bfloat16"
    c.mesh.data, c.mesh.dict = 1, -1
    if c.sae.kind in WITH_K:
        c.sae.k, c.sae.aux_k = 64, 0
    return resolve(c)


def one(name: str) -> None:
    """Prints the plan of a case with what the compiler says, as one line of JSON."""
    recipe, features, width, batch, topology, *changes = CASES[name]
    plan = make_plan(config_of(recipe, features, width, batch, *changes), topology, compiled=True)
    print(json.dumps(plan | {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def row(name: str, plan: dict) -> str:
    """A line of the table."""
    found, at = plan["compiled"], plan["topology"]
    sae, planned = plan["sae"], plan["memory"]["total"] / 1e9
    how = f"{at['path']}, {sae['state_bytes_per_parameter']:.2g} B{', lazy' if name.endswith('lazy') else ''}"
    head = f"| {sae['kind']} {sae['d_sae']:,} x {sae['d_in']:,} | {sae['batch']:,} | {at['name']} | {how} "
    tail = f"| {found['seconds_to_compile']:.0f} | {plan['peak_rss'] / 1e9:.1f} |"
    if "refused" in found:
        sizes = re.findall(r"\(([\d.]+G)\)", found["refused"])
        return f"{head}| refused: {sizes[0]}, there are {sizes[1]} | {planned:.1f} | | | {tail}"
    state, estimate = found["memory"]["arguments"], found["step_seconds"]
    moved = sum(size for axis, size in found["collective_bytes"].items() if "branches" not in axis) / 1e9
    moved = "-" if "collectives_unknown" in found else f"{moved:.2f}"
    return (f"{head}| {state / 1e9:.1f} + {(found['peak_bytes'] - state) / 1e9:.1f} | {planned:.1f} "
            f"| {f'{estimate * 1e3:.0f}' if estimate else '-'} | {plan['time']['step_seconds'] * 1e3:.0f} "
            f"({plan['time']['step_seconds_at_peak'] * 1e3:.0f}) "
            f"| {moved} / {sum(plan['collective_bytes'].values()) / 1e9:.2f} {tail}")


def main(names: list[str]) -> None:
    print("| SAE | batch | topology | path | GB per chip, compiler: state + temporaries | GB per chip, plan "
          "| ms per step, compiler | ms per step, plan (at peak) | GB moved, compiler / plan | s to compile | GB to compile |")
    print("|" + "---|" * 11)
    each_in_its_process(__file__, names or CASES, row)


def each_in_its_process(script: str, names: Iterable[str], row: Callable[[str, dict], str]) -> None:
    """Prints a line of each name: `row` of the JSON that `script --one NAME` prints last."""
    for name in names:
        done = subprocess.run([sys.executable, script, "--one", name], capture_output=True, text=True,
                              env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]} |", flush=True)
        else:
            print(row(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main(sys.argv[1:])
