"""The tables of an index: whose neighbours they have, what is saved of them in parts, sums made for many features at once."""

import dataclasses

import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError
from saejax.features.compare import picture
from saejax.features.index import bits, examples, neighbours, tables
from saejax.features.index import state as st
from saejax.features.index.build import PROGRESS, BuildOptions, build
from saejax.features.index.reader import MANIFEST
from tests.features.conftest import DEAD, FEATURES
from tests.features.reference import random_acts, state_of

QUIET = BuildOptions(rows=512, progress=False)


def test_a_sample_has_neighbours_where_they_are_those_of_all(index, sae, words, lm_, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "UP_TO", FEATURES - 1)
    monkeypatch.setattr(neighbours, "SAMPLED", 9)
    sampled = build(tmp_path / "sample", sae, words, lm_, QUIET)
    assert sampled.manifest["settings"]["neighbours"] == "sample" and index.manifest["settings"]["neighbours"] == "all"
    has = [row["feature"] for row in sampled.rows(0, FEATURES) if row["cosine_ids"]]
    assert len(has) == 9 and not set(has) & set(DEAD)
    for row, whole in zip(sampled.rows(0, FEATURES), index.rows(0, FEATURES), strict=True):
        if row["feature"] in has:
            assert row == whole
        assert {name: row[name] for name in row if "cosine" not in name} == {n: whole[n] for n in row if "cosine" not in n}
        assert sampled[row["feature"]].neighbours == list(zip(row["cosine_ids"], row["cosine_scores"], strict=True))
    without = next(f for f in range(FEATURES) if f not in has)
    sampled.near = lambda feature: [(feature, 1.0)]
    assert sampled[without].neighbours == [(without, 1.0)] and len(sampled[has[0]].neighbours) == tables.NEAR
    with pytest.raises(FeatureIndexError, match="neighbours of all features.*neighbours=all"):
        picture.plane(sampled)


def test_an_index_of_other_neighbours_is_refused(index, sae, words, lm_, tmp_path):
    none = dataclasses.replace(QUIET, neighbours="none")
    assert not any(build(tmp_path / "none", sae, words, lm_, none).lists("cosine_ids"))
    with pytest.raises(FeatureIndexError, match="built with neighbours=all"):
        build(index.path, sae, words, lm_, none)
    with pytest.raises(FeatureIndexError, match="choose auto, all, sample, none"):
        build(tmp_path / "x", sae, words, lm_, dataclasses.replace(QUIET, neighbours="some"))
    assert build(index.path, sae, words, lm_, QUIET).manifest == index.manifest


def test_the_sample_is_spread_and_of_features_that_fire():
    fired = np.arange(100_000) % 3
    found = np.flatnonzero(neighbours.chosen("sample", fired))
    assert len(found) == neighbours.SAMPLED and fired[found].all()
    assert np.ptp(np.histogram(found, 10, (0, 100_000))[0]) < 300
    assert neighbours.chosen("all", fired).all() and not neighbours.chosen("none", fired).any()
    assert [neighbours.resolved("auto", n) for n in (131_072, 131_073)] == ["all", "sample"]


def test_interrupted_tables_go_on_at_the_last_part(index, sae, words, lm_, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PART", 16)
    monkeypatch.setattr(tables, "GROUP", 16)
    whole, made = build(tmp_path / "whole", sae, words, lm_, QUIET), []
    logits = tables._logits

    def stopping(lm_, sae, first, last):
        made.append(first)
        if made == [0, 16, 32]:
            raise KeyboardInterrupt
        return logits(lm_, sae, first, last)

    monkeypatch.setattr(tables, "_logits", stopping)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "parts", sae, words, lm_, QUIET)
    folder = tmp_path / "parts" / PROGRESS / "features_all"
    assert sorted(f.name for f in folder.iterdir()) == ["00000.parquet", "00001.parquet"] and not (tmp_path / MANIFEST).exists()
    made.clear()
    kept = (folder / "00001.parquet").read_bytes()
    (folder / "00001.parquet").write_bytes(b"x")
    with pytest.raises(FeatureIndexError, match="00001.parquet: not readable.*delete it"):
        build(tmp_path / "parts", sae, words, lm_, QUIET)
    (folder / "00001.parquet").write_bytes(kept)
    assert build(tmp_path / "parts", sae, words, lm_, QUIET).manifest == whole.manifest, "digests of all files among it"
    assert made == [32] and not (tmp_path / "parts" / PROGRESS).exists()


def test_sums_of_many_features_are_those_of_each():
    """Counts of intervals against `np.interp`, tokens against a sum of each feature's own samples."""
    acts = random_acts(np.random.default_rng(3), 2048, 20)
    state = st.FeatureState(**{name: value for name, value in state_of(acts, 16).items()})
    tokens = np.random.default_rng(4).integers(0, 40, 2048)
    found = examples.interval_counts(state)
    count_F, ids, shares, means = examples.top_tokens(state, tokens)
    begin = np.concatenate([[0], np.cumsum(count_F)])
    for f in range(19):
        top = np.float64(state.max[f])
        edges = np.minimum(np.arange(65) / 64 * 2.0 ** (np.floor(np.log2(top)) + 1), top)
        n = int(np.searchsorted(edges, top)) + 1
        whole = np.concatenate([[0], np.cumsum(state.lin_hist[f].astype(np.float64))])
        np.testing.assert_array_equal(found[f], np.diff(np.interp(top * np.arange(11) / 10, edges[:n], whole[:n])))
        there = state.sample_value[f] > 0
        bin_, slot = np.nonzero(there)
        token = tokens[bits.row_of_pair_key(np.full(len(bin_), f), state.sample_key[f, bin_, slot])]
        weight = (examples.bin_counts(state)[f] / np.maximum(there.sum(1), 1))[bin_]
        mass = np.bincount(token, weight * state.sample_value[f, bin_, slot].astype(np.float64), 40)
        best = np.lexsort((np.arange(40), -mass))[:10]
        part = slice(begin[f], begin[f + 1])
        np.testing.assert_array_equal(ids[part], best)
        np.testing.assert_allclose(shares[part], mass[best] / mass.sum(), rtol=1e-12)
        np.testing.assert_allclose(means[part], mass[best] / np.bincount(token, weight, 40)[best], rtol=1e-12)
    assert not found[19].any() and count_F[19] == 0, "the last is dead"


def by_hand(sketch, fired, rows: int, a: int) -> list[tuple[float, int, int]]:
    """(-phi, feature, shared rows) of the features that fire with one, of each pair by itself."""
    out = []
    for b in (b for b in range(len(sketch)) if b != a):
        shared = len(set(sketch[a]) & set(sketch[b]) - {int(bits.EMPTY)})
        rare, bound = (a if sketch[a, -1] >= sketch[b, -1] else b), min(sketch[a, -1], sketch[b, -1])
        usable = ((sketch[rare] <= bound) & (sketch[rare] != bits.EMPTY)).sum()
        n_a, n_b, both = float(fired[a]), float(fired[b]), min(shared / max(usable, 1), 1.0) * float(fired[rare])
        spread = np.sqrt(n_a * (rows - n_a) * n_b * (rows - n_b))
        phi = (both * rows - n_a * n_b) / spread if spread else 0.0
        if shared >= neighbours.LEAST_SUPPORT and phi > 0:
            out.append((-phi, b, shared))
    return sorted(out)


def test_those_that_fire_together_are_those_of_every_pair():
    rng, rows = np.random.default_rng(0), 4096
    of_group = rng.random((rows, 6)) < np.geomspace(0.004, 0.2, 6)  # of some features all rows are sampled
    acts = (np.repeat(of_group, 4, axis=1) & (rng.random((rows, 24)) < 0.7)).astype(np.float32)
    acts[:, [5, 23]] = 0
    fields = state_of(acts, 16)
    full = fields["sketch"][:, -1] != bits.EMPTY
    together = neighbours.Coactivation(fields["sketch"], fields["fired"], rows)
    for first, last, n in ((0, 24, 40), (5, 17, 2), (23, 24, 3)):
        count_F, ids, phis, shared = together.of(first, last, n)
        expected = [by_hand(fields["sketch"], fields["fired"], rows, f)[:n] for f in range(first, last)]
        np.testing.assert_array_equal(count_F, [len(found) for found in expected])
        np.testing.assert_array_equal(ids, [b for found in expected for _, b, _ in found])
        np.testing.assert_array_equal(phis, [min(-phi, 1.0) for found in expected for phi, _, _ in found])
        np.testing.assert_array_equal(shared, [both for found in expected for _, _, both in found])
        assert len(ids) > 2 * (last - first - 4) and full.any() and not full.all()
    none = neighbours.Coactivation(np.full((4, st.SKETCH), bits.EMPTY), np.zeros(4, np.uint32), rows).of(0, 4, 5)
    assert [len(x) for x in none] == [4, 0, 0, 0] and not none[0].any()
