"""Pages about one prompt: continuations side by side, attribution. One file each, no script, nothing loaded from elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.base.assets import model_title
from saejax.base.storage import write_bytes
from saejax.base.text import visible
from saejax.features.effects.attribution import Attribution
from saejax.lm import LM
from saejax.lm.token_text import joined
from saejax.pages.dashboard import address_in
from saejax.pages.templates import render

ROWS = 40  # of the largest parts, on the page
_POINTS, _LONGEST = 2000, 10_000


def write_steering(file: Path, lm_: LM, *, title: str, prompt: str, settings: Sequence[tuple[str, str, str]],
                   rows: Sequence[tuple[str, str, str]]) -> None:
    """settings: (of what, what, relative address of a page about it or ""). rows: (what was done, how the prompt goes on, what it
    does to the next token). Raises `DiskError`.
    """
    shown = [(visible(label, 200), visible(text, _LONGEST), effect) for label, text, effect in rows]
    _write(file, "steering.html", title=title, model=model_title(lm_.name), prompt=visible(prompt, _LONGEST), rows=shown,
           settings=[(visible(label, 200), visible(value, 200), address) for label, value, address in settings])


def write_attribution(file: Path, lm_: LM, found: Attribution, *, title: str, labels: dict[int, str],
                      said: dict | None = None, dashboard: Path | None = None) -> None:
    """labels: what is known of features, by number. said: `agreement`, of ablated pairs that stand for all. dashboard: of these
    features, which pages link to. Raises `DiskError`.
    """
    text = [visible(t) for t in found.text_T]
    parts = [part._asdict() | {
        "token": text[part.position], "label": visible(labels.get(part.feature, ""), 200),
        "address": "" if dashboard is None or part.feature is None else address_in(dashboard, part.feature, file)}
        for part in map(found.part, found.largest(ROWS))]
    against = "the mean logit" if found.against is None else visible(lm_.tokenizer.token(found.against))
    tokens = [{"text": t, "features": f, "error": e, "bias": b, "bos": s, "sum": f + e + b + s} for t, f, e, b, s in zip(
        text, found.features_T, found.error_T, found.bias_T, found.special_T, strict=True)]
    _write(file, "attribution.html", title=title, model=model_title(lm_.name), target=visible(lm_.tokenizer.token(found.target)),
           against=against, difference=found.difference, sums=found.sums, tints=_tints(lm_, found), tokens=tokens, parts=parts,
           said=said, points=_points(found))


def _tints(lm_: LM, found: Attribution) -> list[tuple[str, str, list[dict]]]:
    """(name, what it sums, tokens with that sum and its share, 0 to 1, of the largest of all three), one for each tinting. Where
    several tokens make one character, the first has it and the sum of theirs.
    """
    text = [visible(t) for t in lm_.tokenizer.token_strings(found.tokens_T)]
    shown_by = joined(lm_.tokenizer.pieces(found.tokens_T))[1]
    sums = [(name, what, np.bincount(shown_by, total_T, minlength=len(text))) for name, what, total_T in (
        ("both", "features and error", found.features_T + found.error_T), ("features", "features", found.features_T),
        ("error", "error", found.error_T))]
    most = max(1e-30, *(float(np.abs(total_T).max()) for _, _, total_T in sums))
    return [(name, what, [
        {"text": t, "total": float(v), "share": round(abs(float(v)) / most, 3), "sign": "up" if v > 0 else "down"}
        for t, v in zip(text, total_T, strict=True)]) for name, what, total_T in sums]


def _points(found: Attribution) -> list[tuple[float, float]]:
    """(x, y) in a square of 300: attribution to the right, ablation upwards, the same scale for both."""
    here = np.flatnonzero(np.isfinite(found.ablation_P))
    here = here[np.argsort(-np.abs(found.ablation_P[here]), kind="stable")][:_POINTS]
    xy = np.stack([found.attribution_P[here], -found.ablation_P[here]], axis=1)
    most = max(float(np.abs(xy).max(initial=0.0)), 1e-30)
    return [(round(float(x), 1), round(float(y), 1)) for x, y in 150 + 145 * xy / most]


def _write(file: Path, template: str, **values) -> None:
    values["title"] = visible(values["title"], 200)
    write_bytes(file, render(template, **values).encode())
