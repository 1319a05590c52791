"""`saejax attribute`: which features of a prompt speak for its next token."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax.cli.options import IndexOptions, Job, Json, SubjectOptions, ablated, path, places, value

_SHOWN, _TOP = 15, 50
_SAID = {"all": "", "random": ", drawn at random"}


@dataclass(frozen=True)
class Options(Json, IndexOptions, SubjectOptions):
    paths: tuple[str, ...] = places("SAE", "a run or other files of an SAE", most=1)
    prompt: str | None = value("what the token follows", "TEXT", required=True)
    token: str | None = value("a next token; a leading blank often matters", "TOKEN", required=True)
    against: str | None = value("another one (default: the mean logit)", "TOKEN")
    ablate: tuple[str, int] | None = value(
        "what is ablated: top:N: of features at tokens, and errors, the N of the largest attribution (default top:50); random:N: "
        "N features at tokens, for the correlation, beside those shown; all", "WHICH", ablated)
    html: Path | None = value("write a page, too", "FILE", path)


def run(options: Options) -> int:
    """Prints what speaks most for a next token, features and errors at tokens, and what ablating it does."""
    from saejax.base.storage import is_writer
    from saejax.base.text import visible
    from saejax.cli.subjects import one_subject
    from saejax.features.effects.attribution import agreement, attribute
    from saejax.pages import effects
    from saejax.pages.dashboard import beside
    subject = one_subject(options, mesh=None)
    index = subject.index_if_any()
    found = attribute(subject.lm, subject.sae, options.prompt, options.token, options.against)
    found, sample = _ablated(subject, found, options)
    if not is_writer():
        return 0
    said = None if sample is None else agreement([found], [sample])
    named = {found.part(p).feature for p in found.largest(100)} - {None}
    labels = {} if index is None else {feature: index.fires_on(feature) for feature in named}
    if options.html:
        effects.write_attribution(options.html, subject.lm, found, title=f"{subject.name}: {options.prompt}", said=said,
                                  labels=labels, dashboard=None if index is None else beside(index))
    if options.json:
        print(json.dumps({"difference": found.difference, "sums": found.sums, "agreement": said,
                          "found": [part._asdict() for part in found.parts()]}))
        return 0
    print(f"{found.summary}\n{len(found.position_P):,} active pairs of token and feature")
    for part in map(found.part, found.largest(_SHOWN)):
        name, active = (part.kind, "") if part.feature is None else (part.feature, f"{part.activation:.4g}")
        print(f"{name:>8}  attribution {part.attribution:>10.4g}  ablation {part.ablation:>10.4g}  activation {active:>9}  "
              f"token {part.position} {visible(part.token)}  {labels.get(part.feature, '')}".rstrip())
    if said is not None:
        print(f"correlation with the ablation over {said['pairs']:,} pairs{_SAID[options.ablate[0]]}: attribution "
              f"{_shown(said['attribution'])}, activation {_shown(said['activation'])}")
    return 0


def _ablated(subject, found, options: Options):
    """(with ablations, the pairs that the correlation is over or None): what is shown is ablated in any case."""
    import numpy as np

    from saejax.features.effects.attribution import ablate, drawn
    from saejax.pages.effects import ROWS
    (way, n), sample = options.ablate or ("top", _TOP), None
    wanted = found.largest(ROWS if options.html else _SHOWN)
    if way == "all":
        wanted, sample = None, np.arange(len(found.position_P))
    elif way == "top":
        wanted = found.largest(max(n, len(wanted)))
    else:
        sample = drawn(found, n)
        wanted = np.union1d(wanted, sample)
    return ablate(subject.lm, subject.sae, found, wanted), sample


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


JOB = Job(
    "attribute", "act", "which features of a prompt speak for its next token, by attribution and by ablation", """
    Reads a run, or any files that saejax.load reads, and the language model; prints attribution and ablation of features at
    tokens, and of what the SAE misses there (error), for logit(token) - logit(against), and what features, error, bias and BOS
    add up to; writes nothing but the page of --html.
    """, "saejax attribute runs/demo --prompt='The capital of France is' --token=' Paris' --against=' Rome'", Options, run)
