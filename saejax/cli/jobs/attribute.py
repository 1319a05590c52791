"""`saejax attribute`: which features of a prompt speak for its next token."""

import json
import math
from pathlib import Path

import numpy as np

from saejax.base.errors import ConfigError
from saejax.base.storage import is_writer
from saejax.base.text import visible
from saejax.cli.arguments import Arguments
from saejax.cli.subjects import one_subject
from saejax.features.effects.attribution import ablate, agreement, attribute
from saejax.pages import effects

_SHOWN = 15


def start(arguments: Arguments) -> int:
    """Prints the pairs of token and feature that speak most for a next token, with what ablating them does."""
    if not arguments.option("prompt") or not arguments.option("token"):
        raise ConfigError("saejax attribute: give --prompt=TEXT and --token=TOKEN, and --against=TOKEN to compare it with")
    subject, prompt = one_subject(arguments, "attribute", mesh=None), arguments.option("prompt")
    lm_, sae = subject.lm, subject.sae
    index = subject.index_if_any()
    found = attribute(lm_, sae, prompt, arguments.option("token"), arguments.option("against"))
    total, wanted = len(found.position_P), arguments.option("pairs") or math.inf
    chosen = None if wanted >= total else np.sort(np.random.default_rng(0).choice(total, wanted, replace=False))
    found = ablate(lm_, sae, found, chosen)
    if not is_writer():
        return 0
    labels = {} if index is None else {int(f): index.fires_on(int(f)) for f in np.unique(found.feature_P[found.best(100)])}
    if arguments.option("html"):
        effects.write_attribution(Path(arguments.option("html")), lm_, found, title=f"{subject.name}: {prompt}",
                                  labels=labels)
    said, text = agreement([found]), lm_.tokenizer.token_strings(found.tokens_T)
    best = [{"position": int(found.position_P[p]), "token": text[found.position_P[p]], "feature": int(found.feature_P[p]),
             "activation": float(found.activation_P[p]), "attribution": float(found.attribution_P[p]),
             "ablation": float(found.ablation_P[p]) if np.isfinite(found.ablation_P[p]) else None}
            for p in found.best(total if arguments.json else _SHOWN)]
    if arguments.json:
        print(json.dumps({"difference": found.difference, **said, "found": best}))
        return 0
    print(f"logit difference {found.difference:.4g}; {total:,} active pairs of token and feature, {said['pairs']:,} ablated")
    for one in best:
        ablation = "" if one["ablation"] is None else f"{one['ablation']:.4g}"
        print(f"{one['feature']:>8}  attribution {one['attribution']:>10.4g}  ablation {ablation:>10}  activation "
              f"{one['activation']:>9.4g}  token {one['position']} {visible(one['token'])}  {labels.get(one['feature'], '')}")
    print(f"correlation with the ablation: attribution {_shown(said['attribution'])} (Templeton et al. 2024: 0.81), activation "
          f"{_shown(said['activation'])} (0.12)")
    return 0


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
