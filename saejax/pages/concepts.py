"""Concept frequency against the size of the dictionary: a study as `concepts.html`, `.csv`, `.json`, and figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from saejax.base.storage import write_bytes
from saejax.base.text import visible
from saejax.pages.plots import Picture, Series, log_plot
from saejax.pages.sheets import cell
from saejax.pages.templates import render
from saejax.scaling.concepts import fit, table
from saejax.scaling.concepts.fit import Collapse, Fit, Interval, Size
from saejax.scaling.concepts.study import Study

_SHARE = "share of concepts with a feature"
_POINTS, _SHORT, _MANY = 200, 200, 50
_NAMES = ("frequency", "frequency_x_alive", "half")  # files of `plots`
PAPER = "Templeton et al. 2024"
DEAD_OF_PAPER, TOKENS_OF_PAPER = ((1_048_576, 0.02), (4_194_304, 0.35), (33_554_432, 0.65)), 10**7  # (features, share), ...
STATEMENT = (f"{PAPER}: the share of concepts that have a feature is a sigmoid of log frequency. Its 50 % point lies a little "
             "below 1 / alive features, and the curves of three dictionaries fall on one when frequency is multiplied by alive "
             "features.")


def write_concepts(out: Path, study: Study) -> Path:
    """Writes a study into a folder and returns its page, which holds no script and loads nothing; names are shown escaped.

    Raises `DiskError`, `ConceptError` for a dictionary without an alive feature.
    """
    told = caveats(study)
    lines = [line | {"size": cell(line["size"]), "category": cell(line["category"])} for line in study.lines]
    table.write(out, lines, study.curves, dead=study.dead, how=study.how, caveats=told, absent=study.counts.absent,
                unsampled=study.unsampled)
    pictures = dict(zip(_NAMES, plots(study.sizes, study.curves), strict=False)) | {"dead": dead_plot(study)}
    for name, picture in pictures.items():
        write_bytes(out / f"{name}.svg", picture.svg)
        write_bytes(out / f"{name}.png", picture.png)
    page = out / "concepts.html"
    write_bytes(page, render(
        "concepts.html", title="Concepts with a feature", paper=STATEMENT, here=_here(study.curves), caveats=told,
        plots=list(pictures.values()), sizes=list(_sizes(study)), dead=_dead(study),
        columns=("concept", "list", "count", "frequency", *(visible(one.label, _SHORT) for one in study.dictionaries)),
        concepts=list(_concepts(study))).encode())
    return page


def caveats(study: Study) -> list[str]:
    """What a reader of the curves has to know, one sentence or two each."""
    how, first = study.how, study.dictionaries[0].measured
    alive = f"in the sample of {first.tokens:,} tokens" if study.evaluated is None else (
        f"on {study.evaluated:,} held-out tokens, by the evaluations")
    out = [
        f"Present: one feature fires on at least {how['recall']:.0%} of the concept's occurrences, and at least "
        f"{how['precision']:.0%} of the tokens that it fires on are the concept's. It fires from {how['level']:.0%} of its "
        "maximum in the sample on. In the paper people judged explanations: its numbers are of another criterion.",
        _looked_at(how),
        f"A dictionary has no curve where fewer than {fit.LEAST_NEAR} concepts lie within a decade of its 50 % point, or where "
        "all concepts are present, or all absent.",
        f"Alive: features that fired {alive}. Of a longer text there are more.",
        f"Frequency: occurrences between two blanks in {study.counts.tokens:,} tokens of the training text. What stands beside "
        "punctuation or is cut by the end of a context is not counted, so that all are somewhat too low.",
    ]
    if len({one.trained for one in study.dictionaries}) > 1:
        out.append("The dictionaries were trained on different numbers of tokens: one trained on little has not met rare words.")
    for names, why in ((study.counts.absent, "The text does not have"), (study.unsampled, "In no context that was looked at")):
        if names:
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            out.append(f"{why}: {', '.join(visible(name, _SHORT) for name in names[:_MANY])}{more}. Left out of the curves.")
    return out


def _looked_at(how: dict) -> str:
    if how["contexts"] is not None and how["contexts"] <= how["random"]:
        return f"Looked at: all {how['contexts']:,} contexts."
    rare = 1 / (how["random"] * how["context"])
    return (f"Looked at: up to {how['per_concept']} contexts of every concept and {how['random']:,} drawn from all, each with "
            f"the number that it stands for. Precision of concepts rarer than about {rare:.1g} per token is mostly too high.")


def dead_plot(study: Study) -> Picture:
    """Dead features by size: those measured, by the number of tokens, and the paper's."""
    found: dict[int, list[tuple[int, float]]] = {}
    for one in study.dead:
        if one["tokens"]:
            found.setdefault(one["tokens"], []).append((one["features"], one["dead_fraction"]))
    measured = [Series(f"in {tokens:,} tokens", *zip(*points, strict=True), "points") for tokens, points in found.items()]
    paper = Series(f"{PAPER}, in {TOKENS_OF_PAPER:,} tokens", *zip(*DEAD_OF_PAPER, strict=True), "points")
    return log_plot("Dead features by size", [*measured, paper], "features", "share that is dead", log="x")


def _here(found: Collapse) -> str:
    if found.curve is None:
        return f"Here: no common curve ({visible(found.refused, _SHORT)})."
    sizes = sum(one.curve is not None for one in found.sizes)
    return (f"Here: one curve for {sizes} sizes has its 50 % point at frequency x alive = "
            f"{_told(found.f50_alive, found.f50_alive_interval)}. Twice the log likelihood of separate curves is "
            f"{found.statistic:.3g} higher (p = {found.p:.2g}, as if concepts of two sizes were drawn apart).")


def _sizes(study: Study) -> Iterator[tuple[str, ...]]:
    for one, size, found in zip(study.dictionaries, study.sizes, study.curves.sizes, strict=True):
        yield (visible(one.label, _SHORT), f"{one.features:,}", f"{found.alive:,}", f"{one.trained:,}", f"{len(size.names):,}",
               f"{int(np.sum(size.present_N)):,}", str(found.near), *_curve(found))


def _curve(found: Fit) -> tuple[str, str, str]:
    if found.curve is None:
        return visible(found.refused.removeprefix(f"{found.label}: "), _SHORT), "", ""
    firth = ", by Firth's likelihood" if found.curve.firth else ""
    return (_told(found.f50, found.f50_interval), _told(found.f50_alive, found.f50_alive_interval),
            _told(found.curve.slope, found.slope_interval) + firth)


def _dead(study: Study) -> list[tuple[str, ...]]:
    own = [(visible(one["label"], _SHORT), f"{one['features']:,}",
            *((f"{one['dead_fraction']:.1%}", f"{one['tokens']:,}") if one["tokens"] else ("not evaluated (saejax eval)", "")))
           for one in study.dead]
    return own + [(PAPER, f"{features:,}", f"{share:.0%}", f"{TOKENS_OF_PAPER:,}") for features, share in DEAD_OF_PAPER]


def _concepts(study: Study) -> Iterator[tuple[str, ...]]:
    """By falling frequency."""
    counts, found = study.counts, [one.measured.found for one in study.dictionaries]
    for c in np.argsort(-counts.occurrences_C, kind="stable"):
        concept = counts.concepts[c]
        yield (visible(concept.name, _SHORT), visible(concept.category, _SHORT), f"{counts.occurrences_C[c]:,}",
               f"{counts.frequency_C[c]:.3g}", *(_answer(one, c) for one in found))


def _answer(found, c: int) -> str:
    if found.sampled_C[c] == 0:
        return ""
    f1 = "" if np.isnan(found.f1_C[c]) else f" (F1 {found.f1_C[c]:.2f}, feature {found.feature_C[c]})"
    return ("yes" if found.present_C[c] else "no") + f1


def _told(value: float, ends: Interval) -> str:
    return f"{value:.3g} ({ends[0]:.3g} to {ends[1]:.3g})"


def plots(sizes: Sequence[Size], found: Collapse) -> list[Picture]:
    """Presence against frequency for every size; against frequency x alive features; f50 against 1 / alive features. Points are
    groups of about equally many concepts. What has no curve has no line, and without any curve the third figure is left out.
    """
    by_size, scaled = [_dots(size, 1.0) for size in sizes], [_dots(size, size.alive) for size in sizes]
    fits = [_line(dots.label, [dots], one.curve) for dots, one in zip(by_size, found.sizes, strict=True) if one.curve]
    common = [_line("one curve", scaled, found.curve, "dashed")] if found.curve else []
    out = [log_plot("Concepts with a feature, by frequency", [*by_size, *fits], "occurrences per token", _SHARE, log="x"),
           log_plot("The same, frequency times alive features", [*scaled, *common], "occurrences per token x alive features",
                    _SHARE, log="x")]
    fitted = [one for one in found.sizes if one.curve]
    if fitted:
        ends = sorted(1 / one.alive for one in fitted)
        halves = [Series(one.label, [1 / one.alive], [one.f50], "points", [one.f50_interval]) for one in fitted]
        line = Series("1 / alive features", [ends[0], ends[-1]], [ends[0], ends[-1]], "dashed")
        out.append(log_plot("Frequency at which half of the concepts have a feature", [*halves, line], "1 / alive features",
                            "occurrences per token"))
    return out


def _dots(size: Size, factor: float) -> Series:
    """Shares over frequency x factor."""
    xs, ys = fit.binned(np.asarray(size.frequency_N) * factor, np.asarray(size.present_N))
    return Series(size.label, xs.tolist(), ys.tolist(), "points")


def _line(label: str, dots: Sequence[Series], curve: fit.Curve, drawn: str = "line") -> Series:
    ends = [x for some in dots for x in some.xs]
    xs = np.geomspace(min(ends), max(ends), _POINTS)
    return Series(label, xs.tolist(), curve(xs).tolist(), drawn)
