"""The selection over a whole batch is exact on every mesh, under ties too, and moves nothing but counts."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax import sharding
from saejax.config import MeshOptions
from saejax.sae.activations import batchtopk
from saejax.sae.select_batch import batch_topk_mask

MESHES = [(1, 8), (8, 1), (2, 4)]


def reference(pre: np.ndarray, k: int) -> np.ndarray:
    """The B x k first in a stable sort of all entries, positive ones only."""
    mask = np.zeros(pre.size, bool)
    mask[np.argsort(-pre.ravel(), kind="stable")[: len(pre) * k]] = True
    return mask.reshape(pre.shape) & (pre > 0)


def run(mesh_shape, pre: np.ndarray, k: int) -> np.ndarray:
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape))
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(batch_topk_mask, static_argnums=1)(
            sharding.place(pre, sharding.sharding(mesh, "rows", "features")), k))


@pytest.mark.parametrize("mesh_shape", MESHES)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.sampled_from([1, 3, 20]), levels=st.sampled_from([1, 2, 5, 10**6]),
       shift=st.sampled_from([-0.7, 0.0, 3.0]))
def test_mask_equals_stable_sort(mesh_shape, seed, k, levels, shift):
    rng = np.random.default_rng(seed)
    pre = (rng.integers(-levels, levels + 1, (16, 32)) / levels + shift).astype(np.float32)
    pre[: rng.integers(0, 5)] += 2  # winners crowd in few rows
    np.testing.assert_array_equal(run(mesh_shape, pre, k), reference(pre, k))


@pytest.mark.parametrize("values", ["normal", "few", "huge", "tiny", "tied", "sorted"])
def test_without_a_mesh_and_with_hints(values):
    rng = np.random.default_rng(0)
    pre = rng.standard_normal((128, 96)).astype(np.float32)
    pre = {"normal": pre, "few": pre - 2.5, "huge": pre * 1e37, "tiny": pre * 1e-30, "tied": np.round(pre),
           "sorted": np.sort(pre.ravel()).reshape(pre.shape)}[values]  # sorted: the sampled rows mislead
    np.testing.assert_array_equal(np.asarray(jax.jit(batch_topk_mask, static_argnums=1)(pre, 5)), reference(pre, 5))


def test_all_equal():
    acts = np.asarray(batchtopk(np.ones((40, 64), np.float32), 7))
    assert (acts > 0).sum() == 280 and (acts.ravel()[:280] == 1).all()
    assert (np.asarray(batchtopk(-np.ones((4, 64), np.float32), 7)) == 0).all()


def test_too_many_for_the_counts_is_refused():
    with pytest.raises(ValueError, match="does not fit 32-bit counts"):
        jax.eval_shape(lambda x: batch_topk_mask(x, 2**15), jax.ShapeDtypeStruct((2**16, 2**16), np.float32))


def test_no_sort_and_only_counts_in_the_program():
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    pre = jax.ShapeDtypeStruct((64, 4096), np.float32, sharding=sharding.sharding(mesh, "rows", "features"))
    with jax.set_mesh(mesh):
        hlo = jax.jit(batch_topk_mask, static_argnums=1).lower(pre, 8).compile().as_text()
    assert " sort(" not in hlo
    moved = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? (?:all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", hlo)
    assert moved
    assert max(np.prod([int(n) for n in shape.split(",") if n]) for shape in moved) <= 32 * 4  # ties: one count per row and shard
