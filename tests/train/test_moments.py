"""Adam's moments in fewer bytes: what is kept, equal to optax's Adam or unbiased around it, and back from a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saejax.base import sharding
from saejax.base.errors import CheckpointError
from saejax.base.fingerprints import fingerprints
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams, SAESpec, losses
from saejax.sae.params import param_shardings
from saejax.train import loop, moments, rows
from saejax.train.step_cost import bytes_per_parameter

from .synthetic import WIDTHS, make_config, make_store

F, D = 32, 6


def params_of(rng, n: int = F) -> SAEParams:
    return SAEParams(*(rng.standard_normal(shape).astype(np.float32) for shape in ((n, D), n, (n, D), D)))


def dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.ndim == 2}


@pytest.mark.parametrize("optimizer, state_bytes, kept", [
    ("adam", 12, {"float32"}), ("second", 8, {"float32"}), ("lazy", 8, {"float32"}), ("adam_bf16", 8, {"bfloat16"}),
    ("second_bf16", 6, {"bfloat16"}), ("lazy_bf16", 6, {"bfloat16"})])
def test_the_state_has_the_bytes_that_were_asked_for(tmp_path, optimizer, state_bytes, kept):
    config = make_config("topk", tmp_path, train__optimizer=optimizer, sae__d_sae=1024)
    state = moments.initial(config.train, params_of(np.random.default_rng(0)))
    assert dtypes(state) == kept and (state.first is None) == ("adam" not in optimizer)
    assert (state.seen_F is None) == ("lazy" not in optimizer) and config.train.state_bytes == state_bytes
    spec = dataclasses.replace(SAESpec.from_options(config.sae, WIDTHS), d_in=512)
    assert bytes_per_parameter(config, spec) == pytest.approx(state_bytes, rel=0.02)  # vectors and counters are not halved


@pytest.mark.parametrize("block", [D * 5, 2**18])
@pytest.mark.parametrize("clip", [None, 3.0])
@pytest.mark.parametrize("optimizer, tolerance", [("adam", 1e-5), ("second", 1e-5), ("adam_bf16", 2e-2)])
def test_the_pass_over_all_rows_is_optax_adam(tmp_path, monkeypatch, optimizer, tolerance, clip, block):
    """Blocks of rows, also where they do not divide them; with two moments in bfloat16 updates lie within its rounding."""
    monkeypatch.setattr(rows, "BLOCK", {"cpu": block})
    config = make_config("relu", tmp_path, train__optimizer=optimizer, train__clip=clip, train__eps=1e-8)
    rng = np.random.default_rng(0)
    start, spec = params_of(rng), SAESpec("relu", D, F)
    adam = optax.scale_by_adam(config.train.beta1, config.train.beta2, 1e-8)
    theirs = optax.chain(optax.clip_by_global_norm(clip or np.inf), adam)
    parts = losses.LossParts(*[jnp.float32(0)] * 4, jnp.zeros(F, bool), {}, jnp.float32(0))

    @jax.jit
    def step(params, state, gradient):
        of_all = rows.Gradient(gradient, gradient)
        found = rows.applied(rows.Step(config, spec, None, jnp.float32(1), True), params, state, of_all, parts)
        return found.params, found.opt_state

    params, state, expected = start, moments.initial(config.train, start), theirs.init(start)
    for _ in range(20):
        gradient = params_of(rng)
        before, (params, state) = params, step(params, state, gradient)
        updates, expected = theirs.update(gradient, expected)
        for old, new, update in zip(*map(jax.tree.leaves, (before, params, updates)), strict=True):
            assert np.linalg.norm(old - new - update) <= tolerance * np.linalg.norm(update)


def test_stochastic_rounding_is_unbiased_and_a_moment_does_not_stand_still():
    value = jnp.full((64, 64), 1.0 + 1 / 512, jnp.float32)  # a quarter of the way from 1 to the next bfloat16
    draws = np.stack([np.asarray(moments.rounded(value, jnp.bfloat16, jnp.int32(t), 0), np.float32) for t in range(64)])
    assert set(np.unique(draws)) == {1.0, 1.0 + 1 / 128}
    up = draws > 1
    deviation = (0.25 * 0.75) ** 0.5
    assert abs(up.mean() - 0.25) < 5 * deviation / up.size**0.5
    for axis in (0, (1, 2), (0, 1), (0, 2)):  # no step, row, column or element that always goes one way
        means = up.mean(axis)
        assert np.abs(means - 0.25).max() < 6 * deviation / (up.size / means.size) ** 0.5
    assert np.array_equal(moments.rounded(jnp.full((2, 3), -1.5), jnp.bfloat16, jnp.int32(3), 1), np.full((2, 3), -1.5))

    v = jnp.ones((64, 64), jnp.bfloat16)  # with gradients of 0 it should fall by 0.999 a step: no step by itself is representable
    for t in range(200):
        v = moments.rounded(0.999 * v.astype(jnp.float32), jnp.bfloat16, jnp.int32(t), 0)
    assert float(v.astype(jnp.float32).mean()) == pytest.approx(0.999**200, rel=2e-3)


def test_rounding_is_the_same_on_every_mesh():
    value = np.random.default_rng(0).standard_normal((F, D)).astype(np.float32)
    expected = moments.rounded(jnp.asarray(value), jnp.bfloat16, jnp.int32(7), 2)
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    with jax.set_mesh(mesh):
        placed = sharding.place(value, param_shardings(mesh, ["W_enc", "b_enc", "W_dec", "b_dec"]).W_enc)
        got = jax.jit(lambda v: moments.rounded(v, jnp.bfloat16, jnp.int32(7), 2))(placed)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("moments") / "store")


@pytest.mark.parametrize("optimizer", ["lazy_bf16", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("second_bf16", "adam_bf16"))])
def test_resumed_from_a_checkpoint_it_ends_in_the_same_bits(store, tmp_path, monkeypatch, optimizer):
    options = {"train__optimizer": optimizer, "sae__aux_k": 0}
    straight = loop.train(make_config("topk", tmp_path / "straight", **options), store)
    assert dtypes(straight.state.opt_state) == {"bfloat16"}
    config = make_config("topk", tmp_path / "run", **options)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Preemption, "requested", lambda self, step: step == 23)
        with pytest.raises(loop.Preempted):
            loop.train(config, store)
    assert fingerprints(loop.train(config, store).state) == fingerprints(straight.state)
    with pytest.raises(CheckpointError, match=rf"train.optimizer: '?{optimizer}'? -> '?second\b"):
        loop.train(make_config("topk", tmp_path / "run", **options | {"train__optimizer": "second"}), store)
