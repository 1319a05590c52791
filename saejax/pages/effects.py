"""Pages about one prompt: continuations side by side, attribution. One file each, no script, nothing loaded from elsewhere."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saejax.base.storage import write_bytes
from saejax.base.text import visible
from saejax.features.effects.attribution import Attribution, agreement
from saejax.lm import LM
from saejax.lm.token_text import joined
from saejax.pages.dashboard import address_in
from saejax.pages.templates import render

_ROWS, _POINTS, _LONGEST = 40, 2000, 10_000


def write_steering(file: Path, lm_: LM, *, title: str, prompt: str, settings: Sequence[tuple[str, str, str]],
                   rows: Sequence[tuple[str, str, str]]) -> None:
    """settings: (of what, what, relative address of a page about it or ""). rows: (what was done, how the prompt goes on, what it
    does to the next token). Raises `DiskError`.
    """
    shown = [(visible(label, 200), visible(text, _LONGEST), effect) for label, text, effect in rows]
    _write(file, "steering.html", title=title, model=lm_.name, prompt=visible(prompt, _LONGEST), rows=shown,
           settings=[(visible(label, 200), visible(value, 200), address) for label, value, address in settings])


def write_attribution(file: Path, lm_: LM, found: Attribution, *, title: str, labels: dict[int, str],
                      dashboard: Path | None = None) -> None:
    """labels: what is known of features, by number. dashboard: of these features, which pages link to. Raises `DiskError`."""
    name = [visible(lm_.tokenizer.token(t)) for t in found.tokens_T]
    total_T = np.bincount(found.position_P, found.attribution_P, minlength=len(name))
    pairs = [{"token": name[found.position_P[p]], "position": int(found.position_P[p]), "feature": int(found.feature_P[p]),
              "activation": found.activation_P[p], "attribution": found.attribution_P[p], "ablation": found.ablation_P[p],
              "address": "" if dashboard is None else address_in(dashboard, int(found.feature_P[p]), file),
              "label": visible(labels.get(int(found.feature_P[p]), ""), 200)} for p in found.best(_ROWS)]
    against = "the mean logit" if found.against is None else visible(lm_.tokenizer.token(found.against))
    _write(file, "attribution.html", title=title, model=lm_.name, target=visible(lm_.tokenizer.token(found.target)),
           against=against, difference=found.difference, tokens=_tinted(*_characters(lm_, found.tokens_T, total_T)), pairs=pairs,
           said=agreement([found]), points=_points(found))


def _characters(lm_: LM, tokens_T: np.ndarray, total_T: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The text of the tokens and their totals; where several make one character, the first has it and the sum of their totals."""
    sums_T = np.zeros(len(tokens_T))
    np.add.at(sums_T, joined(lm_.tokenizer.pieces(tokens_T))[1], total_T)
    return [*map(visible, lm_.tokenizer.token_strings(tokens_T))], sums_T


def _tinted(text: list[str], total_T: np.ndarray) -> list[dict]:
    """Tokens with the sum of their attributions and its share of the largest, 0 to 1."""
    most = max(float(np.abs(total_T).max()), 1e-30)
    return [{"text": t, "total": float(v), "share": round(abs(float(v)) / most, 3), "sign": "up" if v > 0 else "down"}
            for t, v in zip(text, total_T, strict=True)]


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
