"""The state of features is a function of the set of rows: against numpy, for every grouping, batch and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.features.index import accumulate, bits
from saejax.features.index import state as st
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from tests.features.reference import assert_equal, random_acts, state_of

CONTEXT, CONTEXTS, F = 8, 4, 5  # of a batch


@functools.partial(jax.jit, donate_argnums=0)
def _add(state, acts_BF, first_row):
    row_B = first_row + jnp.arange(len(acts_BF), dtype=jnp.uint32)
    feature_BF = jnp.where(acts_BF > 0, jnp.arange(F), F)
    pairs = st.Pairs(feature_BF.reshape(-1), acts_BF.reshape(-1), jnp.repeat(row_B, F), jnp.arange(F))
    peaks = st.Peaks.none(F, CONTEXTS).raised(pairs, first_row, CONTEXT)
    return st.topped(st.updated(state, pairs), peaks)


merge = jax.jit(st.merge)


def built(acts_NF: np.ndarray, batches) -> st.FeatureState:
    """The state of these batches of four contexts, in this order."""
    state, rows = st.empty(F), CONTEXT * CONTEXTS
    for b in batches:
        state = _add(state, acts_NF[b * rows:(b + 1) * rows], jnp.uint32(b * rows))
    return state


def data(seed: int, batches: int = 6) -> np.ndarray:
    return random_acts(np.random.default_rng(seed), batches * CONTEXT * CONTEXTS, F)


@pytest.mark.parametrize("density", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_state_equals_the_plain_computation(density):
    acts = random_acts(np.random.default_rng(1), 20 * CONTEXT * CONTEXTS, F, density)
    expected = state_of(acts, CONTEXT)
    assert expected["fired"][-1] == 0 and expected["top_value"][0, -1] > 0, "no free place: the choice is tested"
    assert_equal(built(acts, range(20)), expected)


@settings(deadline=None, max_examples=5)
@given(seed=some.integers(0, 2**16), split=some.lists(some.integers(0, 2), min_size=6, max_size=6),
       order=some.permutations(range(6)))
def test_merge_of_parts_is_the_whole_in_any_order_and_grouping(seed, split, order):
    acts = data(seed)
    a, b, c = (built(acts, [i for i in order if split[i] == part]) for part in range(3))
    expected = state_of(acts, CONTEXT)
    assert_equal(merge(merge(a, b), c), expected)
    assert_equal(merge(a, merge(b, c)), expected)
    assert_equal(merge(merge(c, a), b), expected)


def test_merging_nothing_changes_nothing():
    state = built(data(3), range(6))
    for merged in (merge(state, st.empty(F)), merge(st.empty(F), state)):
        for name in st.FIELDS:
            np.testing.assert_array_equal(getattr(merged, name), getattr(state, name))


@settings(deadline=None, max_examples=50)
@given(some.lists(some.integers(0, 2**32 - 1), min_size=16, max_size=16, unique=True))
def test_smallest_of_two_lists(values):
    a, b = (np.sort(np.array(part, np.uint32)) for part in (values[:8], values[8:]))
    keys, payload = bits.smallest((jnp.asarray(a), jnp.asarray(a >> 1)), (jnp.asarray(b), jnp.asarray(b >> 1)))
    np.testing.assert_array_equal(keys, np.sort(np.array(values, np.uint32))[:8])
    np.testing.assert_array_equal(payload, np.asarray(keys) >> 1)


def test_hashes_are_reversible_and_bins_exact():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32, 1000, dtype=np.uint32)
    np.testing.assert_array_equal(bits.row_of_key(bits.row_key(rows)), rows)
    np.testing.assert_array_equal(bits.row_of_pair_key([7], bits.pair_key(np.array([7]), rows)), rows)
    values = np.exp(rng.normal(0, 20, 1000)).astype(np.float32)
    codes = np.asarray(bits.code(values))
    assert (bits.code_edge(codes) <= values).all() and (values < bits.code_edge(codes + 1)).all()
    ratios = bits.code_edge(np.arange(500, 510) + 1) / bits.code_edge(np.arange(500, 510))
    assert ratios.min() >= 8 / 7 and ratios.max() <= 5 / 4


def sae(mesh, kind: str, d_sae: int = 32, d_in: int = 16) -> SAE:
    """Small integers: products are exact in float32, so that no order of summation shows."""
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.integers(-4, 5, (d_sae, d_in)).astype(np.float32))
    params = SAEParams(W_enc=W, b_enc=jnp.asarray(rng.integers(-30, 3, d_sae).astype(np.float32)), W_dec=W, b_dec=jnp.zeros(d_in))
    return SAE(params, SAEConfig(kind, d_in, d_sae, 8 if kind == "topk" else 0, False, ("h",), "tiny"), mesh)


def accumulated(kind: str, shape: tuple[int, int], contexts: int, monkeypatch) -> tuple[st.FeatureState, dict]:
    """(state, what it must be) of random rows through `make_step` on a mesh, in batches of so many contexts."""
    monkeypatch.setattr(accumulate, "PAIRS_PER_ROW", 3)  # several rounds
    n = shape[0] * shape[1]
    mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[:n])
    model, T, total = sae(mesh, kind), 16, 16
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 4, (total * T, 16)).astype(np.float32)
    keep = rng.random(total * T) > 0.1
    step, state = accumulate.make_step(model, T, contexts), accumulate.empty_state(32, mesh)
    with jax.set_mesh(mesh):
        for start in range(0, total, contexts):
            part = slice(start * T, (start + contexts) * T)
            state = step(state, model.params, sharding.place(x[part], sharding.sharding(mesh, "rows", "d_in")),
                         sharding.place(keep[part], sharding.sharding(mesh, "rows")), jnp.uint32(start * T))
    acts = np.where(keep[:, None], np.asarray(sae(None, kind).encode(x)), 0)
    return jax.tree.map(sharding.to_host, state), state_of(acts, T)


@pytest.mark.parametrize("kind, shape, contexts", [
    ("topk", (2, 4), 4),
    *(pytest.param(kind, shape, n, marks=pytest.mark.slow) for kind in ("topk", "relu")
      for shape, n in (((1, 1), 2), ((1, 1), 16), ((2, 4), 16), ((8, 1), 8), ((1, 8), 16), ((2, 4), 2)))])
def test_neither_batch_nor_mesh_changes_the_state(kind, shape, contexts, monkeypatch):
    found, expected = accumulated(kind, shape, contexts, monkeypatch)
    assert_equal(found, expected)
    assert found.sketch.shape == (32, st.SKETCH) and expected["fired"].max() > st.SKETCH


def test_memory_is_what_the_formula_says():
    state = st.empty(64)
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)) == 64 * st.BYTES_PER_FEATURE == 64 * 1936
