"""The data files of the site: bounded, divided as the page expects, and what they hold is what the index has."""

import base64
import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from saejax.base.errors import FeatureIndexError
from saejax.base.text import LONGEST, script_json, visible
from saejax.pages import dashboard_features, dashboard_list, data_files
from saejax.pages.dashboard import write_dashboard
from saejax.pages.dashboard_list import Lines
from tests.features.conftest import DEAD, FEATURES


def parsed(file):
    """What a data file hands to the page."""
    match = re.fullmatch(r'saejax\("(\w+)",(\d+),(.*)\);\n', file.read_bytes().decode("ascii"), re.DOTALL)
    return json.loads(match[3])


def unpacked(values) -> np.ndarray:
    """The numbers of a typed array of the page."""
    kind = {"Float32Array": "<f4", "Uint16Array": "<u2", "Uint32Array": "<u4"}[values[0]]
    return np.frombuffer(base64.b64decode(values[1]), kind)


def column(data, name: str) -> np.ndarray:
    """Numbers of the list, from all their files."""
    return np.concatenate([unpacked(parsed(file)) for file in sorted((data / name).iterdir())])


def texts(data, name: str) -> list:
    """`words` or `said` of the list, from all their files."""
    return sum((parsed(file) for file in sorted((data / name).iterdir())), [])


def words_of(data, name: str) -> list[list[str]]:
    """The words of `tokens` or `logits` of each feature."""
    words = texts(data, "words")
    return [[words[w] for w in row if w] for row in column(data, name).reshape(-1, dashboard_list.SHOWN)]


def examples_of(data) -> list[list[list[str]]]:
    """The texts of the examples of each feature."""
    return [[[f["texts"][w] for w in example[5]] for example in f.get("examples", [])] for f in features_of(data)]


def features_of(data) -> list[dict]:
    """Everything about each feature, with `texts`: the words that it names by number; found as the page finds it."""
    meta, out = parsed(data / "meta.js"), []
    for feature in range(meta["features"]):
        folder = np.searchsorted(meta["folders"], feature, "right") - 1
        place = data / "features" / f"{folder:04d}"
        firsts = parsed(place / "firsts.js")
        within = np.searchsorted(firsts, feature, "right") - 1
        file = parsed(place / f"{folder * meta['per_folder'] + within:06d}.js")
        out.append(file[feature - firsts[within]] | {"texts": [word for f in file for word in f["words"]]})
    return out


def test_data_are_those_of_the_index(index, site):
    data = site.parent / "data"
    for name in ("density", "max", "mean"):
        np.testing.assert_array_equal(column(data, name), index.column(name).astype(np.float32))
    for name, listed in (("tokens", "token_ids"), ("logits", "logit_ids")):
        assert words_of(data, name) == [[visible(index.token(t)) for t in ids[:4]] for ids in index.lists(listed)]
    features = features_of(data)
    assert [f["id"] for f in features] == list(range(FEATURES)) and features[3]["fired"] == index.column("fired")[3]
    example, stored = features[3]["examples"][0], index.examples(3)[0]
    assert example[1] == pytest.approx(stored["value"], rel=1e-3)
    assert example[2:5] == [stored[name] for name in ("context", "position", "start")]
    tokens = index.tokens_NT[stored["context"], stored["start"]:stored["start"] + index.window]
    assert [features[3]["texts"][w] for w in example[5]] == [visible(index.vocabulary[t]) for t in tokens]
    acts = dict(zip(example[6][::2], example[6][1::2], strict=True))
    np.testing.assert_allclose([acts.get(i, 0) for i in range(index.window)], stored["acts"], rtol=1e-3)
    assert not features[DEAD[0]].keys() & {"examples", "linear", "tokens", "firing"}  # what the page of a silent one shows not


def test_files_are_few_and_small(index, site, tmp_path, monkeypatch):
    """Bounded, full but for the last, and together they say what one large file says; a feature that is too large is alone."""
    sizes = [len(json.dumps(feature)) for feature in parsed(site.parent / "data" / "features" / "0000" / "000000.js")]
    monkeypatch.setattr(data_files, "LARGEST", int(np.median(sizes)) * 4)
    monkeypatch.setattr(dashboard_features, "FILES_PER_FOLDER", 4)
    monkeypatch.setattr(dashboard_list, "PART", 16)
    data = write_dashboard(index, tmp_path / "site", title="x", progress=False).parent / "data"
    assert all(file.stat().st_size <= data_files.LARGEST for file in data.rglob("*.js"))
    folders = [sorted(folder.glob("0*.js")) for folder in sorted((data / "features").iterdir())]
    assert len(folders) > 1 and {len(files) for files in folders[:-1]} == {4} and len(list((data / "tokens").iterdir())) == 3
    whole = site.parent / "data"
    assert examples_of(data) == examples_of(whole) and words_of(data, "logits") == words_of(whole, "logits")
    monkeypatch.setattr(data_files, "LARGEST", min(sizes) // 2)
    alone = write_dashboard(index, tmp_path / "site", title="x", progress=False).parent / "data" / "features"
    assert [len(parsed(file)) for file in alone.rglob("0*.js")] == [1] * FEATURES, "and nothing is left of the site before"


MILLION = 2**20


def many_lines(features: int, tokens: int = 49_152) -> Lines:
    """Lines of as many features, drawn; every tenth is dead and every hundredth has an explanation."""
    rng = np.random.default_rng(0)
    numbers = {name: rng.random(features, np.float32) for name in dashboard_list.NUMBERS}
    numbers["density"][::10] = 0
    ids = {name: rng.integers(0, tokens, (features, dashboard_list.SHOWN), np.int32) for name in ("tokens", "logits")}
    ids["tokens"][::10] = -1
    return Lines(numbers, ids, {feature: f"about {feature} things" for feature in range(1, features, 100)})


def test_the_list_of_a_million_features(tmp_path):
    """Its files are small, say what they were given, and the page is told where each begins."""
    lines = many_lines(MILLION)
    began = time.monotonic()
    divided = dashboard_list.write_list(tmp_path, lines, lambda token: f" token {token}")
    files = [*tmp_path.rglob("*.js")]
    print(f"written: {time.monotonic() - began:.1f} s, {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
    assert max(file.stat().st_size for file in files) <= data_files.LARGEST
    assert sum(file.stat().st_size for file in files) < 50 * MILLION
    np.testing.assert_array_equal(column(tmp_path, "max"), lines.numbers["max"])
    words = texts(tmp_path, "words")
    assert words[0] == "" and len(set(words)) == len(words) == 49_153, "a word once"
    for name, ids in lines.ids.items():
        shown = column(tmp_path, name).reshape(ids.shape)
        assert np.array_equal(np.array([-1, *(int(word.split()[1]) for word in words[1:])])[shown], ids), name
    assert [feature for feature, _ in texts(tmp_path, "said")] == list(range(1, MILLION, 100))
    for name in ("words", "said"):
        first = [parsed(file)[0] for file in sorted((tmp_path / name).iterdir())]
        assert len(first) == len(divided[name])
        assert divided[name] == ([words.index(word) for word in first] if name == "words" else [feature for feature, _ in first])


def test_an_explanation_of_no_feature_is_refused(index, tmp_path):
    with pytest.raises(FeatureIndexError, match=f"feature {FEATURES}"):
        write_dashboard(index, tmp_path / "site", title="x", explanations={FEATURES: "?"}, progress=False)


def test_another_directory_is_left_alone(index, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FeatureIndexError, match="is not empty"):
        write_dashboard(index, tmp_path, title="x", progress=False)


@given(some.text())
def test_visible_text_hides_and_moves_nothing(text):
    import unicodedata
    shown = visible(text)
    kinds = {unicodedata.category(c) for c in shown}
    assert not kinds & {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"} and len(shown) <= 11 * LONGEST + 1


@pytest.mark.parametrize("text, shown", [
    ("a\nb\tc", "a\u21b5b\u21e5c"), ("\x00", "\u2400"), ("\u202eabc", "\u2039U+202E\u203aabc"), ("\u200b", "\u2039U+200B\u203a"),
    ("\xa0", "\u2039U+00A0\u203a"), (" plain \u65e5\u672c", " plain \u65e5\u672c"), ("\ufffd", "\ufffd"),
    ("\u0301", "\u25cc\u0301"), ("x" * 1000, "x" * LONGEST + "\u2026"), ("\ud800", "\u2039U+D800\u203a")])
def test_what_is_seen_of_a_token(text, shown):
    assert visible(text) == shown


@given(some.text())
def test_json_in_a_script_is_ascii_without_markup(text):
    data = script_json([text, {text: 1}])
    assert data.isascii() and not set("<>&\n") & set(data) and json.loads(data) == [text, {text: 1}]
    assert "\\u2028" in script_json("\u2028")
