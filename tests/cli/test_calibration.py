"""`saejax release --jumprelu`: a topk run with one threshold, measured on rows of its store."""

import dataclasses
import json

import numpy as np
import pytest

import saejax
from saejax.base import sharding
from saejax.base.errors import StoreError
from saejax.base.records import MeshOptions, RunPaths
from saejax.cli.jobs import release as release_job
from saejax.cli.main import main
from saejax.data.store import Store
from saejax.formats.release import release, with_one_threshold
from saejax.train import loop
from saejax.train.checkpoint import read_meta
from tests.train.synthetic import HOOKPOINT, make_config, make_store

K, ROWS = 4, 2048  # of 3,584: a few hundred would be off by the bound below one time in three


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    store = make_store(path / "store", contexts=512)
    loop.train(make_config("topk", path, harvest__store=str(path / "store"), train__tokens=32 * 60), store)
    return path


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(release_job, "CALIBRATION_ROWS", ROWS)


def rows_of(run) -> np.ndarray:
    return release_job.rows_ahead(saejax.open(run))


def step_of(run):
    return saejax.open(run).step_dir


def l0(sae, rows) -> float:
    return float((np.asarray(sae.encode(rows.astype(np.float32))) > 0).sum(1).mean())


def test_as_many_features_fire(run, tmp_path):
    assert main(["release", str(run), "--jumprelu", f"--out={tmp_path / 'sae'}"]) == 0
    sae, rows, store = saejax.load(tmp_path / "sae"), rows_of(run), Store.open(run / "store")
    assert (sae.cfg.kind, saejax.load(run).cfg.kind, len(rows)) == ("jumprelu", "topk", ROWS)
    assert l0(sae, rows) == pytest.approx(K, abs=1 / ROWS)
    every = store.read(HOOKPOINT, 0, store.rows)[store.keep(0, store.rows)]
    assert l0(sae, every) == pytest.approx(K, rel=0.03) and l0(sae, every) != l0(sae, rows)
    found = sae.cfg.metadata["calibration"]
    assert found["rows"] == ROWS and found["k"] == K and found["l0"] == pytest.approx(K, abs=1 / ROWS)
    assert "measured on 2,048 rows, on which 4 features fire per row (k = 4)" in (tmp_path / "sae" / "README.md").read_text()


def test_the_threshold_is_in_units_of_the_normalised_data(run, tmp_path):
    """One number for all features before the scale of the data and the decoder's norms are folded."""
    sae, rows = saejax.load(release(with_one_threshold(step_of(run), None, rows_of(run)), tmp_path / "sae")), rows_of(run)
    scale = sae.cfg.metadata["training"]["scales"][0]
    threshold = np.asarray(sae.params.per_feature["threshold"])
    np.testing.assert_allclose(threshold * scale, sae.cfg.metadata["calibration"]["threshold"], rtol=1e-5)  # unit decoder rows
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    split = saejax.load(release(with_one_threshold(step_of(run), mesh, rows), tmp_path / "split"))
    np.testing.assert_allclose(np.asarray(split.params.per_feature["threshold"]), threshold, rtol=1e-6)


def test_rows_are_those_that_come_next(run, tmp_path):
    """In the run's order behind the step; the first ones of another store."""
    subject = saejax.open(run)
    config, place = subject.config, read_meta(subject.step_dir).counters.stream
    assert place.lanes != ((0, 0, 0),) * len(place.lanes)
    with loop.Stream(Store.open(run / "store"), config.sae.hookpoints, 32, config.stream, place) as stream:
        np.testing.assert_array_equal(release_job.rows_ahead(subject)[:32], next(stream))
    make_store(tmp_path / "other", contexts=16, seed=1)
    other = dataclasses.replace(config, harvest=dataclasses.replace(config.harvest, store=str(tmp_path / "other")))
    subject.config = other
    assert release_job.rows_ahead(subject).shape == (16 * 7, 16), "all that it has"
    with pytest.raises(StoreError, match="config.lm.model is 'gpt2'"):
        subject.config = dataclasses.replace(other, lm=dataclasses.replace(config.lm, model="gpt2"))
        release_job.rows_ahead(subject)


def test_without_a_store_one_line_says_what_to_do(run, tmp_path, capsys):
    (run / "store").rename(run / "moved")
    try:
        assert main(["release", str(run), "--jumprelu", f"--out={tmp_path / 'sae'}"]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and "no complete store" in said and "--config.harvest.store=DIR" in said
        assert main(["release", str(run), f"--out={tmp_path / 'sae'}"]) == 0, "topk as it is needs no rows"
    finally:
        (run / "moved").rename(run / "store")


def test_other_kinds_need_no_rows(run, tmp_path):
    loop.train(make_config("batchtopk", tmp_path / "batch"), make_store(tmp_path / "batch" / "store"))
    assert main(["release", str(tmp_path / "batch"), "--jumprelu"]) == 0
    cfg = json.loads((RunPaths(tmp_path / "batch").release / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and "calibration" not in cfg["metadata"]["saejax"]


def test_kinds_without_a_threshold_have_none_to_measure(tmp_path, capsys):
    loop.train(make_config("relu", tmp_path / "relu"), make_store(tmp_path / "relu" / "store"))
    assert main(["release", str(tmp_path / "relu"), "--jumprelu"]) == 2
    assert "--jumprelu has no effect on a relu SAE" in capsys.readouterr().err
