"""Figures of concept frequency against the size of the dictionary."""

from collections.abc import Sequence

import numpy as np

from saejax.pages.plots import Picture, Series, log_plot
from saejax.scaling.concepts import fit
from saejax.scaling.concepts.fit import Collapse, Size

_SHARE = "share of concepts with a feature"
_POINTS = 200


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
