"""`saejax dashboard`: a static site of an index. No server, no remote asset, opens from disk.

    index.html *.css *.js             the page; it draws what the data files hold
    data/meta.js                      figures of the run, density histogram, how the data are divided
    data/map/0000.js                  places of features, if a picture was asked for
    data/density/0000.js ...          a column of the list: what it sorts and searches by (`dashboard_list`)
    data/features/0000/000000.js      everything about some features; 256 files a folder (`dashboard_features`)

Data files are scripts of at most 256 kB (`data_files`); the page loads what it shows. Every text from the corpus has gone through
`visible` and `script_json` and is put on the page as text, never as HTML; the page's policy allows no script but its own files.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import numpy as np

from saejax.base.assets import model_title
from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.records import RunPaths
from saejax.base.storage import disk_errors, read_json, write_bytes, write_json
from saejax.base.text import visible
from saejax.base.version import __version__
from saejax.features.compare.picture import Picture
from saejax.features.index.examples import INTERVALS
from saejax.features.index.reader import GROUP, FeatureIndex
from saejax.pages.dashboard_features import FeatureFiles
from saejax.pages.dashboard_list import Lines, write_list
from saejax.pages.dashboard_relatives import Relatives
from saejax.pages.data_files import numbered, packed, write_value
from saejax.pages.templates import render, source

STYLES = ("theme.css", "app.css")
SCRIPTS = (  # in this order
    "elements.js", "data.js", "tip.js", "charts.js", "map.js", "search.js", "list.js", "family.js",
    "feature.js", "app.js")
MARK = "dashboard.json"  # says that a directory is a dashboard, and of which index
_META = 'saejax("meta",0,'
_POINTS = 16_384  # of a file of the map


def write_dashboard(index: FeatureIndex, out: str | Path, *, title: str, figures: list[tuple[str, str]] = (),
                    links: list[tuple[str, str]] = (), explanations: Mapping[int, str] = MappingProxyType({}),
                    picture: Picture | None = None, relatives: Relatives | None = None, progress: bool = True) -> Path:
    """Writes the site and returns the path of its `index.html`, which is written last.

    figures: (label, value) of the run for the front page. links: (label, relative address). explanations: {feature: what somebody
    says of it}. picture: of the features, or of a sample of them (`picture.plane`). relatives: of its features in smaller and
    larger dictionaries. Memory: some hundred bytes a feature.
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
    data, lines = out / "data", Lines.of(index, explanations)
    with disk_errors(data):
        shutil.rmtree(data, ignore_errors=True)  # of a dashboard that stood here
    files = FeatureFiles(data, index, lines.ids["tokens"][:, 0], explanations, relatives)
    divided = write_list(data, lines, files.token)
    with Progress("dashboard", index.features, unit="feature", enabled=progress) as bar:
        for first in range(0, index.features, GROUP):
            last = min(first + GROUP, index.features)
            files.write(first, last)
            bar.advance(last - first)
    divided |= files.finish() | {"explained": len(explanations), "map_part": _POINTS,
                                 "points": 0 if picture is None else _write_map(data, picture),
                                 "splitting": relatives.meta() if relatives else None}
    write_value(data / "meta.js", "meta", 0, _meta(index, title, figures, links) | divided)
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
        write_value(meta, "meta", 0, known | {"links": [*known["links"], [label, address]]})


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


def _write_map(data: Path, picture: Picture) -> int:
    """Returns the number of points."""
    places = np.round(picture.places_S2 * 9999).astype(int)
    for number, first in enumerate(range(0, len(places), _POINTS)):
        part = slice(first, first + _POINTS)
        columns = {"feature": picture.features_S[part], "x": places[part, 0], "y": places[part, 1]}
        write_value(numbered(data, "map", number), "map", number, {name: packed(values) for name, values in columns.items()})
    return len(places)


def _write_page(out: Path, title: str) -> Path:
    for name in (*STYLES, *SCRIPTS):
        write_bytes(out / name, source(f"site/{name}").encode())
    page = render("index.html", title=visible(title), styles=STYLES, scripts=SCRIPTS)
    write_bytes(out / "index.html", page.encode())
    return out / "index.html"


def _meta(index: FeatureIndex, title: str, figures, links) -> dict:
    m = index.manifest
    return {"title": visible(title), "version": __version__, "features": index.features, "intervals": INTERVALS,
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
