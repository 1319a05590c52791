"""Two wide dictionaries whose likeness is known: python benchmarks/compare_dictionaries.py RUN

Of the run's dictionary A it writes a copy B in another order to --copy, with known changes, compares the two by `saejax compare`,
and prints seconds, peak memory and what was found beside what is known. Of A's features

    kept      are in B, turned a little (decoder rows to a cosine of 0.95, encoder rows of 0.99)
    swapped   are kept, but each reads what the next one reads: shared by direction with one feature, by firing with another
    split     are two in B, decoder rows at 0.85 to theirs, encoder rows at 0.97
    missing   are not in B, whose places the second halves of split ones and features of random direction take
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq

from saejax import load
from saejax.formats import saelens
from saejax.sae.inference import SAE

SWAPPED, SPLIT, NEW = 0.1, 0.1, 0.1  # of A's features; missing: those in whose place halves and new ones stand


def turned(rows_ND: np.ndarray, cosine: float, rng) -> np.ndarray:
    """Rows of the same lengths at this cosine to what they were."""
    length_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    unit_ND = rows_ND / length_N1
    away_ND = rng.standard_normal(rows_ND.shape).astype(np.float32)
    away_ND -= (away_ND * unit_ND).sum(1, keepdims=True) * unit_ND
    away_ND /= np.linalg.norm(away_ND, axis=1, keepdims=True)
    return length_N1 * (cosine * unit_ND + np.sqrt(1 - cosine**2) * away_ND)


def changed(sae: SAE, rng) -> tuple[SAE, dict[str, np.ndarray]]:
    """B, and of every feature of B: `written` and `read`, the features of A that its decoder and encoder rows come from, -1 for
    none; `parts` of A: which are kept (0), swapped (1), split (2), missing (3).
    """
    F = sae.cfg.d_sae
    W_enc, W_dec, b_enc = (np.asarray(x) for x in (sae.params.W_enc, sae.params.W_dec, sae.params.b_enc))
    order, parts = rng.permutation(F), np.zeros(F, int)
    n_swapped, n_split, n_new = (round(F * share) for share in (SWAPPED, SPLIT, NEW))
    ends = np.cumsum([n_swapped, n_split, n_split + n_new])
    swapped, split, missing = np.split(order[:ends[-1]], ends[:-1])
    for number, which in enumerate((swapped, split, missing), 1):
        parts[which] = number
    written = np.concatenate([order[ends[-1]:], swapped, split, split, np.full(n_new, -1)])
    read = np.concatenate([order[ends[-1]:], np.roll(swapped, 1), split, split, np.full(n_new, -1)])
    dec = np.where(np.isin(written, split)[:, None], turned(W_dec[written], 0.85, rng), turned(W_dec[written], 0.95, rng))
    enc = np.where(np.isin(read, split)[:, None], turned(W_enc[read], 0.97, rng), turned(W_enc[read], 0.99, rng))
    dec[-n_new:], enc[-n_new:] = turned(W_dec[missing[:n_new]], 0, rng), turned(W_enc[missing[:n_new]], 0, rng)
    places = rng.permutation(F)
    bias = np.where(read < 0, 0, b_enc[read])
    W_enc, b_enc, W_dec = (jnp.asarray(x[places]) for x in (enc, bias, dec))
    params = sae.params.replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
    return SAE(params, sae.cfg), {"written": written[places], "read": read[places], "parts": parts}


def main(run: str, copy: Path, rows: int) -> None:
    """Makes the copy, compares, checks."""
    sae = load(run)
    other, known = changed(sae, np.random.default_rng(0))
    saelens.write(copy, other)
    command = ["compare", run, str(copy), f"--rows={rows}", f"--out={copy / 'matches.parquet'}", "--json"]
    print("saejax", *command)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "saejax", *command], stdout=subprocess.PIPE, check=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    said = json.loads(done.stdout)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{said['features_A']:,} against {said['features_B']:,} features, width {sae.cfg.d_in}: "
          f"{time.monotonic() - started:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time, peak "
          f"{used.ru_maxrss / 2**20:.1f} GiB")
    report(said, known, pq.read_table(copy / "matches.parquet").to_pandas())


def report(said: dict, known: dict[str, np.ndarray], table) -> None:
    """Shares found beside known ones, then of every sort of feature the share that has its right match."""
    parts, written, read = known["parts"], known["written"], known["read"]
    F = len(parts)
    expected = {"shared_A": (parts < 3).mean(), "only_A": (parts == 3).mean(), "only_B": (written < 0).mean(),
                "split_A": (parts == 2).mean()}
    print("share          known   found")
    for name, share in expected.items():
        print(f"{name:14s} {share:.4f}  {said[name]:.4f}")
    a = table[table.dictionary == "A"].sort_values("feature")
    by_direction = written[a.match.to_numpy()] == np.arange(F)
    heard = a.firing_match.to_numpy() >= 0
    by_firing = read[np.maximum(a.firing_match.to_numpy(), 0)] == np.arange(F)
    print(f"has a match by firing: {heard.mean():.4f} of A's features")
    print("of A's features   right by decoder row   right by firing, of those with a match   mean correlation")
    for number, name in enumerate(("kept", "swapped", "split")):
        here = parts == number
        print(f"{name:17s} {by_direction[here].mean():.4f}                 {by_firing[here & heard].mean():.4f} of "
              f"{(here & heard).sum():,}                       {a.correlation.to_numpy()[here & heard].mean():.3f}")
    print("by firing:", json.dumps({key: round(value, 4) for key, value in said["by_firing"].items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--copy", type=Path, default=Path("runs/compare_copy"))
    parser.add_argument("--rows", type=int, default=65_536)
    given = parser.parse_args()
    main(given.run, given.copy, given.rows)
