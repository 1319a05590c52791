"""Splitting on pages: an escaped page of trees with links to dashboards, and a card on a feature's page of the dashboard."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import saejax
from saejax.base.errors import FeatureIndexError
from saejax.cli.main import main
from saejax.features.compare import splitting_file
from saejax.features.compare.splitting import Dictionary, split
from saejax.features.index.reader import FeatureIndex
from saejax.formats import saelens
from saejax.pages import data_files
from saejax.pages.dashboard import place_of, write_dashboard
from saejax.pages.dashboard_relatives import Relatives
from saejax.pages.splitting import addresses, write_splitting
from saejax.sae.inference import SAE
from tests.features.conftest import DEAD, FEATURES
from tests.pages.test_dashboard import HOSTILE, browser  # noqa: F401
from tests.pages.test_dashboard_files import features_of, parsed

SMALL, LARGE = 8, 96  # the small one has features 0 to 7 of the index, the large one two of each and others


def sized(sae, rows):
    """The same SAE with these rows."""
    W = jnp.asarray(rows, jnp.float32)
    params = dataclasses.replace(sae.params, W_enc=W, W_dec=W, b_enc=jnp.zeros(len(rows)))
    return SAE(params, dataclasses.replace(sae.cfg, d_sae=len(rows)), sae.mesh)


@pytest.fixture(scope="module")
def saes(sae):
    rows, rng = np.asarray(sae.params.W_dec), np.random.default_rng(3)
    noise = 0.02 * rng.standard_normal((2, *rows.shape))
    others = np.ones((LARGE - 2 * FEATURES, 1)) * -rows.sum(0) + 0.01 * rng.standard_normal((LARGE - 2 * FEATURES, rows.shape[1]))
    return [sized(sae, rows[:SMALL]), sae, sized(sae, np.concatenate([rows + noise[0], rows + noise[1], others]))]


@pytest.fixture(scope="module")
def hostile_index(index):
    found = FeatureIndex.open(index.path)
    found.__dict__["vocabulary"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(index.vocabulary))]
    return found


@pytest.fixture(scope="module")
def found(saes, hostile_index):
    names = [HOSTILE[1], "runs/<i>middle</i>", "large"]
    return split([Dictionary(name, one, hostile_index if one is saes[1] else None)
                  for name, one in zip(names, saes, strict=True)], progress=False)


def test_the_page_is_text(found, tmp_path):
    page = write_splitting(found, tmp_path / "splitting.html", [5]).read_text()
    assert "<script" not in page and "<img src=x" not in page and "&lt;i&gt;middle" in page and "default-src 'none'" in page
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in page and "\u202e" not in page and "\x00" not in page
    trees = page.split("<article>")[1:]
    assert len(trees) == 7, "the seven whose middle child fires; the one asked for first"
    assert re.findall(r"<b>(\d+)</b>", trees[0]) == ["5", "5", *map(str, sorted((5, 5 + FEATURES), key=lambda f: -(
        found.levels[2].cosine_F[f])))]
    assert page.count("data:image/svg+xml") == 4 and "has no index" in page
    with pytest.raises(FeatureIndexError, match="has features 0 to 7"):
        write_splitting(found, tmp_path / "splitting.html", [8])


def test_a_dashboard_knows_the_relatives(found, saes, index, hostile_index, tmp_path):
    relatives = Relatives.of_index(found, hostile_index, ["../small/index.html#feature=", None, None])
    site = write_dashboard(hostile_index, tmp_path / "site", title="x", relatives=relatives, progress=False)
    data = site.parent / "data"
    for file in data.rglob("*.js"):
        raw = file.read_bytes()
        assert raw.isascii() and b"<" not in raw and b"\\u202e" not in raw and len(raw) <= data_files.LARGEST
    meta = parsed(data / "meta.js")["splitting"]
    assert meta["own"] == 1 and meta["sizes"] == [SMALL, FEATURES, LARGE] and meta["addresses"][0].startswith("../small/")
    for f in features_of(data):
        feature = f["id"]
        if feature in DEAD:
            assert "family" not in f, "it fired on nothing, so it is left out"
            continue
        lines = [line[:2] for line in f["family"]]
        children = sorted((feature, feature + FEATURES), key=lambda c: -found.levels[2].cosine_F[c])
        assert lines == [[0, feature]] * (feature < SMALL) + [[1, feature]] + [[2, child] for child in children]
        mine = next(line for line in f["family"] if line[0] == 1)
        assert [f["texts"][w] for w in mine[4:]] == found.fires_on(1, feature)
    plain = write_dashboard(index, tmp_path / "plain", title="x", progress=False).parent / "data"
    assert parsed(plain / "meta.js")["splitting"] is None and not any("family" in f for f in features_of(plain))
    with pytest.raises(FeatureIndexError, match="is none of those that were split"):
        Relatives.of_index(split([Dictionary("a", saes[0]), Dictionary("b", saes[2])], progress=False), index, [None] * 2)


def test_other_dashboards_are_linked_where_they_are(found, index, tmp_path):
    site = place_of(index.path)
    assert addresses(found, tmp_path / "page.html") == [None, None, None]
    write_dashboard(index, site, title="x", progress=False)
    try:
        page = site.parent / "splitting" / "splitting.html"
        assert addresses(found, page) == [None, "../dashboard/index.html#feature=", None]
        assert 'href="../dashboard/index.html#feature=3"' in write_splitting(found, page).read_text()
        other = dataclasses.replace(found.levels[1], fingerprint="0" * 64)
        gone = dataclasses.replace(found.levels[0], index=tmp_path / "none")
        assert addresses(dataclasses.replace(found, levels=(gone, other)), page) == [None, None]
    finally:
        (site / "index.html").unlink()


@pytest.fixture(scope="module")
def saved(saes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    for name, one in zip(("small", "middle", "large"), saes, strict=True):
        saelens.write(folder / name, one)
    return [str(folder / name) for name in ("small", "middle", "large")]


def test_by_the_command(saved, index, tmp_path, capsys):
    assert main(["split", *saved[::-1], f"--out={tmp_path / 'out'}", "--features=3"]) == 0
    said = capsys.readouterr().out
    assert "8 to 40" in said and "not known" in said and "--splitting=" in said
    assert main(["split", *saved, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [level["features"] for level in said["levels"]] == [SMALL, FEATURES, LARGE]
    assert said["steps"][0]["one"] == 1 and said["steps"][1]["several"] == 1 and said["steps"][0]["new"] == 32 / 40
    file = tmp_path / "out" / splitting_file.FILE
    assert main(["dashboard", str(index.path), f"--splitting={file}", f"--out={tmp_path / 'site'}"]) == 0
    assert parsed(tmp_path / "site" / "data" / "meta.js")["splitting"]["own"] == 1
    assert main(["split", saved[0], saved[2], f"--out={tmp_path / 'other'}"]) == 0
    capsys.readouterr()
    for arguments, message in (
            (["dashboard", str(index.path), f"--splitting={tmp_path / 'other' / splitting_file.FILE}", f"--out={tmp_path / 'a'}"],
             "is none of those that were split"),
            (["dashboard", str(index.path), f"--splitting={tmp_path / 'none'}", f"--out={tmp_path / 'a'}"], "no readable"),
            (["split", saved[0]], "give two or more"), (["split", saved[0], saved[0]], "both have 8 features"),
            (["split", *saved, "--features=1"], "--features has no effect without --out=DIR")):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err


def test_from_python_with_indexes(saved, index):
    subjects = [saejax.open(saved[0]), saejax.open(saved[1], index=index.path)]
    found = saejax.split(*subjects)
    assert found.levels[1].known and (~found.levels[1].fired_F).sum() == len(DEAD)
    assert found.fires_on(1, 3) and found.shares(0)["none"] == 1 / SMALL, "feature 7 is dead in the larger one"


@pytest.mark.browser
def test_a_feature_among_its_relatives(browser, found, hostile_index, tmp_path):  # noqa: F811
    small = tmp_path / "small" / "index.html"
    small.parent.mkdir()
    small.write_text("<title>small</title>")
    relatives = Relatives.of_index(found, hostile_index, ["../small/index.html#feature=", None, None])
    browser.size(390, 844)
    site = write_dashboard(hostile_index, tmp_path / "site", title="x", relatives=relatives, progress=False)
    browser.open(site, "#feature=5")
    browser.wait("document.querySelectorAll('#family .kin').length === 4")
    assert browser.js("document.querySelector('#family a').getAttribute('href')") == "../small/index.html#feature=5"
    assert browser.js("document.querySelector('#family .mine b').textContent") == "5"
    depths = browser.js("[...document.querySelectorAll('#family .kin')].map(k => k.style.getPropertyValue('--depth'))")
    assert depths == ["0", "1", "2", "2"]
    assert browser.js("window.hacked === undefined && document.querySelectorAll('img').length === 0")
    assert browser.js("document.documentElement.scrollWidth") <= 390
    browser.open(site, f"#feature={DEAD[0]}")
    browser.wait("!!document.querySelector('#dead-notice')")
    assert browser.js("document.querySelector('#family') === null") and browser.troubles() == []


