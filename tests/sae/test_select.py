"""Selection per row and over a whole batch is exact on every mesh, under ties too, and cheap in what it moves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.sae import select, select_batch
from saejax.sae.activations import batchtopk, topk
from saejax.sae.select import UpTo, sent, topk_mask
from saejax.sae.select_batch import batch_topk_mask
from tests.hlo import moved_shapes, widest_sort

MESHES = [(1, 8), (8, 1), (2, 4), (4, 2)]


def first_of_each_row(pre: np.ndarray, k: int) -> np.ndarray:
    """The k first in a stable sort of each row."""
    mask = np.zeros(pre.shape, bool)
    np.put_along_axis(mask, np.argsort(-pre, axis=1, kind="stable")[:, :k], True, axis=1)
    return mask


def first_of_all(pre: np.ndarray, k: int) -> np.ndarray:
    """The B x k first in a stable sort of all entries, positive ones only."""
    mask = np.zeros(pre.size, bool)
    mask[np.argsort(-pre.ravel(), kind="stable")[: len(pre) * k]] = True
    return mask.reshape(pre.shape) & (pre > 0)


@dataclass(frozen=True)
class Selection:
    """A mask, what it must equal, the activation made of it, and what may move: elements, given local rows, shards and k."""

    mask: Callable
    reference: Callable
    activation: Callable
    most_moved: Callable

    def on(self, mesh_shape, pre: np.ndarray, k: int) -> np.ndarray:
        mesh = sharding.make_mesh(MeshOptions(*mesh_shape))
        with jax.set_mesh(mesh):
            return np.asarray(jax.jit(self.mask, static_argnums=1)(
                sharding.place(pre, sharding.sharding(mesh, "rows", "features")), k))


SELECTIONS = {
    "per row": Selection(topk_mask, first_of_each_row, topk, lambda rows, shards, k: rows * shards * k),
    "over the batch": Selection(batch_topk_mask, first_of_all, batchtopk,
                                lambda rows, shards, k: rows * shards),  # ties: one count per row and shard
}


@pytest.fixture(params=SELECTIONS)
def selection(request):
    return SELECTIONS[request.param]


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("levels, on_one_shard", [(10**6, False), (3, False), (10**6, True)])
def test_one_program_keeps_any_number_up_to_the_most(selection, mesh_shape, levels, on_one_shard):
    rng = np.random.default_rng(0)
    pre = rng.integers(-levels // 3, levels, (16, 64)).astype(np.float32)
    if on_one_shard:  # more winners than the candidates that are sent
        pre[:, :8] += 2 * levels
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda pre, now: selection.mask(pre, UpTo(12, now)))
        placed = sharding.place(pre, sharding.sharding(mesh, "rows", "features"))
        for now in (12, 11, 5, 1):
            np.testing.assert_array_equal(np.asarray(program(placed, np.int32(now))), selection.reference(pre, now))
    assert program._cache_size() == 1


@pytest.mark.parametrize("sizes", [*sorted(set(select.GROUPS.values())), ()])
@pytest.mark.parametrize("shape, k", [((5, 8192), 9), ((3, 1000), 7), ((4, 4099), 64), ((2, 70_001), 32), ((3, 6), 9)])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), levels=st.sampled_from([1, 3, 50, 10**6]),
       special=st.sampled_from(["", "nan", "-inf", "-0", "+-0"]))
def test_largest_by_levels_is_a_stable_sort(sizes, shape, k, seed, levels, special):
    """With the groups of every platform, where they do not divide the width, and where less than k is above -inf."""
    rng = np.random.default_rng(seed)
    values = (rng.integers(-levels, levels + 1, shape) / levels).astype(np.float32)
    values[:, rng.integers(0, shape[1], shape[1] // 2)] = {"-inf": -np.inf, "-0": -0.0}.get(special, 0.5)
    if special == "-inf":
        values[:, 4:] = -np.inf
    elif special == "+-0":
        values = np.copysign(np.float32(0), values)
    expected = values.copy()
    if special == "nan":
        at = rng.integers(0, shape[1], 3)
        values[:, at], expected[:, at] = -np.float32(np.nan), np.inf
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    found, index = (np.asarray(value) for value in jax.jit(
        lambda values: select.largest(values, k, sizes))(values))
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(found, np.take_along_axis(expected, order, axis=1))


@pytest.mark.parametrize("value", [np.nan, -np.nan])
def test_a_row_with_nan_begins_infinite(value):
    values = np.random.default_rng(0).standard_normal((4, 5000)).astype(np.float32)
    values[1, 4321], values[2, :10] = value, -np.inf
    found, _ = (np.asarray(part) for part in jax.jit(lambda values: select.largest(values, 8))(values))
    assert found[1, 0] == np.inf and np.isfinite(found[[0, 2, 3]]).all() and np.isfinite(found[1, 1:]).all()


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("name", SELECTIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.sampled_from([1, 3, 8, 20]), levels=st.sampled_from([1, 2, 5, 10**6]),
       shift=st.sampled_from([-0.7, 0.0, 3.0]))
def test_mask_equals_stable_sort(name, mesh_shape, seed, k, levels, shift):
    rng = np.random.default_rng(seed)
    pre = (rng.integers(-levels, levels + 1, (16, 32)) / levels + shift).astype(np.float32)
    pre[:, :7] += rng.integers(0, 2) * 3  # winners crowd on few shards
    pre[: rng.integers(0, 5)] += 2        # and in few rows
    np.testing.assert_array_equal(SELECTIONS[name].on(mesh_shape, pre, k), SELECTIONS[name].reference(pre, k))


@pytest.mark.parametrize("values", ["spread", "crowded in one row", "tied", "tied at the end", "few above -inf"])
def test_fewer_candidates_than_k_are_sent_and_no_winner_is_lost(values):
    """What a shard holds beyond what it sends counts all the same: then all candidates are sent."""
    k, rows, features = 32, 16, 512
    assert sent(k, rows, 8, features // 8) < k // 2
    pre = np.random.default_rng(0).standard_normal((rows, features)).astype(np.float32)
    if values == "crowded in one row":
        pre[5, 64:96] += 10
    elif values == "tied":
        pre = np.round(pre)
    elif values == "tied at the end":  # the threshold equals what the second shard does not send
        pre[3, :] = -1
        pre[3, :20], pre[3, 64:128], pre[3, 300] = 3, 1, 2
    elif values == "few above -inf":
        pre[:, 40:] = -np.inf
    np.testing.assert_array_equal(SELECTIONS["per row"].on((1, 8), pre, k), first_of_each_row(pre, k))


@pytest.mark.parametrize("shape", [(128, 96), (9, 33)])
@pytest.mark.parametrize("values", ["normal", "few", "huge", "tiny", "tied", "sorted"])
def test_without_a_mesh(selection, values, shape):
    pre = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    pre = {"normal": pre, "few": pre - 2.5, "huge": pre * 1e37, "tiny": pre * 1e-30, "tied": np.round(pre),
           "sorted": np.sort(pre.ravel()).reshape(pre.shape)}[values]  # sorted: the rows sampled for hints mislead
    np.testing.assert_array_equal(np.asarray(jax.jit(selection.mask, static_argnums=1)(pre, 5)), selection.reference(pre, 5))


@pytest.mark.parametrize("rows", [4, 40])
def test_as_many_as_asked_for_when_everything_ties(selection, rows):
    pre = np.ones((rows, 64), np.float32)
    acts = np.asarray(selection.activation(pre, 7))
    np.testing.assert_array_equal(acts, selection.reference(pre, 7))
    assert acts.sum() == rows * 7
    assert (np.asarray(selection.activation(-pre, 7)) == 0).all()


@pytest.mark.parametrize("mesh_shape", [None, (2, 4)])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_what_is_not_finite_is_kept(selection, value, mesh_shape):
    """So that a step sees it and is left out; -inf is never kept by itself."""
    pre = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    pre[3, 300], pre[4:6] = value, -np.inf
    mask = selection.on(mesh_shape, pre, 4) if mesh_shape else np.asarray(jax.jit(selection.mask, static_argnums=1)(pre, 4))
    assert mask[3, 300]
    acts = np.where(mask, np.maximum(pre, 0), 0)
    assert not np.isfinite(acts[3]).all() and (acts[4:6] == 0).all()


@pytest.mark.parametrize("mesh_shape", [None, (1, 8), (2, 4)])
def test_nan_behind_all_candidates_is_kept(mesh_shape):
    """One candidate only, and it lies before the NaN."""
    pre = np.random.default_rng(0).standard_normal((16, 4096)).astype(np.float32)
    pre[2, -3] = np.nan
    for name, selection in SELECTIONS.items():
        mask = selection.on(mesh_shape, pre, 1) if mesh_shape else np.asarray(jax.jit(selection.mask, static_argnums=1)(pre, 1))
        assert mask[2, -3], name


@pytest.mark.parametrize("rows, each, expected", [(140_000, 40_000, 2**31 - 1), (70_000, 30_000, 2_100_000_000), (9, 7, 63)])
def test_counts_of_many_rows(rows, each, expected):
    assert int(jax.jit(select_batch.total)(np.full((1, rows), each, np.int32))[0]) == expected


def test_rows_that_keep_many_times_k(selection):
    """More of them, and more in them, than there are candidates: all entries are counted then."""
    pre = np.random.default_rng(0).standard_normal((32, 4096)).astype(np.float32)
    pre[:11] += 5
    for mesh_shape in ((1, 8), (4, 2)):
        np.testing.assert_array_equal(selection.on(mesh_shape, pre, 8), selection.reference(pre, 8))


def test_too_many_for_the_counts_is_refused():
    with pytest.raises(ValueError, match="does not fit 32-bit counts"):
        jax.eval_shape(lambda x: batch_topk_mask(x, 2**15), jax.ShapeDtypeStruct((2**16, 2**16), np.float32))


def test_no_sort_and_nothing_wide_in_the_program(selection):
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    pre = jax.ShapeDtypeStruct((64, 4096), np.float32, sharding=sharding.sharding(mesh, "rows", "features"))
    with jax.set_mesh(mesh):
        hlo = jax.jit(selection.mask, static_argnums=1).lower(pre, 8).compile().as_text()
    assert widest_sort(hlo) <= 4 * 8 < 1024, "the chosen groups only"
    moved = moved_shapes(hlo)
    assert moved and max(map(math.prod, moved)) <= selection.most_moved(32, 4, 8)
