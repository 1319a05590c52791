"""What a notebook shows: tables, and cards of a subject and of a feature. Everything in them is escaped."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saejax.base.assets import model_title
from saejax.base.text import visible
from saejax.features.index.feature import Example, Feature
from saejax.lm import LM, hookpoints
from saejax.pages.templates import render, source

_EXAMPLES, _NEAR, _LONGEST = 8, 5, 200


@dataclass(frozen=True)
class Table:
    """Rows of plain values under names, with a note below them. It prints as aligned text and shows itself as HTML in a notebook.
    """

    columns: tuple[str, ...]
    rows: list[tuple]
    note: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> tuple:
        return self.rows[number]

    def column(self, name: str) -> list:
        """The values of a column."""
        return [row[self.columns.index(name)] for row in self.rows]

    def to_pandas(self):
        """The same as a `pandas.DataFrame`."""
        import pandas
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __repr__(self) -> str:
        return f"Table({len(self.rows)} rows of {', '.join(self.columns)})"

    def __str__(self) -> str:
        cells = [self.columns, *self._cells()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, *[self.note] * bool(self.note)])

    def _repr_html_(self) -> str:
        return render("table.html", columns=self.columns, rows=self._cells(), note=self.note)

    def _cells(self) -> list[tuple[str, ...]]:
        return [tuple(f"{v:.4g}" if isinstance(v, float) else visible(str(v), _LONGEST) for v in row) for row in self.rows]


def facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A card of (label, value)."""
    return render("facts.html", title=visible(title, _LONGEST), rows=[(visible(a), visible(b, _LONGEST)) for a, b in rows])


def sae(found) -> str:
    """A card of an SAE (`sae.inference.SAE`)."""
    c = found.cfg
    k = f", k = {c.k}" if c.k else ""
    shape = "" if c.spec.shape == "sae" else f" {c.spec.shape}"
    width = f"{c.d_in:,} wide" + (f", {c.spec.width_out:,} written" if c.spec.width_out != c.d_in else "")
    norm = "none" if c.input_norm == "none" else f"{c.input_norm} of every row"
    scales = c.metadata.get("training", {}).get("scales")
    norm += f"; that of the training (x {scales[0]:.4g}) is in the weights" if scales else ""
    mesh = "" if found.mesh is None else f", split over {found.mesh.shape['dict']} devices"
    return facts("SAE", [
        ("kind", f"{c.kind}{shape}{k}"), ("shape", f"{c.d_sae:,} features, {width}{mesh}"), ("hookpoint", c.place),
        ("model", model_title(c.model)), ("norm", norm), ("files", found.source or "none: it was made in Python")])


def language_model(found: LM) -> str:
    """A card of a language model."""
    cfg, names = found.cfg, hookpoints(found.cfg)
    inside = [name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")]
    outside = [name for name in names if not name.startswith("blocks.")]
    return facts("Language model", [
        ("name", found.name if found.revision is None else f"{found.name}, revision {found.revision}"),
        *([("what it is", model_title(found.name))] if model_title(found.name) != found.name else []),
        ("layers", f"{cfg.n_layers}"), ("width", f"{cfg.d_model:,}"), ("vocabulary", f"{cfg.vocab_size:,} tokens"),
        ("context", f"{cfg.max_context:,} tokens"), ("dtype", found.model.dtype.name),
        ("hookpoints", f"{', '.join(outside)}, and of blocks.0 to blocks.{cfg.n_layers - 1}:"), ("", ", ".join(inside))])


def feature(found: Feature) -> str:
    """A card of a feature: its figures, what it fires on and does, its highest examples with the activations as colour."""
    def shown(pairs) -> list[str]:
        return [visible(text) for text, _ in pairs]

    hot = re.search(r"-{2}up: ([\d, ]+);", source("site/theme.css"))[1]  # a notebook has no theme
    tops = [e for e in found.examples if e.interval == 0][:_EXAMPLES]
    return render("feature.html", f=found, hot=hot, tokens=shown(found.tokens), promotes=shown(found.promotes),
                  demotes=shown(found.demotes), near=found.neighbours[:_NEAR], examples=[_tinted(e, found.max) for e in tops])


def _tinted(example: Example, most: float) -> list[tuple[str, float]]:
    pairs = zip(example.texts, example.acts, strict=False)
    return [(visible(text), round(float(act) / max(most, 1e-30), 3)) for text, act in pairs]
