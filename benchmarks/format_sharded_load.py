"""Time and peak memory of loading a large SAELens file onto 8 simulated devices, each reading its own rows.

    python benchmarks/format_sharded_load.py DIR --features=1048576 --width=2304     # 19.3 GB of disk and of memory
    python benchmarks/format_sharded_load.py DIR --features=65536 --width=2304       # 1.2 GB

Writes the file (kept, used again) and loads it in a process of its own. Peak memory is the most that process ever held resident,
without what it held before the load (python, jax and its compiled programs).
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPES = {"W_enc": ("width", "features"), "b_enc": ("features",), "W_dec": ("features", "width"), "b_dec": ("width",)}


def write(directory: Path, sizes: dict) -> Path:
    path = directory / "sae_weights.safetensors"
    if path.is_file():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    table, at = {}, 0
    for name, axes in SHAPES.items():
        shape = [sizes[axis] for axis in axes]
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * int(np.prod(shape))]}
        at = table[name]["data_offsets"][1]
    text = json.dumps(table).encode()
    rng = np.random.default_rng(0)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        left = at // 4
        while left:
            n = min(left, 1 << 22)
            f.write(rng.standard_normal(n, np.float32).tobytes())
            left -= n
    cfg = {"architecture": "standard", "d_in": sizes["width"], "d_sae": sizes["features"], "dtype": "float32", "device": "cpu",
           "apply_b_dec_to_input": True, "normalize_activations": "none", "metadata": {"sae_lens_version": "6.54.12"}}
    (directory / "cfg.json").write_text(json.dumps(cfg))
    return path


def load(directory: Path) -> None:
    import saejax
    from saejax.base import sharding
    from saejax.base.records import MeshOptions

    mesh = sharding.make_mesh(MeshOptions(1, 8))
    before = peak()
    started = time.monotonic()
    sae = saejax.load(directory, mesh=mesh)
    seconds = time.monotonic() - started
    size = (directory / "sae_weights.safetensors").stat().st_size
    pieces = {s.data.shape for s in sae.params.W_dec.addressable_shards}
    print(f"{sae.cfg.d_sae} x {sae.cfg.d_in}: file {size / 1e9:.2f} GB, 8 devices with W_dec {pieces}, {seconds:.1f} s, "
          f"peak memory {(peak() - before) / 1e9:.2f} GB = {(peak() - before) / size:.3f} of the file")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--features", type=int, default=65536)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--load", action="store_true", help="(for the inner process)")
    options = parser.parse_args()
    if options.load:
        load(options.directory)
    else:
        write(options.directory, {"features": options.features, "width": options.width})
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
        command = [sys.executable, __file__, str(options.directory), "--load"]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
