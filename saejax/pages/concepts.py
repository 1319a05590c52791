"""Figures of concept frequency against the size of the dictionary."""

from collections.abc import Sequence

import numpy as np

from saejax.pages.plots import Curve, Plot, dots_plot
from saejax.scaling.concepts import fit
from saejax.scaling.concepts.fit import Collapse, Size

_SHARE = "share of concepts with a feature"
_POINTS = 200


def plots(sizes: Sequence[Size], found: Collapse) -> list[Plot]:
    """Presence against frequency for every size; against frequency x alive features; f50 against 1 / alive features. Points are
    groups of about equally many concepts. What has no curve has no line, and without any curve the third figure is left out.
    """
    by_size = [_of(size, 1.0, one.curve) for size, one in zip(sizes, found.sizes, strict=True)]
    scaled = [_of(size, size.alive, None)[0] for size in sizes]
    common = [_line("one curve", scaled, found.curve)] if found.curve else []
    blank = [Curve("", [], []) for _ in sizes]  # so that the common line has a look of its own
    out = [dots_plot("Concepts with a feature, by frequency", [dots for dots, _ in by_size], [line for _, line in by_size],
                     "occurrences per token", _SHARE),
           dots_plot("The same, frequency times alive features", scaled, blank + common,
                     "occurrences per token x alive features", _SHARE)]
    fitted = [one for one in found.sizes if one.curve]
    if fitted:
        ends = sorted(1 / one.alive for one in fitted)
        out.append(dots_plot("Frequency at which half of the concepts have a feature",
                             [Curve(one.label, [1 / one.alive], [one.f50]) for one in fitted],
                             [*(Curve("", [1 / one.alive] * 2, list(one.f50_interval)) for one in fitted),
                              Curve("1 / alive features", [ends[0], ends[-1]], [ends[0], ends[-1]])],
                             "1 / alive features", "occurrences per token", log="xy"))
    return out


def _of(size: Size, factor: float, curve: fit.Curve | None) -> tuple[Curve, Curve]:
    """(points, fitted line) over frequency x factor."""
    xs, ys = fit.binned(np.asarray(size.frequency_N) * factor, np.asarray(size.present_N))
    dots = Curve(size.label, xs.tolist(), ys.tolist())
    return dots, _line("", [dots], curve) if curve else Curve("", [], [])


def _line(label: str, dots: Sequence[Curve], curve: fit.Curve) -> Curve:
    ends = [x for some in dots for x in some.xs]
    xs = np.geomspace(min(ends), max(ends), _POINTS)
    return Curve(label, xs.tolist(), curve(xs).tolist())
