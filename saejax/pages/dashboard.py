"""`saejax dashboard`: a static site of an index. No server, no remote asset, opens from disk.

    index.html *.css *.js             the page; it draws what the data files hold
    data/meta.js                      figures of the run, density histogram, how the data are divided
    data/map.js                       places of the features, if a picture was asked for
    data/list/000.js                  one line of each of 8,192 features: what the list sorts and searches
    data/features/000/000000.js       everything about 64 features; 256 files a folder

Data files are scripts that hand one JSON value to the page: a page opened from disk may load a script, but not read a file. Their
number is F / 64 and the page loads what it shows. Every text from the corpus has gone through `visible` and `script_json` and is
put on the page as text, never as HTML; the page's policy allows no script but its own files.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import numpy as np

from saejax.base.assets import model_title
from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.records import RunPaths
from saejax.base.storage import read_json, write_bytes, write_json
from saejax.base.text import script_json, visible
from saejax.base.version import __version__
from saejax.features.index.examples import INTERVALS
from saejax.features.index.reader import EXAMPLES, FeatureIndex
from saejax.pages.templates import render, source

LIST, FEATURES_PER_FILE, FILES_PER_FOLDER = 8192, 64, 256
STYLES = ("theme.css", "app.css")
SCRIPTS = (  # in this order
    "elements.js", "data.js", "tip.js", "charts.js", "map.js", "search.js", "list.js", "feature.js", "app.js")
MARK = "dashboard.json"  # says that a directory is a dashboard, and of which index
_META = 'saejax("meta",0,'
_SHOWN_TOKENS = 4        # in a line of the list
_LONGEST = 400           # characters of an explanation


def write_dashboard(index: FeatureIndex, out: str | Path, *, title: str, figures: list[tuple[str, str]] = (),
                    links: list[tuple[str, str]] = (), explanations: Mapping[int, str] = MappingProxyType({}),
                    places_F2: np.ndarray | None = None, progress: bool = True) -> Path:
    """Writes the site and returns the path of its `index.html`, which is written last.

    figures: (label, value) of the run for the front page. links: (label, relative address). explanations: {feature: what somebody
    says of it}. places_F2: a picture of the features (`picture.plane`), in [0, 1].
    Raises `FeatureIndexError` when `out` is another directory's place or an explained feature is none, `DiskError`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FeatureIndexError(f"{out}: is a file; choose another directory")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise FeatureIndexError(f"{out}: is not empty and no dashboard; choose another directory")
    for feature in explanations:
        index.check_feature(feature)
    (out / "index.html").unlink(missing_ok=True)
    write_json(out / MARK, {"kind": "saejax-dashboard", "schema_version": 1, "index": index.manifest["sha256"]})
    labels = _Labels(index, explanations)
    with Progress("dashboard", index.features, unit="feature", enabled=progress) as bar:
        for number, first in enumerate(range(0, index.features, FEATURES_PER_FILE)):
            last = min(first + FEATURES_PER_FILE, index.features)
            for page in range(-(-first // LIST), -(-last // LIST)):  # those that begin here
                lines = labels.lines(page * LIST, min((page + 1) * LIST, index.features))
                _write(out / "data" / "list" / f"{page:03d}.js", "list", page, lines)
            folder = out / "data" / "features" / f"{number // FILES_PER_FOLDER:03d}"
            _write(folder / f"{number:06d}.js", "features", number, _features(index, labels, first, last))
            bar.advance(last - first)
    if places_F2 is not None:
        _write(out / "data" / "map.js", "map", 0, np.round(np.asarray(places_F2) * 9999).astype(int).T.tolist())
    _write(out / "data" / "meta.js", "meta", 0,
           _meta(index, title, figures, links) | {"explained": len(explanations), "map": places_F2 is not None})
    return _write_page(out, title)


def is_dashboard(path: Path) -> bool:
    """Whether a finished dashboard lies there."""
    return (path / MARK).is_file() and (path / "index.html").is_file()


def add_link(out: Path, label: str, address: str) -> None:
    """One more link on the front page of a dashboard, where it is not there yet."""
    head, meta = _META, out / "data" / "meta.js"
    said = meta.read_text("ascii") if meta.is_file() else ""
    if not said.startswith(head):
        return
    known = json.loads(said.removeprefix(head).removesuffix(");\n"))
    if [label, address] not in known["links"]:
        _write(meta, "meta", 0, known | {"links": [*known["links"], [label, address]]})


def address_in(dashboard: Path, feature: int, page: Path) -> str:
    """The address of a feature's page, relative to another page's file."""
    there = os.path.relpath((dashboard / "index.html").absolute(), page.absolute().parent)
    return f"{quote(Path(there).as_posix())}#feature={feature}"


def beside(index: FeatureIndex) -> Path | None:
    """The dashboard of this index where its own place has one, else None."""
    out = place_of(index.path)
    return out if is_dashboard(out) and read_json(out / MARK).get("index") == index.manifest["sha256"] else None


def place_of(index: Path) -> Path:
    """Where the dashboard of an index stands when nothing else is said: beside it."""
    return RunPaths((index.absolute() if index.is_absolute() or index.parent == Path() else index).parent).dashboard


def _write(file: Path, kind: str, number: int, value) -> None:
    write_bytes(file, f"saejax({script_json(kind)},{number},{script_json(value)});\n".encode("ascii"))


def _write_page(out: Path, title: str) -> Path:
    for name in (*STYLES, *SCRIPTS):
        write_bytes(out / name, source(f"site/{name}").encode())
    page = render("index.html", title=visible(title), styles=STYLES, scripts=SCRIPTS)
    write_bytes(out / "index.html", page.encode())
    return out / "index.html"


def _meta(index: FeatureIndex, title: str, figures, links) -> dict:
    m = index.manifest
    return {"title": visible(title), "version": __version__, "features": index.features, "list": LIST,
            "per_file": FEATURES_PER_FILE, "per_folder": FILES_PER_FOLDER, "intervals": INTERVALS,
            "figures": [[visible(label), _long(value)] for label, value in (*figures, *_own_figures(m))],
            "links": [[visible(label), address] for label, address in links if _is_local(address)],
            "neighbours": m["settings"].get("neighbours", "all"), "rows": m["totals"]["kept_rows"],
            "histogram": m["totals"]["density_histogram"]}


def _own_figures(manifest: dict) -> list[tuple[str, str]]:
    sae, corpus, totals = manifest["sae"], manifest["corpus"], manifest["totals"]
    return [("Language model", model_title(sae["model"])),
            ("Indexed", f"{totals['kept_rows']:,} tokens of {totals['contexts']:,} contexts ({corpus['kind']})"),
            ("Alive", f"{totals['alive']:,} of {sae['d_sae']:,} features"),
            ("L0 on these tokens", f"{totals['l0']:.4g}"), ("Checkpoint", sae["fingerprint"][:16])]


def _long(value: str) -> str:
    return "".join(visible(value[i:i + 48]) for i in range(0, min(len(value), 480), 48))


def _is_local(address: str) -> bool:
    return ":" not in address and not address.startswith(("/", "\\"))


class _Labels:
    """The short line of every feature, read once: numbers, the tokens that it fires on most, and its explanation."""

    def __init__(self, index: FeatureIndex, explanations: Mapping[int, str]):
        self._index = index
        self._said = {feature: visible(text, _LONGEST) for feature, text in explanations.items()}
        self._columns = {name: index.column(name) for name in ("density", "max", "mean", "fired")}
        self._tokens = [ids[:_SHOWN_TOKENS] for ids in index.lists("token_ids")]
        self._logits = [ids[:_SHOWN_TOKENS] for ids in index.lists("logit_ids")]
        self._shown: dict[int, str] = {}

    def token(self, number: int) -> str:
        """The text of a token id, safe to look at."""
        if number not in self._shown:
            self._shown[number] = visible(self._index.token(number)) or "\u2205"  # a token of no characters
        return self._shown[number]

    def of(self, feature: int) -> str:
        return self.token(self._tokens[feature][0]) if len(self._tokens[feature]) else ""

    def said(self, feature: int) -> str:
        """The explanation of a feature, safe to look at; empty without one."""
        return self._said.get(feature, "")

    def lines(self, first: int, last: int) -> dict:
        """Columns of features first .. last - 1."""
        part = slice(first, last)
        return {"first": first, **{name: _short(values[part]) for name, values in self._columns.items()},
                "tokens": [[self.token(i) for i in ids] for ids in self._tokens[part]],
                "logits": [[self.token(i) for i in ids] for ids in self._logits[part]],
                "said": [[feature, self.said(feature)] for feature in range(first, last) if self.said(feature)]}


def _short(values, digits: int = 5) -> list:
    return [int(v) if float(v).is_integer() and abs(v) < 2**53 else float(f"{float(v):.{digits}g}") for v in np.asarray(values)]


def _features(index: FeatureIndex, labels: _Labels, first: int, last: int) -> dict:
    """What one data file holds: a table of the token texts it needs, and its features."""
    words: dict[str, int] = {}

    def word(token: int) -> int:
        return words.setdefault(labels.token(int(token)), len(words))

    def text(shown: str) -> int:
        return words.setdefault(visible(shown), len(words))

    examples = _examples(index, first, last, text)
    features = [_feature(row, labels, word) | {"examples": examples[row["feature"]]} for row in index.rows(first, last)]
    return {"first": first, "words": list(words), "features": features}


def _feature(row: dict, labels: _Labels, word) -> dict:
    def near(name: str, *more: str) -> list:
        return [[i, labels.of(i), *(_short([v], 3)[0] for v in rest)]
                for i, *rest in zip(row[f"{name}_ids"], row[f"{name}_scores"], *(row[m] for m in more), strict=True)]

    half = len(row["logit_ids"]) // 2
    logits = [[word(i), _short([v], 3)[0]] for i, v in zip(row["logit_ids"], row["logit_effects"], strict=True)]
    return {"id": row["feature"], "said": labels.said(row["feature"]), **{name: _short([row[name]])[0] for name in (
        "fired", "density", "mean", "max", "decoder_norm", "encoder_norm", "bias", "linear_width")},
        "linear": row["linear_counts"], "log": row["log_counts"], "log_edges": _short(row["log_edges"]),
        "interval_counts": _short(row["interval_counts"], 3),
        "tokens": [[word(i), *_short(v, 3)] for i, *v in zip(*(row[n] for n in ("token_ids", "token_shares", "token_means")),
                                                             strict=True)],
        "up": logits[:half], "down": logits[half:], "cosine": near("cosine"), "firing": near("firing", "firing_support")}


def _examples(index: FeatureIndex, first: int, last: int, text) -> dict[int, list]:
    """By feature: [interval, value, context, position, start, token words, [offset, activation, ...]] of every example."""
    table = index.table(EXAMPLES, first, last)
    columns = [table[name].to_numpy().tolist() for name in ("feature", "interval", "value", "context", "position", "start")]
    acts_EW = table["acts"].combine_chunks().flatten().to_numpy().reshape(-1, index.window)
    out: dict[int, list] = {feature: [] for feature in range(first, last)}
    for feature, interval, value, context, position, start, acts_W in zip(*columns, acts_EW, strict=True):
        texts, shown, _ = index.shown(context, start, acts_W)
        acts = [x for offset, act in enumerate(shown) if act > 0 for x in (offset, float(f"{act:.4g}"))]
        out[feature].append([interval, float(f"{value:.4g}"), context, position, start, [*map(text, texts)], acts])
    return out
