"""How well attribution stands for ablation on the 25 prompts that come with saejax (docs/measurements/steering.md).

    python benchmarks/attribution_ablation.py runs/demo [--prompts=N] [--json=FILE]

Every pair of token and feature that is active is set to 0 by itself, a few hundred passes a prompt through the layers above the
SAE. Correlations are over the pairs of all prompts, and per prompt.
"""

import argparse
import json

import numpy as np

import saejax
from saejax import lm
from saejax.base.logs import Progress
from saejax.features.effects.attribution import ablate, agreement, attribute
from saejax.features.search.sets import choices


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=len(choices()))
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    sae = saejax.load(given.run)
    model = lm.load(sae.cfg.model)
    founds = []
    with Progress("prompts", given.prompts, unit="prompt") as bar:
        for one in choices()[:given.prompts]:
            found = attribute(model, sae, one["prompt"], one["token"], one["against"])
            founds.append(ablate(model, sae, found, progress=False))
            bar.advance(1)
    said, each = agreement(founds), [agreement([found]) for found in founds]
    print(f"{said['prompts']} prompts, {said['pairs']:,} pairs; right token preferred on {sum(f.difference > 0 for f in founds)}")
    for name in ("attribution", "activation"):
        print(f"{name:<12} correlation with ablation {said[name]:.3f} over all pairs, median of prompts "
              f"{np.median([e[name] for e in each]):.3f}")
    print(f"of a prompt's 10 pairs of greatest ablation: {said['top_by_attribution']:.1f} among the 10 of greatest attribution, "
          f"{said['top_by_activation']:.1f} among the 10 of highest activation")
    if given.json:
        with open(given.json, "w") as f:
            json.dump({**said, "each": each}, f, indent=1)


if __name__ == "__main__":
    main()
