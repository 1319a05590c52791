"""Row-lazy Adam is Adam: row by row in float64, over whole runs, on every mesh; and it costs what the touched rows cost."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from saejax import sharding
from saejax.config import MeshOptions
from saejax.errors import ConfigError
from saejax.sae import SAEParams, SAESpec, losses, row_gradients, sparse, tensors
from saejax.sae.row_gradients import Piece
from saejax.train import lazy, optim
from saejax.train.state import initial_state
from saejax.train.step import make_step
from tests.hlo import moved_shapes

from .synthetic import HOOKPOINT, WIDTHS, OnDemand, make_config, make_store
from .test_step import train

F, D, ROOM = 24, 3, 12
LAZY = {"train__beta1": 0.0, "train__state_bytes": 8, "train__sparse": "always", "sae__d_sae": 512}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("lazy") / "store", contexts=64)


def gradient_of(rng, chosen, good: bool) -> SAEParams:
    """Zero but in the chosen rows."""
    mask = np.isin(np.arange(F), chosen)
    scale = 10.0 ** rng.uniform(-3, 3)
    g = SAEParams(W_enc=mask[:, None] * rng.standard_normal((F, D)), b_enc=mask * rng.standard_normal(F),
                  W_dec=mask[:, None] * rng.standard_normal((F, D)), b_dec=rng.standard_normal(D) if good else np.full(D, np.nan))
    return jax.tree.map(lambda value: jnp.asarray(scale * value), g)


def dense_step(config, params, state, g, lr):
    """The step as it is without lazy rows, over all rows."""
    g = optim.projected(config.sae, g, params)
    norm = optax.tree.norm(g)
    scale = jnp.minimum(1.0, config.train.clip / norm) if config.train.clip else 1.0
    updates, new = optax.scale_by_adam(0.0, config.train.beta2, config.train.eps).update(
        jax.tree.map(lambda value: scale * value, g), state)
    moved = optim.constrained(config.sae, jax.tree.map(lambda p, u: p - lr * u, params, updates))
    return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(norm), a, b), (moved, new), (params, state))


def lazy_step(config, params, opt_state, g, masks, lr):
    """The same with the gradient in compact form, in two pieces."""
    pieces = []
    for mask_F in masks:
        rows = sparse.rows_of(mask_F, ROOM)
        at = {name: tensors(g)[name].at[rows.index_C].get(mode="fill", fill_value=0) for name in ("W_enc", "b_enc", "W_dec")}
        pieces.append(Piece(rows, g.replace(**at), through_encoder=True))
    spec = SAESpec("topk", D, F, k=2, pre_bias=True)
    parts = losses.LossParts(*[jnp.float64(0)] * 5, {}, *[jnp.float64(0)] * 2)
    params, opt_state, _, _, good = lazy._applied(config, spec, params, opt_state, pieces, parts, lr, True)
    return params, opt_state, good


@pytest.mark.parametrize("unit, clip, at_once", [(True, 0.5, 4), (False, 0.0, ROOM)])
def test_lazy_rows_are_dense_adam_in_float64(tmp_path, monkeypatch, unit, clip, at_once):
    """Any rows at any step, in one or several turns, some steps left out for a gradient that is not finite: parameters equal
    those of optax, and so do second moments once they are brought up to date.
    """
    monkeypatch.setattr(row_gradients, "CHUNK", at_once * D)
    config = make_config("topk", tmp_path, **LAZY | {"train__lazy": True, "train__clip": clip, "sae__unit_decoder": unit})
    both = [jax.jit(functools.partial(step, config)) for step in (dense_step, lazy_step)]
    rows_of_a_step = st.lists(st.integers(0, F - 1), max_size=ROOM, unique=True)
    steps = st.lists(st.tuples(rows_of_a_step, st.sampled_from([True, True, True, False])), min_size=1, max_size=12)

    @hypothesis.settings(max_examples=30, deadline=None)
    @hypothesis.given(steps=steps, seed=st.integers(0, 99))
    def check(steps, seed):
        rng, lr = np.random.default_rng(seed), jnp.float64(0.03)
        dense = lazy_ = optim.constrained(config.sae, SAEParams(*(jnp.asarray(rng.standard_normal(shape))
                                                                  for shape in ((F, D), F, (F, D), D))))
        state, opt_state = optax.scale_by_adam(0.0).init(dense), optim.optimizer(config.train).init(dense)
        for chosen, good in steps:
            g = gradient_of(rng, chosen, good)
            dense, state = both[0](dense, state, g, lr)
            masks = [jnp.asarray(np.isin(np.arange(F), part)) for part in (chosen[::2], chosen[1::2])]
            lazy_, opt_state, counted = both[1](lazy_, opt_state, g, masks, lr)
            assert bool(counted) == good
        moments = opt_state[-1]
        assert int(moments.count) == int(state.count) == sum(good for _, good in steps)
        faded = config.train.beta2 ** np.asarray(moments.count - moments.seen_F)
        for name, expected in tensors(dense).items():
            np.testing.assert_allclose(tensors(lazy_)[name], expected, rtol=1e-12, atol=1e-12, err_msg=name)
            v = np.asarray(tensors(moments.second)[name])
            v = v if name == "b_dec" else v * (faded[:, None] if v.ndim == 2 else faded)
            np.testing.assert_allclose(v, tensors(state.nu)[name], rtol=1e-12, err_msg=name)

    with jax.enable_x64(True):
        check()


VARIANTS = {
    "topk": ("topk", {}),
    "many dead": ("topk", {"sae__dead_tokens": 32}),
    "transcoder": ("skip_topk", {}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
}


def config_of(name, path, **overrides):
    kind, extra = VARIANTS[name]
    if kind == "skip_topk":
        kind, extra = "transcoder", {"sae__skip": True}
    return make_config(kind, path, **LAZY | extra | overrides)


@pytest.fixture(scope="module")
def eager(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("eager")
    return OnDemand(lambda name: train(store, config_of(name, path), (1, 1), 30))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name, mesh_shape", [
    ("topk", (1, 1)), ("topk", (2, 4)), pytest.param("topk", (1, 8), marks=SLOW), pytest.param("topk", (8, 1), marks=SLOW),
    *(pytest.param(name, shape, marks=SLOW) for name in ("many dead", "transcoder", "batchtopk", "matryoshka")
      for shape in ((1, 1), (2, 4)))])
def test_a_run_is_that_of_the_dense_step(store, eager, monkeypatch, tmp_path, name, mesh_shape):
    """Loss, norms, counters and parameters over 30 steps, AuxK among them, on the sharded mesh as on one device."""
    if name == "many dead":
        monkeypatch.setattr(losses, "FEW", 2)
    monkeypatch.setattr(row_gradients, "CHUNK", 16 * 48)  # some turns
    expected, expected_history = eager[name]
    got, history = train(store, config_of(name, tmp_path, train__lazy=True), mesh_shape, 30)
    for key, a in tensors(got.params).items():
        b = tensors(expected.params)[key]
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), key
    np.testing.assert_array_equal(got.tokens_since_fired_F, expected.tokens_since_fired_F)
    assert any(line["aux"] > 0 for line in history)
    for mine, theirs in zip(history, expected_history, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    seen = got.opt_state[-1].seen_F
    assert seen.max() == 30 and (seen < 30).any()
