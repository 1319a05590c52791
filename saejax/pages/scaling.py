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
from saejax.scaling.points import Left, Point, parsed_recipe
from saejax.scaling.study import Held, Study
from saejax.scaling.sums import Estimate
from saejax.scaling.surface import EQUATIONS, POWER, SUM, Surface
from saejax.scaling.topk import TopKSurface

_BEYOND = (1.0, 10.0, 100.0)  # times the largest fitted budget, in the table of optima
_SHORT = 200
_RUNS = ("run", "features", "steps", "FLOPs", "loss", "alive", "dead")
_LAWS = ("law", "exponent", "factor", "reference", "offset")
_HELD = ("run", "features", "steps", "loss", "predicted", "inside")


def write_scaling(out: Path, study: Study) -> Path:
    """Writes a study that has some law into a folder and returns its page. `saejax.scaling.points.read_points` reads its points
    again. The page holds no script and loads nothing; names of runs and of the loss are shown escaped. Raises `DiskError`.
    """
    points, laws, topk, told = study.points, study.laws, study.topk, caveats(study)
    optima = _optima(laws) if laws else []
    write_json(out / "scaling.json", {
        "points": [point.to_json() for point in points],
        **{name: found and found.summary() for name, found in (("laws", laws), ("rates", study.rates), ("topk", topk))},
        "optimal": [_optimum_json(*found) for found in optima], "caveats": told, "refused": study.refused,
        "held_out": [{"run": h.point.run, "predicted": h.predicted._asdict(), "inside": h.inside} for h in study.held]})
    write_bytes(out / "points.csv", _csv(points).encode())
    plots = pictures(study)
    for name, picture in plots.items():
        write_bytes(out / f"{name}.svg", picture.svg)
        write_bytes(out / f"{name}.png", picture.png)
    page = out / "scaling.html"
    write_bytes(page, render(
        "scaling.html", title="Scaling laws", caveats=told, laws=laws_table(study), held=held_table(study.held),
        left=left_out(study), surface=surface_table(laws.surface.parameters if laws else {}),
        equation=EQUATIONS[laws.surface.form] if laws else "",
        topk=surface_table(topk.parameters if topk else {}), optima=[_optimum_row(*found) for found in optima],
        plots=list(plots.values()), recipe=_recipe(study.grid or points),
        points=points_table(points, laws.compute if laws else "dense"), loss=_loss_name(points)).encode())
    return page


def points_table(points: Iterable[Point], compute: str) -> Table:
    """Every run. compute: which FLOPs are shown, "dense" or "sparse"."""
    return Table(_RUNS, [_row(point, compute) for point in points])


def laws_table(study: Study) -> Table:
    """The power laws that there are, with 90 % intervals: (law, exponent, value at the reference, the reference, offset)."""
    laws, rates = study.laws, study.rates
    found = [] if laws is None else [("features N*(C)", laws.features), ("steps S*(C)", laws.steps),
                                     ("loss L(C), without offset", laws.loss), ("loss L(C), with offset", laws.loss_with_offset)]
    found += [("learning rate LR*(C)", rates.law)] if rates else []
    return Table(_LAWS, [(name, _told(law.exponent), _told(law.factor), f"{law.reference:.3g}",
                          _told(law.offset) if law.offset else "") for name, law in found if law])


def surface_table(parameters: dict[str, Estimate]) -> Table:
    """The parameters of a surface, with 90 % intervals."""
    return Table(("parameter", "value"), [(name, _told(e)) for name, e in parameters.items()])


def held_table(held: Sequence[Held]) -> Table:
    """Runs that were held out of the fit, and whether each lies in the interval that was predicted for it."""
    return Table(_HELD, [(visible(point.run, _SHORT), f"{point.features:,}", f"{point.steps:,}", f"{point.loss:.5g}",
                          _told(predicted), "yes" if inside else "no")
                         for point, predicted, inside in ((*one, one.inside) for one in held)])


def caveats(study: Study) -> list[str]:
    """What a reader of the laws has to know, one sentence each; first why there is a law less."""
    told = [*(visible(line, 1000) for line in study.refused),
            f"The loss is: {_loss_name(study.points)}. Laws of another loss have other exponents.",
            "All runs have one recipe. Another batch, optimizer, sparsity, data or layer may have other laws."]
    if study.laws:
        lr, k = study.lr, study.grid[0].k
        told += [f"The laws are of the learning rate {lr:.3g}{'' if k is None else f' and of k = {k}'}.", *_of_laws(study.laws)]
    if study.topk:
        (low, high), (least, most) = study.topk.features, study.topk.k
        told.append(f"The surface over k goes through {study.topk.points} runs of {low:,} to {high:,} features, k of {least} to "
                    f"{most}. It is off by {study.topk.error:.2%}. Loss always falls with k: this does not choose k.")
    return told


def _of_laws(laws: Laws) -> list[str]:
    low, high = laws.fitted_range
    ratio = "no irreducible offset could be fitted: it takes five budgets" if laws.loss_with_offset is None else (
        f"an offset of {_told(laws.loss_with_offset.offset)} was fitted beside the law without one")
    return [
        f"Fitted: {laws.points} runs; optima of {len(laws.budgets)} budgets from {low:.3g} to {high:.3g} {laws.compute} FLOPs. "
        "What lies outside is extrapolated: the table of optima says by how many powers of ten.",
        f"Left out: {len(laws.left_out)}; they are listed below with the reason." if laws.left_out else "Nothing was left out.",
        f"Of the loss over compute, {ratio}. Without an offset a power law falls to 0, and far out it promises too much.",
        _of_surface(laws.surface),
        "Intervals are 90 %. Those of a predicted loss reach over both forms. The others know the scatter of the runs, not the "
        "error of the form, nor the bias of a parabola on a coarse grid.",
    ]


def _of_surface(surface: Surface) -> str:
    other = POWER if surface.form == SUM else SUM
    return (f"The surface is {EQUATIONS[surface.form]}; it is off by {surface.error:.2%} (root mean square), and "
            f"{EQUATIONS[other]} by {surface.errors[other]:.2%}.")


def left_out(study: Study) -> list[tuple[str, str, str]]:
    """(of which fit, what, why)."""
    fits = (("laws", study.laws), ("learning rate", study.rates), ("surface over k", study.topk))
    found: list[tuple[str, Sequence[Left]]] = [(name, fit.left_out) for name, fit in fits if fit]
    return [(fit, visible(what, _SHORT), visible(why, _SHORT)) for fit, lefts in found for what, why in lefts]


def pictures(study: Study) -> dict[str, Picture]:
    """{name of its files: figure}."""
    out, what = {}, visible(_loss_name(study.points), 40)
    if (laws := study.laws) is not None:
        c = np.array([budget.compute for budget in laws.budgets])
        compute = f"{laws.compute} FLOPs of the training run"
        out["loss"] = log_plot("Loss over compute", [
            *_by_size(study.grid, laws.compute), _optimal(c, [b.loss for b in laws.budgets], "optimum of a budget"),
            *_line(laws.loss_with_offset or laws.loss, c, "power law with offset" if laws.has_offset else "power law")],
            compute, what)
        for name, label in (("features", "features N*(C)"), ("steps", "steps S*(C)")):
            out[name] = log_plot(f"Optimal {name} over compute", [
                _optimal(c, [getattr(b, name) for b in laws.budgets], "optimum of a budget"),
                *_line(getattr(laws, name), c, "power law")], compute, label)
    if (rates := study.rates) is not None:
        c = np.array([budget.compute for budget in rates.budgets])
        out["lr"] = log_plot("Optimal learning rate over compute", [
            _optimal(c, [b.lr for b in rates.budgets], "optimum of a budget"), *_line(rates.law, c, "power law")],
            f"{rates.compute} FLOPs of the training run", "learning rate LR*(C)")
    if study.topk is not None:
        out["topk"] = log_plot("Loss over features, for each k", _by_k(study.points, study.topk), "features n", what)
    return out


def _by_k(points: Sequence[Point], topk: TopKSurface) -> list[Series]:
    fitted = [p for p in points if p.run in topk.runs]
    out = []
    for k in sorted({p.k for p in fitted}):
        own = sorted((p.features, p.loss) for p in fitted if p.k == k)
        xs = np.geomspace(*topk.features, 30)
        found = [topk.predict(x, k) for x in xs]
        out += [Series(f"k = {k}", *zip(*own, strict=True), drawn="points"),
                Series(f"k = {k}", xs, [e.value for e in found], ends=[(e.low, e.high) for e in found])]
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


def _optima(laws: Laws) -> list[tuple[str, Optimum]]:
    """(by what, optimum) at the largest fitted budget and beyond."""
    return [(by, laws.optimal(laws.budgets[-1].compute * times, by=by)) for times in _BEYOND for by in ("envelope", "surface")]


def _optimum_json(by: str, found: Optimum) -> dict:
    return {"by": by, "compute": found.compute, "decades": found.decades,
            "features": found.features._asdict(), "steps": found.steps._asdict(), "loss": found.loss._asdict()}


def _optimum_row(by: str, found: Optimum) -> tuple[str, ...]:
    return (f"{found.compute:.3g}", by, _told(found.features), _told(found.steps), _told(found.loss), f"{found.decades:.1f}")


def _loss_name(points: Sequence[Point]) -> str:
    return visible(next((point.loss_name for point in points if not point.diverged), ""), _SHORT)


def _recipe(points: Sequence[Point]) -> list[tuple[str, str]]:
    first = next(point for point in points if not point.diverged)
    own = {name: getattr(first, name) for name in ("d_in", "batch", "k", "lr")}
    return [(visible(name, _SHORT), visible(str(value), 2000)) for name, value in (own | parsed_recipe(first.recipe)).items()]


def _row(point: Point, compute: str) -> tuple[str, ...]:
    loss = f"diverged: {visible(point.diverged, _SHORT)}" if point.diverged else f"{point.loss:.5g}"
    dead = "" if point.dead_fraction is None else f"{point.dead_fraction:.1%} in {point.dead_tokens:,} tokens"
    flops = point.flops_dense if compute == "dense" else point.flops_sparse
    return (visible(point.run, _SHORT), f"{point.features:,}", f"{point.steps:,}", "" if flops is None else f"{flops:.3g}", loss,
            "" if point.alive is None else f"{point.alive:,}", dead)


def _told(e: Estimate) -> str:
    return f"{e.value:.4g} ({e.low:.4g} to {e.high:.4g})"
