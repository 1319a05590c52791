"""Dictionaries of growing size with known parents: who comes from whom, who is new, who is left out; their file."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.records import MeshOptions
from saejax.features.compare import splitting, splitting_file
from saejax.features.compare.splitting import Dictionary, Line, split
from saejax.features.index.reader import sae_fingerprint
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig

D = 64
PARENTS = {  # of the middle one in the small one, of the large one in the middle one; -1: new
    1: [0, 0, 0, 1, 2, 2, -1, -1, *range(3, 7), -1, 7, 0, -1],
    2: [0, 0, 1, 3, 6, 6, 6, -1, 0, -1, *range(4, 6), *range(8, 12), -1, 13, -1, -1, -1, -1, *([0] * 10)]}
DEAD = {0: [7], 1: [14], 2: [31]}  # feature 13 of the middle one is a copy of the dead 7, the dead 14 and 31 of 0


def sae_of(W_dec, mesh=None, hookpoint="blocks.1.hook_resid_post") -> SAE:
    W, D_out = jnp.asarray(W_dec), W_dec.shape[1]
    params = SAEParams(W_enc=W, b_enc=jnp.zeros(len(W)), W_dec=W, b_dec=jnp.zeros(D_out))
    if mesh is not None:
        params = dataclasses.replace(params, W_dec=sharding.place(np.asarray(W_dec), sharding.sharding(mesh, "features", None)))
    return SAE(params, SAEConfig("topk", D_out, len(W), 4, False, (hookpoint,), "tiny"), mesh)


def index_of(sae, dead, path="runs/x/features"):
    """What a splitting asks of an index."""
    F = sae.cfg.d_sae
    fired_F, ids_FN = np.ones(F, np.int64), np.stack([np.arange(F), np.full(F, F), *[np.full(F, -1)] * 2], axis=1)
    fired_F[dead], ids_FN[dead] = 0, -1
    return SimpleNamespace(manifest={"sae": {"fingerprint": sae_fingerprint(sae)}}, path=Path(path), token=lambda t: f" <{t}>",
                           column={"fired": fired_F}.__getitem__, heads=lambda name, n: ids_FN[:, :n])


def directions() -> list[np.ndarray]:
    """Unit rows of each size: those of the parents and a little noise, nearer for the first children; others for new ones."""
    rng = np.random.default_rng(0)
    found = [np.linalg.qr(rng.standard_normal((D, D)))[0][:8]]
    for parents in PARENTS.values():
        rows = [found[-1][p] + (0.2 + 0.005 * i) * noise / np.linalg.norm(noise) if p >= 0 else noise / np.linalg.norm(noise)
                for i, (p, noise) in enumerate(zip(parents, rng.standard_normal((len(parents), D)), strict=True))]
        found.append(np.stack(rows) / np.linalg.norm(rows, axis=1, keepdims=True))
    return [x.astype(np.float32) for x in found]


def dictionaries(mesh=None, *, indexed=True) -> list[Dictionary]:
    saes = [sae_of(W, mesh) for W in directions()]
    return [Dictionary(f"<b>{sae.cfg.d_sae}</b>", sae, index_of(sae, DEAD[level]) if indexed else None)
            for level, sae in enumerate(saes)]


@pytest.fixture(scope="module")
def found():
    return split(dictionaries(), progress=False)


def expected(level: int) -> np.ndarray:
    """The parents that count: not of dead ones, nor dead ones."""
    parents = np.array(PARENTS[level])
    parents[np.isin(parents, DEAD[level - 1])] = -1
    parents[DEAD[level]] = -1
    return parents


@pytest.mark.parametrize("sizes", [None, (1, 8), (2, 4)])
def test_children_go_to_their_parents(sizes, monkeypatch):
    monkeypatch.setattr(splitting, "_BLOCK", 3)
    mesh = None if sizes is None else sharding.make_mesh(MeshOptions(*sizes))
    found = split(dictionaries(mesh)[::-1], progress=False)
    rows = directions()
    assert [level.features for level in found.levels] == [8, 16, 32], "in the order of their sizes"
    for number, level in enumerate(found.levels[1:], start=1):
        np.testing.assert_array_equal(np.where(level.cosine_F >= 0.7, level.parent_F, -1), expected(number))
        alive = level.fired_F
        cosines = rows[number] @ rows[number - 1].T
        cosines[:, DEAD[number - 1]] = -1
        np.testing.assert_allclose(level.cosine_F[alive], cosines.max(1)[alive], atol=1e-6)
        assert (level.parent_F[~alive] == -1).all() and np.isnan(level.cosine_F[~alive]).all()


def test_figures_of_a_step(found):
    said = found.shares(0)
    assert said["histogram"] == {"0": 0, "1": 5, "2": 1, "3": 1, "4-7": 0, "8+": 0}, "of the seven that count"
    assert said["children"] == 10 / 7 and (said["none"], said["one"], said["several"]) == (0, 5 / 7, 2 / 7)
    assert said["new"] == pytest.approx(5 / 15) and 0.9 < said["cosine"] < 1
    said = found.shares(1)
    assert said["histogram"]["8+"] == 1 and said["histogram"]["3"] == 1 and sum(said["histogram"].values()) == 15
    assert said["new"] == pytest.approx((expected(2)[:31] < 0).mean())
    assert json.loads(json.dumps(said)) == said and "new in each: 33.3 %" in repr(found)


def test_without_an_index_dead_ones_count():
    found = split(dictionaries(indexed=False), progress=False)
    assert found.levels[1].parent_F[13] == 7 and found.levels[1].parent_F[14] == 0 and not found.levels[1].known
    assert found.fires_on(1, 3) == [] and found.shares(0)["histogram"]["4-7"] == 1


def test_trees_go_down_all_sizes(found, monkeypatch):
    tree = found.tree(0, 0)
    assert [line[:2] for line in tree if line.level < 2] == [(0, 0), (1, 0), (1, 1), (1, 2)], "the nearest child first"
    assert tree[0].cosine is None and tree[1].cosine == pytest.approx(float(found.levels[1].cosine_F[0]))
    place = [line[:2] for line in tree].index((1, 1))
    assert tree[place + 1][:2] == (2, 2) and found.children(2, 2) == []
    assert found.descendants[0][0] == 3 + 12 + 1 and found.roots(2) == [0, 2] and len(found.roots(99)) == 7
    assert [line.feature for line in found.family(2, 2)] == [0, 1, 2] and found.family(2, 2)[0].more == 2
    assert [line[:2] for line in found.family(2, 4)] == [(1, 6), (2, 4)], "up to one that is new"
    assert found.has_relatives(1, 6) and not found.has_relatives(2, 7) and not found.has_relatives(1, 14)
    assert set(found.new(1, 99)) == {6, 7, 12, 13, 15} and len(found.new(1, 2)) == 2
    monkeypatch.setattr(splitting, "WIDE", 2)
    assert found.tree(0, 0)[0] == Line(0, 0, None, 1) and len(found.tree(0, 0)) == 1 + 2 + 2 + 1
    monkeypatch.setattr(splitting, "MOST", 4)
    small = found.tree(0, 0)
    assert len(small) == 4 and sum(line.more for line in small) == 1 + 11 + 1 and small[-1].level == 1


def test_it_is_read_as_it_was_written(found, tmp_path):
    file = tmp_path / "out" / "splitting.parquet"
    splitting_file.write(found, file)
    read = splitting_file.read(file)
    for a, b in zip(found.levels, read.levels, strict=True):
        assert (a.name, a.fingerprint, a.known) == (b.name, b.fingerprint, b.known) and b.index.resolve() == a.index.resolve()
        for name in ("fired_F", "parent_F", "cosine_F"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert read.fires_on(1, 3) == found.fires_on(1, 3) == [" <3>", " <16>"] and read.fires_on(0, 7) == []
    assert read.family(2, 2) == found.family(2, 2) and read.shares(1) == found.shares(1)
    table = pq.read_table(file).to_pandas()
    assert len(table) == 8 + 16 + 32 and list(table.columns) == ["level", "feature", "fired", "parent", "cosine", "fires_on"]


@pytest.mark.parametrize("damage, message", [
    (lambda t, a: (t.slice(0, 50), a), "no readable splitting"),
    (lambda t, a: (t, a | {"kind": "x"}), "is not the splitting.parquet"),
    (lambda t, a: (t, a | {"schema_version": 2}), "schema version 2"),
    (lambda t, a: (t, {"kind": a["kind"]}), "schema version None"),
    (lambda t, a: (t.set_column(3, "parent", pa.array([99] * 56, pa.int32())), a), "a parent in level 0"),
    (lambda t, a: (t, a | {"levels": 3}), "no readable splitting"),
    (lambda t, a: (t.drop_columns(["cosine"]), a), "no readable")])
def test_other_files_are_refused(found, tmp_path, damage, message):
    file = tmp_path / "splitting.parquet"
    splitting_file.write(found, file)
    table = pq.read_table(file)
    table, about = damage(table, json.loads(table.schema.metadata[b"saejax"]))
    pq.write_table(table.replace_schema_metadata({"saejax": json.dumps(about)}), file)
    with pytest.raises(FeatureIndexError, match=message) as error:
        splitting_file.read(file)
    assert "\n" not in str(error.value)


def test_no_file_and_no_parquet(tmp_path):
    (tmp_path / "text").write_text("hello")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    for name, message in (("none", "no readable splitting"), ("text", "no readable splitting"), ("other.parquet", "is not the")):
        with pytest.raises(FeatureIndexError, match=message):
            splitting_file.read(tmp_path / name)


def test_what_cannot_be_split():
    small, middle, large = dictionaries(indexed=False)
    narrow = Dictionary("narrow", sae_of(np.eye(20, 24, dtype=np.float32)))
    elsewhere = Dictionary("elsewhere", sae_of(directions()[1], hookpoint="blocks.0.hook_resid_post"))
    silent = Dictionary("silent", middle.sae, index_of(middle.sae, list(range(16))))
    for given, least, message in (
            ([small], 0.7, "give two or more"), ([], 0.7, "give two or more"),
            ([small, middle, middle], 0.7, "both have 16 features"), ([small, narrow], 0.7, "24 wide"),
            ([elsewhere, large], 0.7, "blocks.0.hook_resid_post"),
            ([small, silent], 0.7, "silent: none of its features fired"), ([small, middle], 1.5, "least=1.5")):
        with pytest.raises(FeatureIndexError, match=message) as error:
            split(given, least=least, progress=False)
        assert "\n" not in str(error.value)
