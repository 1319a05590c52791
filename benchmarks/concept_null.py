"""How often `search sets` finds something where there is nothing, and how often it finds a planted feature.

    python benchmarks/concept_null.py [runs/demo] [--trials=1000] [--planted=200] [--features=4096] [--seed=0] [--json=FILE]

Random sets: pairs of prompts that are drawn alike, so that whatever is found is by chance. Each feature has a rate of its own,
log uniform from 0.2 % to 60 %, and half of its firing on a prompt is that of the prompt's partner, as matched prompts share most
of their words. Planted: one feature more, on in 20 of 24 positives and 1 of 24 negatives, which must be among the ten found.
With a run, random sets are also drawn from 32-token pieces of the text of its index, through its own model and SAE.
"""

import argparse
import json

import numpy as np

from saejax.base.logs import Progress
from saejax.features.search.sets import told_apart

PAIRS, ON, OFF = 24, 20, 1  # of a set; positives and negatives on which the planted feature is on
PIECES, LENGTH = 768, 32    # of the text of an index


def random_set(rng: np.random.Generator, features: int, pairs: int = PAIRS) -> tuple[np.ndarray, np.ndarray]:
    """Activations [pairs, F] of positives and negatives that do not differ but by chance."""
    rate_F = np.exp(rng.uniform(np.log(0.002), np.log(0.6), features))
    shared_PF, alone_2PF = rng.random((pairs, features)) < rate_F, rng.random((2, pairs, features)) < rate_F
    on_2PF = np.where(rng.random((2, pairs, features)) < 0.5, shared_PF, alone_2PF)
    return tuple(np.where(on_2PF, rng.random((2, pairs, features)), 0))


def planted_set(rng: np.random.Generator, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The same with one feature more, the last, that tells most positives from most negatives."""
    sides = []
    for side_PF, on in zip(random_set(rng, features), (ON, OFF), strict=True):
        sides.append(np.concatenate([side_PF, (rng.permutation(PAIRS) < on)[:, None]], axis=1))
    return tuple(sides)


def random_trials(trials: int, features: int, seed: int, pairs: int = PAIRS) -> float:
    """Share of random sets on which something is found."""
    found = 0
    with Progress("random sets", trials, unit="set") as bar:
        for trial in range(trials):
            found += bool(told_apart(*random_set(np.random.default_rng([seed, 0, trial]), features, pairs), seed=trial).found)
            bar.advance(1)
    return found / trials


def planted_trials(trials: int, features: int, seed: int) -> float:
    """Share of planted features that are among the ten found."""
    found = 0
    for trial in range(trials):
        tested = told_apart(*planted_set(np.random.default_rng([seed, 1, trial]), features), seed=trial)
        found += any(one.feature == features for one in tested.found)
    return found / trials


def real_trials(run: str, trials: int, seed: int) -> float:
    """Share of random sets of pieces of the text of a run's index on which something is found."""
    import saejax
    from saejax.features.search.prompt import activations
    s, rng = saejax.open(run), np.random.default_rng([seed, 2])
    contexts, length = s.index.tokens_NT.shape
    rows, starts = rng.integers(0, contexts, PIECES), rng.integers(0, max(1, length - LENGTH), PIECES)
    peaks_QF = np.stack([activations(s.lm, s.sae, s.index.tokens_NT[row, start:start + LENGTH]).max(0)
                         for row, start in zip(rows, starts, strict=True)])
    found = 0
    for trial in range(trials):
        chosen = np.random.default_rng([seed, 3, trial]).permutation(PIECES)[:2 * PAIRS]
        found += bool(told_apart(peaks_QF[chosen[:PAIRS]], peaks_QF[chosen[PAIRS:]], seed=trial).found)
    return found / trials


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    said = {}
    for pairs in (PAIRS, 8):
        said[f"random_{pairs}"] = share = random_trials(given.trials, given.features, given.seed, pairs)
        print(f"{given.trials} random sets of {pairs} pairs: something found on {100 * share:.1f} %", flush=True)
    said["planted"] = planted_trials(given.planted, given.features, given.seed)
    print(f"{given.planted} planted features: {100 * said['planted']:.1f} % found", flush=True)
    if given.run:
        said["real"] = real_trials(given.run, given.trials, given.seed)
        print(f"{given.trials} random sets of the text of {given.run}: something found on {100 * said['real']:.1f} %")
    if given.json:
        with open(given.json, "w") as f:
            json.dump(said, f, indent=1)


if __name__ == "__main__":
    main()
