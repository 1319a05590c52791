"""`splitting.html`: how dictionaries of growing size split each other's features, with example trees. No script, nothing loaded
from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path

from saejax.base.errors import FeatureIndexError
from saejax.base.storage import write_bytes
from saejax.base.text import LONGEST, visible
from saejax.features.compare.splitting import BINS, Line, Splitting
from saejax.features.index.reader import FeatureIndex
from saejax.pages.cards import Table
from saejax.pages.dashboard import address_in, beside
from saejax.pages.plots import Plot, bar_plot
from saejax.pages.templates import render

PAGE = "splitting.html"
TREES, NEW = 12, 12  # example trees where none are asked for; new features of each level
_NAME = 300


def write_splitting(found: Splitting, page: Path, features: Sequence[int] = ()) -> Path:
    """Writes the page and returns its path. features: of the smallest dictionary, whose trees come first; behind them those with
    the most descendants. Features are linked to dashboards that stand beside their indexes. Raises `FeatureIndexError` where
    there is no such feature, `DiskError`.
    """
    smallest = found.levels[0]
    for feature in features:
        if not 0 <= feature < smallest.features:
            raise FeatureIndexError(f"feature {feature}: {smallest.name} has features 0 to {smallest.features - 1}")
    linked, roots = addresses(found, page), [*features, *(f for f in found.roots(TREES) if f not in features)]
    levels, table = levels_table(found), steps_table(found)
    write_bytes(page, render(
        PAGE, title="Feature splitting", least=f"{found.least:g}", levels=levels, steps=table, plots=plots(found),
        unknown=[visible(level.name, _NAME) for level in found.levels if not level.known],
        trees=[[_row(found, line, linked) for line in found.tree(0, root)] for root in roots],
        new=[(f"{found.levels[level].features:,}", [_new(found, level, feature, linked) for feature in found.new(level, NEW)])
             for level in range(1, len(found.levels))]).encode())
    return page


def levels_table(found: Splitting) -> Table:
    """Every dictionary: its size, and the features that are left out because they fired on nothing."""
    return Table(("features", "left out", "dictionary"), [
        (f"{level.features:,}", f"{int((~level.fired_F).sum()):,}" if level.known else "not known", visible(level.name, _NAME))
        for level in found.levels])


def steps_table(found: Splitting) -> Table:
    """Every step from one size to the next: children of a feature, and the share of the next one's that are new."""
    rows = []
    for level in range(len(found.levels) - 1):
        s = found.shares(level)
        rows.append((f"{s['smaller']:,} to {s['larger']:,}", f"{s['children']:.2f}", *(f"{n:,}" for n in s["histogram"].values()),
                     *(f"{100 * s[name]:.1f} %" for name in ("none", "one", "several", "new")),
                     "none" if s["cosine"] is None else f"{s['cosine']:.3f}"))
    return Table(("step", "children", *BINS, "none", "one", "several", "new", "cosine"), rows)


def plots(found: Splitting) -> list[Plot]:
    """A histogram of the children of a feature, of each step."""
    out = []
    for level in range(len(found.levels) - 1):
        s = found.shares(level)
        counts = list(s["histogram"].values())
        out.append(bar_plot(f"Children of {sum(counts):,} features of {s['smaller']:,} in {s['larger']:,}", BINS,
                            {"features": [n / sum(counts) for n in counts]}, "children", "share of features", totals=counts))
    return out


def addresses(found: Splitting, page: Path) -> list[str | None]:
    """Of each dictionary what the number of a feature completes to the address of its page, seen from `page`: in the dashboard
    beside its index; None where there is none, or the index is gone or of another SAE.
    """
    out = []
    for level in found.levels:
        dashboard = None if level.index is None else _dashboard(level.index, level.fingerprint)
        out.append(None if dashboard is None else address_in(dashboard, 0, page).removesuffix("0"))
    return out


def _dashboard(index: Path, fingerprint: str) -> Path | None:
    try:
        opened = FeatureIndex.open(index)
        return beside(opened) if opened.manifest["sae"]["fingerprint"] == fingerprint else None
    except (FeatureIndexError, OSError):
        return None


def _row(found: Splitting, line: Line, linked: Sequence[str | None]) -> dict:
    return {"depth": line.level, "size": f"{found.levels[line.level].features:,}", "feature": line.feature,
            "address": None if linked[line.level] is None else f"{linked[line.level]}{line.feature}",
            "words": _words(found, line.level, line.feature), "more": line.more,
            "cosine": "" if line.cosine is None else f"{line.cosine:.3f}"}


def _new(found: Splitting, level: int, feature: int, linked: Sequence[str | None]) -> dict:
    line = Line(level, feature, float(found.levels[level].cosine_F[feature]), 0)
    return _row(found, line, linked) | {"nearest": int(found.levels[level].parent_F[feature])}


def _words(found: Splitting, level: int, feature: int) -> list[str]:
    return [visible(text, LONGEST + 1) for text in found.fires_on(level, feature)]
