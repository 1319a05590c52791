"""Features that stay silent over the tokens of a store, of any number of trained SAEs.

    python benchmarks/dead_features.py runs/quality_* [--store runs/quality/store] [--tokens 1048576]

Encodes the first kept rows of the store with each run's newest checkpoint and prints a Markdown table: the features
that fired nowhere, those that fired less than once in 100,000 tokens, and what the run's last evaluation on
held-out text says. A run that was measured before is not measured again (dead.json in its directory).
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

import saejax
from saejax.base.logs import Progress
from saejax.base.records import RunPaths
from saejax.config import read_config
from saejax.data.store import Store
from saejax.sae.inference import SAE
from saejax.train.checkpoint import steps_in

BATCH = 2048
RARE = 1e-5


def fired(sae, store: Store, hookpoint: str, tokens: int) -> tuple[np.ndarray, int]:
    """How often each feature fired, counted up to where it is no longer rare, and over how many kept rows.

    Where features do not compete (all kinds but topk) only those that are rare so far are encoded after the first rows.
    """
    counts, seen, step = np.zeros(sae.cfg.d_sae, np.int64), 0, 8 * BATCH
    features, open_features = np.arange(sae.cfg.d_sae), sae
    with Progress("encode", tokens) as bar:
        for start in range(0, store.rows, step):
            stop = min(start + step, store.rows)
            x = store.read(hookpoint, start, stop)[store.keep(start, stop)]
            for first in range(0, len(x), BATCH):
                counts[features] += np.asarray((open_features.encode(x[first:first + BATCH]) > 0).sum(0))
            seen += len(x)
            bar.advance(len(x))
            if seen >= tokens:
                break
            rare = np.flatnonzero(counts < RARE * tokens)
            if sae.cfg.kind != "topk" and 0 < len(rare) <= len(features) // 2:
                features, open_features = rare, part(sae, rare)
    return counts, seen


def part(sae, features: np.ndarray):
    """An SAE of some of the features of another."""
    own = sae.params
    rows = {"W_enc": own.W_enc, "b_enc": own.b_enc, "W_dec": own.W_dec}
    params = own.replace(**{name: value[features] for name, value in rows.items()},
                         per_feature={name: value[features] for name, value in own.per_feature.items()})
    return SAE(params, dataclasses.replace(sae.cfg, d_sae=len(features)))


def measure(run: Path, store: Store, tokens: int) -> dict:
    paths = RunPaths(run)
    file = run / "dead.json"
    key = {"step": max(steps_in(paths.checkpoints)), "store": store.digest, "tokens": tokens}
    if file.is_file() and (found := json.loads(file.read_text()))["key"] == key:
        return found["result"]
    sae = saejax.load(run)
    counts, seen = fired(sae, store, read_config(paths.config).sae.hookpoint, tokens)
    result = {"features": len(counts), "tokens": seen, "dead": int((counts == 0).sum()),
              "rare": int((counts < RARE * tokens).sum())}
    file.write_text(json.dumps({"key": key, "result": result}))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--store", type=Path, help="default: the one of each run's config")
    parser.add_argument("--tokens", type=int, default=2**20)
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        config = read_config(RunPaths(run).config)
        result = measure(run, Store.open(args.store or config.harvest.store), args.tokens)
        evaluation = json.loads(RunPaths(run).evaluation.read_text())["entries"][-1]["result"]
        rows.append((run.name, config.train.tokens, result, evaluation))
    columns = ("run", "features", "trained on", "dead", "less than 1 in 100,000", "L0", "EV", "EV without outliers",
               "CE recovered")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for name, trained, r, e in rows:
        print(f"| {name} | {r['features']:,} | {trained:,} | {r['dead'] / r['features']:.2%} ({r['dead']}) | "
              f"{r['rare'] / r['features']:.2%} | {e['l0_mean']:.1f} | {e['explained_variance']:.4f} | "
              f"{e['explained_variance_no_outliers']:.4f} | {e['ce_recovered']:.4f} |")
    print(f"\nDead: silent over {rows[0][2]['tokens']:,} tokens of the store.")


if __name__ == "__main__":
    main()
