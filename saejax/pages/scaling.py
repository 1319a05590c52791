"""A scaling study as files: `scaling.html`, `scaling.json`, `points.csv`, and the figures as PNG and SVG."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from saejax.base.storage import write_bytes, write_json
from saejax.base.text import visible
from saejax.pages.cards import Table
from saejax.pages.plots import Picture, Series, log_plot
from saejax.pages.sheets import cell
from saejax.pages.templates import render
from saejax.scaling.envelope import PowerLaw
from saejax.scaling.laws import Laws, Optimum
from saejax.scaling.points import Left, Point
from saejax.scaling.rates import RateLaw
from saejax.scaling.study import Held
from saejax.scaling.sums import Estimate
from saejax.scaling.topk import TopKSurface

_BEYOND = (1.0, 10.0, 100.0)  # times the largest fitted budget, in the table of optima
_SHORT = 200
_RUNS = ("run", "features", "steps", "FLOPs", "loss", "alive", "dead")
_LAWS = ("law", "exponent", "factor", "reference", "offset")
_HELD = ("run", "features", "steps", "loss", "predicted", "inside")


def write_scaling(out: Path, points: Iterable[Point], laws: Laws, *, rates: RateLaw | None = None,
                  topk: TopKSurface | None = None, held: Sequence[Held] = ()) -> Path:
    """Writes the study into a folder and returns its page. `saejax.scaling.points.read_points` reads the points of the JSON.
    held: of the points, those that the laws were not fitted to.

    The page holds no script and loads nothing; names of runs and of the loss are shown escaped. Raises `DiskError`.
    """
    points = list(points)
    left, told = left_out(laws, rates, topk), caveats(laws)
    write_json(out / "scaling.json", {
        "points": [point.to_json() for point in points], "laws": laws.summary(), "rates": rates and rates.summary(),
        "topk": topk and topk.summary(), "optimal": [_optimum_json(*found) for found in _optima(laws)], "caveats": told,
        "held_out": [{"run": h.point.run, "predicted": h.predicted._asdict(), "inside": h.inside} for h in held]})
    write_bytes(out / "points.csv", _csv(points).encode())
    plots = pictures(points, laws, rates)
    for name, picture in plots.items():
        write_bytes(out / f"{name}.svg", picture.svg)
        write_bytes(out / f"{name}.png", picture.png)
    page = out / "scaling.html"
    write_bytes(page, render(
        "scaling.html", title="Scaling laws", caveats=told, laws=laws_table(laws, rates), surface=_parameters(laws.surface),
        topk=_parameters(topk.parameters) if topk else [], optima=[_optimum_row(*found) for found in _optima(laws)],
        left=left, held=held_table(held), plots=list(plots.values()), recipe=_recipe(points),
        points=points_table(points, laws.compute), loss=visible(laws.loss_name, _SHORT)).encode())
    return page


def points_table(points: Iterable[Point], compute: str) -> Table:
    """Every run. compute: which FLOPs are shown, "dense" or "sparse"."""
    return Table(_RUNS, [_row(point, compute) for point in points])


def laws_table(laws: Laws | None, rates: RateLaw | None) -> Table:
    """The power laws that there are, with 90 % intervals: (law, exponent, value at the reference, the reference, offset)."""
    found = [] if laws is None else [("features N*(C)", laws.features), ("steps S*(C)", laws.steps),
                                     ("loss L(C), without offset", laws.loss), ("loss L(C), with offset", laws.loss_with_offset)]
    found += [("learning rate LR*(C)", rates.law)] if rates else []
    return Table(_LAWS, [(name, _told(law.exponent), _told(law.factor), f"{law.reference:.3g}",
                          _told(law.offset) if law.offset else "") for name, law in found if law])


def held_table(held: Sequence[Held]) -> Table:
    """Runs that were held out of the fit, and whether each lies in the interval that was predicted for it."""
    return Table(_HELD, [(visible(point.run, _SHORT), f"{point.features:,}", f"{point.steps:,}", f"{point.loss:.5g}",
                          _told(predicted), "yes" if inside else "no")
                         for point, predicted, inside in ((*one, one.inside) for one in held)])


def caveats(laws: Laws) -> list[str]:
    """What a reader of the laws has to know, one sentence each."""
    low, high = laws.fitted_range
    ratio = "no irreducible offset could be fitted: it takes five budgets" if laws.loss_with_offset is None else (
        f"an offset of {_told(laws.loss_with_offset.offset)} was fitted beside the law without one")
    return [
        f"The loss is: {visible(laws.loss_name, _SHORT)}. Laws of another loss have other exponents.",
        f"Fitted: {laws.points} runs; optima of {len(laws.budgets)} budgets from {low:.3g} to {high:.3g} {laws.compute} FLOPs. "
        "What lies outside is extrapolated: the table of optima says by how many powers of ten.",
        "All runs have one recipe. Another batch, optimizer, sparsity, data or layer may have other laws.",
        f"Left out: {len(laws.left_out)}; they are listed below with the reason." if laws.left_out else "Nothing was left out.",
        f"Of the loss over compute, {ratio}. Without an offset a power law falls to 0, and far out it promises too much.",
        f"The surface is off by {laws.error:.2%} (root mean square). Intervals are 90 % and hold if its form is right: they know "
        "the scatter of the runs, not the error of the form, nor the bias of a parabola on a coarse grid.",
    ]


def left_out(laws: Laws | None, rates: RateLaw | None, topk: TopKSurface | None = None) -> list[tuple[str, str, str]]:
    """(of which fit, what, why)."""
    fits = (("laws", laws), ("learning rate", rates), ("surface over k", topk))
    found: list[tuple[str, Sequence[Left]]] = [(name, fit.left_out) for name, fit in fits if fit]
    return [(fit, visible(what, _SHORT), visible(why, _SHORT)) for fit, lefts in found for what, why in lefts]


def pictures(points: Sequence[Point], laws: Laws, rates: RateLaw | None = None) -> dict[str, Picture]:
    """{name of its files: figure}."""
    c = np.array([budget.compute for budget in laws.budgets])
    compute = f"{laws.compute} FLOPs of the training run"
    what = visible(laws.loss_name, 40)
    out = {"loss": log_plot("Loss over compute", [
        *_by_size(points, laws.compute), _optimal(c, [b.loss for b in laws.budgets], "optimum of a budget"),
        *_line(laws.loss_with_offset or laws.loss, c, "power law with offset" if laws.loss_with_offset else "power law")],
        compute, what)}
    for name, label in (("features", "features N*(C)"), ("steps", "steps S*(C)")):
        out[name] = log_plot(f"Optimal {name} over compute", [
            _optimal(c, [getattr(b, name) for b in laws.budgets], "optimum of a budget"),
            *_line(getattr(laws, name), c, "power law")], compute, label)
    if rates:
        c = np.array([budget.compute for budget in rates.budgets])
        out["lr"] = log_plot("Optimal learning rate over compute", [
            _optimal(c, [b.lr for b in rates.budgets], "optimum of a budget"), *_line(rates.law, c, "power law")],
            f"{rates.compute} FLOPs of the training run", "learning rate LR*(C)")
    return out


def _by_size(points: Sequence[Point], compute: str) -> list[Series]:
    out = []
    for features in sorted({point.features for point in points}):
        own = sorted((p.compute(compute), p.loss) for p in points if p.features == features and not p.diverged)
        if own:
            out.append(Series("" if out else "runs of one size", *zip(*own, strict=True), drawn="faint"))
    return out


def _optimal(c: np.ndarray, found: Sequence[Estimate], label: str) -> Series:
    return Series(label, c, [e.value for e in found], drawn="points", ends=[(e.low, e.high) for e in found])


def _line(law: PowerLaw, c: np.ndarray, label: str) -> list[Series]:
    """The law over what was fitted, and dashed one power of ten further."""
    out = []
    for low, high, name, drawn in ((c[0], c[-1], label, "line"), (c[-1], 10 * c[-1], "extrapolated", "dashed")):
        xs = np.geomspace(low, high, 30)
        found = [law.at(x) for x in xs]
        out.append(Series(name, xs, [e.value for e in found], drawn, [(e.low, e.high) for e in found]))
    return out


def _csv(points: Sequence[Point]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([field.name for field in dataclasses.fields(Point)])
    for point in points:
        values = point.to_json().values()
        writer.writerow([cell(v) if isinstance(v, str) else "" if v is None else repr(v) for v in values])
    return text.getvalue()


def _parameters(found: dict[str, Estimate]) -> list[tuple[str, str]]:
    return [(name, _told(e)) for name, e in found.items()]


def _optima(laws: Laws) -> list[tuple[str, Optimum]]:
    """(by what, optimum) at the largest fitted budget and beyond."""
    return [(by, laws.optimal(laws.budgets[-1].compute * times, by=by)) for times in _BEYOND for by in ("envelope", "surface")]


def _optimum_json(by: str, found: Optimum) -> dict:
    return {"by": by, "compute": found.compute, "decades": found.decades,
            "features": found.features._asdict(), "steps": found.steps._asdict(), "loss": found.loss._asdict()}


def _optimum_row(by: str, found: Optimum) -> tuple[str, ...]:
    return (f"{found.compute:.3g}", by, _told(found.features), _told(found.steps), _told(found.loss), f"{found.decades:.1f}")


def _recipe(points: Sequence[Point]) -> list[tuple[str, str]]:
    first = next(point for point in points if not point.diverged)
    return [(name, visible(str(getattr(first, name)), 2000)) for name in ("recipe", "d_in", "batch", "k", "lr")]


def _row(point: Point, compute: str) -> tuple[str, ...]:
    loss = f"diverged: {visible(point.diverged, _SHORT)}" if point.diverged else f"{point.loss:.5g}"
    dead = "" if point.dead_fraction is None else f"{point.dead_fraction:.1%} in {point.dead_tokens:,} tokens"
    flops = point.flops_dense if compute == "dense" else point.flops_sparse
    return (visible(point.run, _SHORT), f"{point.features:,}", f"{point.steps:,}", "" if flops is None else f"{flops:.3g}", loss,
            "" if point.alive is None else f"{point.alive:,}", dead)


def _told(e: Estimate) -> str:
    return f"{e.value:.4g} ({e.low:.4g} to {e.high:.4g})"
