"""The figures of reports as SVG, for a light and a dark page, and as PNG. Text becomes outlines: nothing in it can be script."""

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from saejax.base.text import visible

_MOST_POINTS, _LONGEST_LABEL = 1500, 60
_MARKED = {"points": "o", "joined": "o-", "joined dashed": "s--"}
_THEMES = {
    "light": {"ink": "#1f2328", "faint": "#d1d9e0", "lines": ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df")},
    "dark": {"ink": "#d1d7e0", "faint": "#3d444d", "lines": ("#58a6ff", "#ff7b72", "#56d364", "#e3b341", "#a371f7")},
}


@dataclass(frozen=True)
class Plot:
    """A titled figure: data URIs for both themes."""

    title: str
    light: str
    dark: str


@dataclass(frozen=True)
class Curve:
    """One line, over tokens or over what the axis says."""

    label: str
    xs: list[float]
    ys: list[float]


@dataclass(frozen=True)
class Picture(Plot):
    """A plot that is also kept in files of its own: the light one as `svg`, and as `png` on white."""

    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Series:
    """What a plot with logarithmic axes, or with error bars, shows. drawn: "points", "line", "dashed", "faint", or, points with
    lines between them, "joined" and "joined dashed". ends: (low, high) of every y, bars of points and a band of lines. Without a
    label it is not in the legend.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    drawn: str = "line"
    ends: Sequence[tuple[float, float]] = ()


def curves(lines: list[dict], labels: dict[str, str]) -> list[Curve]:
    """{metric key: label} -> the curves that the metric lines hold, thinned to what a screen can show."""
    out = []
    for key, label in labels.items():
        points = [(line["tokens_seen"], line[key]) for line in lines
                  if is_number(line.get("tokens_seen")) and is_number(line.get(key))]
        step = max(1, len(points) // _MOST_POINTS)
        points = points[::step] + (points[-1:] if (len(points) - 1) % step else [])
        if points:
            out.append(Curve(label, [p[0] for p in points], [p[1] for p in points]))
    return out


def is_number(value) -> bool:
    """Whether a value of a metric line is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def line_plot(title: str, over: list[Curve], *, log: bool = False, marks: Sequence[float] = (),
              top: float | None = None) -> Plot:
    """Curves over tokens seen; `marks` are drawn as dotted vertical lines. log: points of 0 and less are left out."""
    def draw(axes, theme):
        for curve, colour in zip(over, theme["lines"], strict=False):
            axes.plot(curve.xs, curve.ys, color=colour, linewidth=1.4, label=curve.label)
        for mark in marks:
            axes.axvline(mark, color=theme["ink"], linewidth=0.8, linestyle=":", alpha=0.7)
        if log and any(y > 0 for c in over for y in c.ys):
            axes.set_yscale("log", nonpositive="mask")
        else:
            ceiling = top or 1.08 * max(y for c in over for y in c.ys) or 0.02
            axes.set_ylim(-0.02 * ceiling, ceiling)
            axes.yaxis.set_major_formatter(lambda y, _: short(y))
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        if len(over) > 1:
            axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=8)

    return _plot(title, draw)


def histogram_plot(title: str, histogram: dict) -> Plot:
    """Firing densities in log10 bins; features that never fired stand apart on the left."""
    def draw(axes, theme):
        edges, counts = histogram["log10_edges"], histogram["counts"]
        widths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        axes.bar(edges[:-1], counts, width=[0.92 * w for w in widths], align="edge", color=theme["lines"][0])
        if histogram["never"]:
            axes.bar([edges[0] - 1], [histogram["never"]], width=0.5, align="edge", color=theme["lines"][1])
        ticks = [e for e in edges if float(e).is_integer()]
        axes.set_xticks([edges[0] - 0.75, *ticks], ["never", *(f"$10^{{{int(t)}}}$" for t in ticks)])
        axes.set_xlabel("share of held-out tokens on which a feature fires")
        axes.set_ylabel("features")

    return _plot(title, draw)


def bar_plot(title: str, places: Sequence[str], shares: dict[str, list[float]], xlabel: str, ylabel: str, *,
             totals: Sequence[int]) -> Plot:
    """Shares at every place, stacked; above each bar how many it is a share of. A place without any is left empty."""
    def draw(axes, theme):
        base = [0.0] * len(places)
        for (label, values), colour in zip(shares.items(), theme["lines"], strict=False):
            axes.bar(range(len(places)), values, bottom=base, width=0.85, color=colour, label=label)
            base = [a + b for a, b in zip(base, values, strict=True)]
        for place, total in enumerate(totals):
            axes.text(place, 1.02, short(total), ha="center", fontsize=7, color=theme["ink"])
        axes.set_ylim(0, 1.12)
        axes.set_xticks(range(len(places)), places, rotation=40, ha="right")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(shares) > 1:
            axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _plot(title, draw)


def log_plot(title: str, over: Sequence[Series], xlabel: str, ylabel: str, *, log: str = "xy") -> Picture:
    """log: the axes that are logarithmic. Series have the colours of the theme in their order, those of one label the same, faint
    ones that of the text.
    """
    def draw(axes, theme):
        colours, of_label = itertools.cycle(theme["lines"]), {}
        for series in over:
            known = of_label.get(series.label)
            colour = theme["ink"] if series.drawn == "faint" else known or next(colours)
            _draw_series(axes, series if known is None else replace(series, label=""), colour)
            if series.label:
                of_label[series.label] = colour
        axes.set(**{f"{axis}scale": "log" for axis in log})
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in log and math.log10(max(axis.get_view_interval()) / min(axis.get_view_interval())) < 1.2:
                axis.set_major_formatter(_written)
                axis.set_minor_formatter(_written)
            label = xlabel if axis is axes.xaxis else textwrap.fill(ylabel, 30)
            axis.set_label_text(label.replace("$", r"\$"))
        axes.tick_params(axis="x", which="minor", labelrotation=30)
        axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=8)

    return _picture(title, draw)


def joined_plot(title: str, over: Sequence[Series], xlabel: str, ylabel: str, *, heights: tuple[float, float] | None = None,
                log: bool = False) -> Picture:
    """Points with bars and lines between them; the legend stands beside. heights: ends of the y axis. log: it is logarithmic."""
    def draw(axes, theme):
        for series, colour in zip(over, itertools.cycle(theme["lines"]), strict=False):
            _draw_series(axes, series, colour)
        if log:
            axes.set_yscale("log", nonpositive="mask")
        if heights is not None:
            axes.set_ylim(*heights)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.legend(frameon=False, labelcolor=theme["ink"], fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _picture(title, draw)


def _picture(title: str, draw) -> Picture:
    light, dark = (_svg(draw, theme) for theme in _THEMES.values())
    return Picture(title, _uri(light), _uri(dark), light, _png(draw))


def _written(value: float, _=None) -> str:
    """A value of an axis: 0.025, 3,000."""
    return f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.3g}"


def _draw_series(axes, series: Series, colour: str) -> None:
    label, low_high = visible(series.label, _LONGEST_LABEL).replace("$", r"\$") or None, list(zip(*series.ends, strict=True))
    if series.drawn in _MARKED:
        bars = [[abs(end - y) for end, y in zip(ends, series.ys, strict=True)] for ends in low_high] or None
        axes.errorbar(series.xs, series.ys, yerr=bars, fmt=_MARKED[series.drawn], markersize=4, capsize=2, elinewidth=1,
                      linewidth=1.2, color=colour, label=label)
        return
    faint = series.drawn == "faint"
    axes.plot(series.xs, series.ys, color=colour, label=label, linewidth=0.7 if faint else 1.4, alpha=0.45 if faint else 1,
              linestyle="--" if series.drawn == "dashed" else "-", marker="." if faint else None, markersize=3)
    if low_high:
        axes.fill_between(series.xs, *low_high, color=colour, alpha=0.15, linewidth=0)


def _plot(title: str, draw) -> Plot:
    return Plot(title, *(_uri(_svg(draw, theme)) for theme in _THEMES.values()))


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _svg(draw, theme: dict) -> bytes:
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "saejax", "font.size": 9}):
        figure = _figure(draw, theme)
        figure.patch.set_alpha(0)
        buffer = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _png(draw) -> bytes:
    with rc_context({"font.size": 9}):
        figure = _figure(draw, _THEMES["light"])
        figure.set_dpi(200)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _figure(draw, theme: dict) -> Figure:
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    draw(axes, theme)
    axes.grid(color=theme["faint"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme["ink"], which="both", labelsize=8)
    axes.xaxis.label.set_color(theme["ink"])
    axes.yaxis.label.set_color(theme["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme["faint"])
    return figure


def short(x: float) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.6g}{unit}"
    return f"{x:.6g}"
