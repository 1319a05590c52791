"""The page of a study of concepts: of two dictionaries whose thresholds are known, with names that try to be more than text."""

import json
import math

import numpy as np
import pytest

from saejax.base.errors import ConceptError
from saejax.base.records import Dedicated
from saejax.pages.concepts import write_concepts
from saejax.scaling.concepts.counting import Counts
from saejax.scaling.concepts.lists import Concept
from saejax.scaling.concepts.study import Dictionary, Measured, Study

TOKENS, C = 10**8, 300
HOSTILE = "=<script>alert(1)</script>$x"


def word(i: int) -> str:
    return f"w{chr(97 + i // 26)}{chr(97 + i % 26)}"


def dictionary(label: str, features: int, alive: int, frequency_C: np.ndarray, **evaluation) -> Dictionary:
    """Half of the concepts of frequency 0.6 / alive are present. The first concept is in no sample."""
    rng = np.random.default_rng(features)
    present_C = rng.random(C) < 1 / (1 + np.exp(-2 * (np.log(frequency_C) - math.log(0.6 / alive))))
    sampled_C = np.full(C, 64)
    present_C[0], sampled_C[0] = False, 0
    scores = [np.where(sampled_C > 0, value, np.nan) for value in (0.9, 0.8, 0.85)]
    found = Dedicated(tuple(map(word, range(C))), sampled_C, np.where(sampled_C > 0, 5, -1), *scores, present_C)
    return Dictionary(label, features, 10**9, Measured(found, alive, 10**6), **evaluation)


def study(*evaluations: dict) -> Study:
    occurrences_C = np.geomspace(20, 10**5, C).astype(np.int64)
    occurrences_C[-1] = 0
    counts = Counts(tuple(Concept("<i>nouns", (word(i),)) for i in range(C)), occurrences_C, TOKENS)
    how = {"precision": 0.5, "recall": 0.5, "level": 0.25, "per_concept": 64, "random": 8192, "contexts": None, "context": 128}
    frequency_C = np.maximum(occurrences_C, 1) / TOKENS
    sizes = ((HOSTILE, 20_000, 16_000), ("large", 200_000, 120_000))
    return Study(counts, tuple(dictionary(*size, frequency_C, **more)
                               for size, more in zip(sizes, evaluations, strict=True)), how)


def test_curves_collapse_and_names_stay_text(tmp_path):
    found = study({}, {})
    page = write_concepts(tmp_path, found).read_text()
    assert found.curves.f50_alive == pytest.approx(0.6, rel=0.4) and found.curves.p > 0.01
    assert f"frequency x alive = {found.curves.f50_alive:.3g} (" in page and "Here: one curve for 2 sizes" in page
    assert "<script" not in page and "&lt;script&gt;" in page and "<i>" not in page
    assert f"The text does not have: {word(C - 1)}. Left" in page and f"In no context that was looked at: {word(0)}. Left" in page
    assert {file.name for file in tmp_path.iterdir()} == {"concepts.html", "concepts.csv", "concepts.json"} | {
        f"{name}.{kind}" for name in ("frequency", "frequency_x_alive", "half", "dead") for kind in ("svg", "png")}
    assert (tmp_path / "concepts.csv").read_text().splitlines()[1].startswith("'=<script>")
    assert json.loads((tmp_path / "concepts.json").read_text())["curves"]["f50_alive"] == found.curves.f50_alive


def test_alive_features_are_counted_in_one_way_for_all():
    """By the evaluations where these have equally many tokens, else in the sample."""
    alike, unlike, one = (study({"dead_fraction": 0.2, "dead_tokens": 1000}, more) for more in (
        {"dead_fraction": 0.5, "dead_tokens": 1000}, {"dead_fraction": 0.5, "dead_tokens": 2000}, {}))
    assert [size.alive for size in alike.sizes] == [16_000, 100_000]
    assert [size.alive for size in unlike.sizes] == [size.alive for size in one.sizes] == [16_000, 120_000]


def test_what_is_kept_reads_back():
    measured = study({}, {}).dictionaries[0].measured
    again = Measured.from_json(json.loads(json.dumps(measured.to_json())))
    assert again.found.names == measured.found.names and (again.fired, again.tokens) == (16_000, 10**6)
    for name in ("sampled_C", "feature_C", "precision_C", "recall_C", "f1_C", "present_C"):
        a, b = getattr(measured.found, name), getattr(again.found, name)
        assert np.array_equal(a, b, equal_nan=name.endswith(("n_C", "l_C", "1_C"))) and a.dtype.kind == b.dtype.kind
    values = measured.to_json()
    del values["found"]["f1_C"][3]
    with pytest.raises(ConceptError, match="columns of different lengths"):
        Measured.from_json(values)
