"""`saejax attribute`: which features of a prompt speak for its next token."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import IndexOptions, Job, Json, SubjectOptions, count, path, places, value

_SHOWN = 15


@dataclass(frozen=True)
class Options(Json, IndexOptions, SubjectOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE", most=1)
    prompt: str | None = value("what the token follows", "TEXT", required=True)
    token: str | None = value("a next token; a leading blank often matters", "TOKEN", required=True)
    against: str | None = value("another one (default: the mean logit)", "TOKEN")
    pairs: int | None = value("ablate N of the active pairs of token and feature, drawn at random (default: all)", "N", count)
    html: Path | None = value("write a page, too", "FILE", path)


def run(options: Options) -> int:
    """Prints the pairs of token and feature that speak most for a next token, with what ablating them does."""
    import numpy as np

    from saejax.base.storage import is_writer
    from saejax.base.text import visible
    from saejax.cli.subjects import one_subject
    from saejax.features.effects.attribution import ablate, agreement, attribute
    from saejax.pages import effects
    from saejax.pages.dashboard import beside
    subject = one_subject(options, mesh=None)
    lm_, sae = subject.lm, subject.sae
    index = subject.index_if_any()
    found = attribute(lm_, sae, options.prompt, options.token, options.against)
    total, wanted = len(found.position_P), options.pairs or math.inf
    chosen = None if wanted >= total else np.sort(np.random.default_rng(0).choice(total, wanted, replace=False))
    found = ablate(lm_, sae, found, chosen)
    if not is_writer():
        return 0
    labels = {} if index is None else {int(f): index.fires_on(int(f)) for f in np.unique(found.feature_P[found.best(100)])}
    if options.html:
        effects.write_attribution(options.html, lm_, found, title=f"{subject.name}: {options.prompt}",
                                  labels=labels, dashboard=None if index is None else beside(index))
    said, text = agreement([found]), [*map(lm_.tokenizer.token, found.tokens_T)]
    best = [{"position": int(found.position_P[p]), "token": text[found.position_P[p]], "feature": int(found.feature_P[p]),
             "activation": float(found.activation_P[p]), "attribution": float(found.attribution_P[p]),
             "ablation": float(found.ablation_P[p]) if np.isfinite(found.ablation_P[p]) else None}
            for p in found.best(total if options.json else _SHOWN)]
    if options.json:
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


JOB = Job(
    "attribute", "act", "which features of a prompt speak for its next token, by attribution and by ablation", """
    Reads a run, or any files that saejax.load reads, and the language model; prints attribution and ablation of features at
    tokens for logit(token) - logit(against), and how the two correlate; writes nothing but the page of --html.
    """, "saejax attribute runs/demo --prompt='The capital of France is' --token=' Paris' --against=' Rome'", Options, run)
