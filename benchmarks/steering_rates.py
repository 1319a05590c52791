"""Does steering a feature make the model say what the feature is about? Against random features and random directions.

    saejax features runs/demo
    python benchmarks/steering_rates.py runs/demo [--features=10] [--strengths=-5,-2,2,5,10] [--tokens=32] [--json=FILE]

Chosen before looking, by this rule alone: of the features whose density in the index is between 1e-4 and 1e-2 and whose top
token has at least half of their total activation, the first 10 of a permutation by numpy's default_rng(0). Target of a feature:
the tokens that it fires on (`token_ids` of the index, up to 10, special ones left out). Rate of a continuation: the probability
that the model gives to the target, on average over its tokens. Expected: higher than unsteered at positive strengths, lower at
negative ones; ties do not count. Continuations of 8 prompts, sampled at temperature 1; strengths in multiples of the feature's
maximum, every token steered.

Controls, on the same targets: another feature of the same draw (11th, 12th, ...) at the same multiples of its own maximum, and a
random direction as long as the feature's change where it is not active.
"""

import argparse
import json

import jax
import numpy as np

import saejax
from saejax import lm
from saejax.base.logs import Progress
from saejax.features.effects import steering
from saejax.features.effects.prompting import encoded
from saejax.features.effects.steering import Change
from saejax.features.index.reader import FeatureIndex
from saejax.lm import generate

PROMPTS = ("I think that", "The story begins when", "Yesterday we went to", "It is important to", "In the middle of the",
           "She said that", "There are many", "The first thing to know about")
DENSITY, SHARE = (1e-4, 1e-2), 0.5


def drawn(index: FeatureIndex) -> np.ndarray:
    """All features that the rule allows, in the order of the draw."""
    density, shares = index.column("density"), index.lists("token_shares")
    fits = np.array([DENSITY[0] <= d <= DENSITY[1] and max(s, default=0) >= SHARE for d, s in zip(density, shares, strict=True)])
    return np.random.default_rng(0).permutation(np.flatnonzero(fits))


def change(kind: str, feature: int, other: int, strength: float, largest: np.ndarray, sae, rng) -> Change:
    if kind == "feature":
        return steering.clamped(feature, strength, float(largest[feature]))
    if kind == "other feature":
        return steering.clamped(other, strength, float(largest[other]))
    direction = rng.standard_normal(sae.cfg.spec.width_out)
    length = abs(strength) * largest[feature] * np.linalg.norm(np.asarray(sae.params.W_dec[feature]))
    return Change("direction", vector=(direction * length / np.linalg.norm(direction)).astype(np.float32))


@jax.jit
def masses(model, tokens_BT, taps, target_BV):
    """[B, T] probability of the target as the next token."""
    return (jax.nn.softmax(model(tokens_BT, taps=taps()).astype("float32")) * target_BV[:, None]).sum(-1)


def rates(model, sae, changes: list[Change], targets: list[list[int]], prompt: str, tokens: int, seed: int) -> np.ndarray:
    """[changes] mean probability of each change's target over its own continuation."""
    prompt_T = encoded(model, prompt)
    at, after = steering.places(model, prompt_T)
    taps = steering.plan(model, sae, changes, np.tile(at, (len(changes), 1)), after=after)
    new = generate(model.model, [prompt_T.tolist()] * len(changes), tokens, sampling=lm.Sampling(1.0), seed=seed, taps=taps)
    target_BV = np.zeros((len(changes), model.cfg.vocab_size), np.float32)
    for row, ids in zip(target_BV, targets, strict=True):
        row[ids] = 1
    whole = np.array([[*prompt_T, *row] for row in new], np.int32)
    room = -whole.shape[1] % 16  # few shapes, few compilations; what follows a token does not change it
    found = masses(model.model, np.pad(whole, ((0, 0), (0, room))), taps, target_BV)
    return np.asarray(found)[:, len(prompt_T) - 1:whole.shape[1] - 1].mean(1)


def measure(model, sae, index, given) -> dict:
    order, largest, tokens_of = drawn(index), index.column("max"), index.lists("token_ids")
    strengths, n, rng = [float(s) for s in given.strengths.split(",")], given.features, np.random.default_rng(1)
    if len(order) < 2 * n:
        raise SystemExit(f"{len(order)} features fit the rule, {2 * n} are needed; index more tokens")
    kinds = ("feature", "other feature", "random direction")
    found = {kind: {s: [] for s in strengths} for kind in kinds}
    with Progress("steering", n * len(PROMPTS[:given.prompts]), unit="text") as bar:
        for place, feature in enumerate(order[:n]):
            target = [t for t in tokens_of[feature] if t not in model.tokenizer.special_ids][:10]
            keys = [(kind, s) for kind in kinds for s in strengths]
            changes = [Change(), *(change(kind, feature, order[n + place], s, largest, sae, rng) for kind, s in keys)]
            for number, prompt in enumerate(PROMPTS[:given.prompts]):
                rate = rates(model, sae, changes, [target] * len(changes), prompt, given.tokens, number)
                for (kind, s), value in zip(keys, rate[1:], strict=True):
                    found[kind][s].append((float(rate[0]), float(value)))
                bar.advance(1)
    return {"features": [int(f) for f in order[:n]], "candidates": len(order), "rates": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--strengths", default="-5,-2,2,5,10")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    sae = saejax.load(given.run)
    model = lm.load(sae.cfg.model)
    said = measure(model, sae, FeatureIndex.open(f"{given.run}/features", sae=sae, lm_=model), given)
    print(f"features {said['features']} of {said['candidates']} that fit the rule")
    print(f"{'steered':<18}{'strength':>9}{'as expected':>13}{'rate unsteered':>16}{'steered':>10}")
    for kind, by_strength in said["rates"].items():
        for strength, pairs in by_strength.items():
            before, after = np.array(pairs).T
            moved = (after - before) * np.sign(strength) > 0
            print(f"{kind:<18}{strength:>9g}{100 * moved.mean():>11.0f} %{before.mean():>16.4f}{after.mean():>10.4f}")
    if given.json:
        with open(given.json, "w") as f:
            json.dump(said, f, indent=1)


if __name__ == "__main__":
    main()
