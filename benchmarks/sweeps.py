"""1, 2 and 4 SAEs over one stream, side by side: `python benchmarks/sweeps.py`.

Rows are random, written once to a temporary store. Rates are rows per second of all SAEs, from the metric lines behind the first
(compilation is not counted); times are of the whole call. The numbers of SAEs in turn, medians of `--rounds`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from saejax.base.logs import read_metrics
from saejax.config import Config, default_config, resolve
from saejax.data.manifest import StoreSpec
from saejax.data.store import Store
from saejax.data.writer import StoreWriter
from saejax.scaling.sweep import members
from saejax.train.loop import train_all

CONTEXT, SHARD_CONTEXTS, RATES = 128, 64, ("1e-3", "8e-4", "6e-4", "4e-4")


def make_store(path: Path, width: int, shards: int) -> Store:
    """Random rows at one hookpoint."""
    spec = StoreSpec(model="random", model_digest="0" * 64, lm_dtype="float32", tokenizer_digest="1" * 64,
                     text={"context": CONTEXT, "source": ["random"]}, hookpoints=(("blocks.0.hook_resid_post", width),),
                     context=CONTEXT, shard_contexts=SHARD_CONTEXTS, chunk_rows=256,
                     target_contexts=shards * SHARD_CONTEXTS)
    rng, writer = np.random.default_rng(0), StoreWriter(path, spec)
    for shard in writer.missing_shards():
        x = rng.standard_normal((SHARD_CONTEXTS * CONTEXT, width), np.float32).astype(ml_dtypes.bfloat16)
        tokens = rng.integers(0, 99, (SHARD_CONTEXTS, CONTEXT))
        writer.write_shard(shard, {"blocks.0.hook_resid_post": x}, tokens, np.ones((SHARD_CONTEXTS, CONTEXT), np.uint8))
    return writer.finalize(shards * SHARD_CONTEXTS)


def make_config(kind: str, run_dir: Path, n: int, a: argparse.Namespace) -> Config:
    """A sweep of n learning rates."""
    c = default_config(kind)
    c.lm.model, c.run_dir = "random", str(run_dir)
    c.harvest.hookpoints, c.sae.hookpoint = ("blocks.0.hook_resid_post",), "blocks.0.hook_resid_post"
    c.sae.d_sae, c.train.batch, c.train.tokens, c.sae.aux_k = a.d_sae, a.batch, a.batch * a.steps, 0
    c.log.progress, c.log.tensorboard, c.log.every_steps, c.checkpoint.every_tokens = False, False, 2, a.batch * a.steps
    c.sweep.product = (f"train.lr={','.join(RATES[:n])}",)
    return resolve(c)


def rate(config: Config) -> float:
    """Rows per second of one SAE, the median of its metric lines."""
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return statistics.median(line["tokens_per_second"] for line in lines[1:] if "tokens_per_second" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 576), ("d_sae", 4608), ("batch", 1024), ("steps", 12), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", default="relu,topk", help="recipes, with commas between")
    parser.add_argument("--saes", default="1,2,4", help="how many SAEs, at most 4, with commas between")
    a = parser.parse_args()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, width {a.width}, {a.d_sae} features, batch {a.batch}")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", a.width, 4)
        for kind in a.kinds.split(","):
            found: dict[int, list[tuple[float, float]]] = {}
            for turn in range(a.rounds):
                for n in map(int, a.saes.split(",")):
                    configs = members(make_config(kind, Path(folder) / f"{kind}-{turn}-{n}", n, a))
                    began = time.monotonic()
                    train_all(configs, store)
                    found.setdefault(n, []).append((n * rate(configs[0]), time.monotonic() - began))
            for n, results in found.items():
                rows, seconds = (statistics.median(column) for column in zip(*results, strict=True))
                print(f"{kind:<10} {n} SAEs {rows:>9,.0f} rows/s in all, {seconds:6.1f} s with compilation and checkpoints")


if __name__ == "__main__":
    main()
