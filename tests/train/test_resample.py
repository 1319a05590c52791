"""Resampling replaces dead features, only those, by what the paper says; the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import ActivationStats, MeshOptions
from saejax.config import ResampleOptions
from saejax.sae import SAESpec, tensors
from saejax.sae.params import initial_per_feature
from saejax.train.resample import draw, due, resample
from saejax.train.state import initial_state
from saejax.train.step import make_step

from .synthetic import D_IN, WIDTHS, kinds, make_config


def batches(n, rows=32, seed=5):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((rows, D_IN)) * rng.uniform(0.1, 3, (rows, 1))).astype(np.float32) for _ in range(n)]


def prepared(kind, mesh_shape, tmp_path, **changes):
    """A state after a few real steps, with every third feature declared dead."""
    config = make_config(kind, tmp_path, **changes)
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    spec = SAESpec.from_options(config.sae, WIDTHS)
    x = np.concatenate(batches(4))
    stats = ActivationStats(len(x), x.mean(0), float(np.linalg.norm(x, axis=1).mean()), float(np.square(x).sum(1).mean()), 1.0)
    state = initial_state(config, spec, [stats], x, mesh)
    rest = sharding.sharding(mesh, "rows_at_rest", None)
    with jax.set_mesh(mesh):
        step = make_step(config, spec, 20)
        for b in batches(6):
            state, _ = step(state, sharding.place(b, rest))
    since = np.where(np.arange(64) % 3 == 0, 1000, 0).astype(np.uint32)
    state = state.replace(tokens_since_fired_F=sharding.place(since, sharding.sharding(mesh, "features")))
    return config, spec, mesh, state, rest


def run(kind, mesh_shape, tmp_path, pool, **changes):
    config, spec, mesh, state, rest = prepared(kind, mesh_shape, tmp_path, **changes)
    before = jax.device_get(state)
    with jax.set_mesh(mesh):
        state, n = resample(config, spec, state, [(sharding.place(b, rest) for b in pool) for _ in range(2)], occasion=0)
    return before, jax.device_get(state), n


@pytest.mark.parametrize("kind", kinds("relu", "topk", "gated", "jumprelu"))
def test_dead_rows_become_inputs_and_nothing_else_changes(kind, tmp_path):
    pool = batches(5, seed=9)
    before, after, n = run(kind, (2, 4), tmp_path, pool)
    dead = np.arange(64) % 3 == 0
    assert n == dead.sum()
    for name, value in tensors(after.params).items():
        if name != "b_dec":
            np.testing.assert_array_equal(value[~dead], tensors(before.params)[name][~dead])
    for name, value in initial_per_feature(SAESpec.from_options(make_config(kind, tmp_path).sae, WIDTHS)).items():
        assert (before.params.per_feature[name][dead] != np.float32(value)).any(), "training had changed it"
        np.testing.assert_array_equal(after.params.per_feature[name][dead], np.float32(value))
    np.testing.assert_array_equal(after.params.b_dec, before.params.b_dec)
    inputs = np.concatenate(pool) * before.normalization.scale - before.params.b_dec
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    W_dec, W_enc = after.params.W_dec[dead], after.params.W_enc[dead]
    alive_enc = np.linalg.norm(before.params.W_enc[~dead], axis=1).mean()
    alive_dec = np.linalg.norm(before.params.W_dec[~dead], axis=1).mean()
    unit = make_config(kind, tmp_path).sae.unit_decoder
    np.testing.assert_allclose(np.linalg.norm(W_dec, axis=1), 1.0 if unit else alive_dec, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(W_enc, axis=1), 0.2 * alive_enc, rtol=1e-5)
    direction = W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)
    assert (np.abs(direction @ inputs.T).max(1) > 1 - 1e-5).all(), "each new row is the direction of a pool input"
    np.testing.assert_allclose(W_enc / np.linalg.norm(W_enc, axis=1, keepdims=True), direction, atol=1e-5)
    assert (after.params.b_enc[dead] == 0).all() and (after.tokens_since_fired_F[dead] == 0).all()


@pytest.mark.parametrize("kind", kinds("relu", "topk"))
def test_adam_forgets_exactly_the_changed_rows(kind, tmp_path):
    before, after, _ = run(kind, (1, 1), tmp_path, batches(3))
    dead = np.arange(64) % 3 == 0
    adam_before, adam = before.opt_state, after.opt_state
    assert (adam.first is None) == (kind in ("gated", "jumprelu", "matryoshka_jumprelu")), "kinds whose recipe keeps none"
    kept = [(adam.second, adam_before.second)] + ([] if adam.first is None else [(adam.first, adam_before.first)])
    for moments, old in kept:
        for name in tensors(moments).keys() - {"b_dec"}:
            assert (tensors(moments)[name][dead] == 0).all()
            np.testing.assert_array_equal(tensors(moments)[name][~dead], tensors(old)[name][~dead])
        np.testing.assert_array_equal(moments.b_dec, old.b_dec)
    assert adam.count == adam_before.count


def test_the_mean_of_a_replaced_row_starts_anew(tmp_path):
    before, after, _ = run("topk", (1, 1), tmp_path, batches(3), train__ema=0.9)
    dead = np.arange(64) % 3 == 0
    for name in ("W_enc", "b_enc", "W_dec"):
        mean, old = tensors(after.ema)[name], tensors(before.ema)[name]
        np.testing.assert_array_equal(mean[dead], tensors(after.params)[name][dead])
        np.testing.assert_array_equal(mean[~dead], old[~dead])
    np.testing.assert_array_equal(after.ema.b_dec, before.ema.b_dec)


@pytest.mark.parametrize("kind", kinds("relu", "topk"))
def test_the_mesh_does_not_matter(kind, tmp_path):
    pool = batches(5, seed=9)
    _, one, _ = run(kind, (1, 1), tmp_path, pool)
    for shape in ((1, 8), (4, 2)):
        _, many, _ = run(kind, shape, tmp_path, pool)
        np.testing.assert_allclose(many.params.W_dec, one.params.W_dec, atol=2e-5)
        np.testing.assert_allclose(many.params.W_enc, one.params.W_enc, atol=2e-5)


def test_nothing_dead_nothing_done(tmp_path):
    config, spec, mesh, state, _ = prepared("topk", (1, 1), tmp_path)
    state = state.replace(tokens_since_fired_F=jnp.zeros_like(state.tokens_since_fired_F))
    with jax.set_mesh(mesh):
        after, n = resample(config, spec, state, [iter(()), iter(())], occasion=0)
    assert n == 0 and after is state


def test_draw_follows_squared_loss():
    losses = np.array([0.0, 1.0, 2.0, 0.0, 3.0], np.float32)
    drawn = draw(losses, 140_000, (0, 1))
    frequency = np.bincount(drawn, minlength=5) / len(drawn)
    np.testing.assert_allclose(frequency, losses**2 / (losses**2).sum(), atol=0.005)
    assert not {0, 3} & set(drawn)
    np.testing.assert_array_equal(drawn, draw(losses, 140_000, (0, 1)))
    assert (draw(losses, 50, (0, 2)) != drawn[:50]).any()


def test_due_at_multiples_in_the_first_half():
    options = ResampleOptions(every_tokens=100)
    steps = range(0, 512, 32)
    assert [t + 32 for t in steps if due(options, t, t + 32, 512)] == [128, 224]
    assert [t + 32 for t in steps if due(options, t, t + 32, 800)] == [128, 224, 320, 416], "the middle is the last"
    assert due(options, 0, 300, 600), "a batch that spans several marks"
    assert not any(due(ResampleOptions(), t, t + 32, 512) for t in steps)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_dictionary_without_any_alive_feature_recovers(kind, tmp_path):
    config, spec, mesh, state, rest = prepared(kind, (1, 1), tmp_path)
    since = np.full(64, 1000, np.uint32)
    state = state.replace(tokens_since_fired_F=sharding.place(since, state.tokens_since_fired_F.sharding))
    with jax.set_mesh(mesh):
        state, n = resample(config, spec, state, [(sharding.place(b, rest) for b in batches(3)) for _ in range(2)], occasion=0)
        assert n == 64 and (np.linalg.norm(state.params.W_enc, axis=1) > 0).all()
        for b in batches(3):
            state, metrics = make_step(config, spec, 20)(state, sharding.place(b, rest))
    assert float(metrics["l0"]) > 0 and int(state.skipped) == 0


def test_a_transcoder_takes_each_direction_from_its_own_space(tmp_path):
    """Encoder rows come from inputs, decoder rows from the targets of the same rows; the mesh does not matter."""
    config = make_config("transcoder", tmp_path)
    spec = SAESpec.from_options(config.sae, WIDTHS)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((128, sum(WIDTHS.values()))).astype(np.float32)
    stats = [ActivationStats(len(v), v.mean(0), float(np.linalg.norm(v, axis=1).mean()), float(np.square(v).sum(1).mean()), 1.0)
             for v in (x[:, :D_IN], x[:, D_IN:])]
    found = []
    for shape in ((1, 1), (2, 4)):
        mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[: shape[0] * shape[1]])
        rest = sharding.sharding(mesh, "rows_at_rest", None)
        state = initial_state(config, spec, stats, x, mesh)
        since = np.where(np.arange(64) % 3 == 0, 1000, 0).astype(np.uint32)
        state = state.replace(tokens_since_fired_F=sharding.place(since, sharding.sharding(mesh, "features")))
        with jax.set_mesh(mesh):
            state, n = resample(config, spec, state, [iter([sharding.place(x, rest)]) for _ in range(2)], occasion=0)
        assert n == 22
        found.append(jax.device_get(state))
    single, sharded = found
    for name, value in tensors(single.params).items():
        np.testing.assert_allclose(tensors(sharded.params)[name], value, rtol=1e-5, atol=1e-7)
    normal = (x - single.normalization.center) * single.normalization.scale
    read, written = normal[:, :D_IN], normal[:, D_IN:] - single.params.b_dec
    read, written = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (read, written))
    encoder = single.params.W_enc[::3] / np.linalg.norm(single.params.W_enc[::3], axis=1, keepdims=True)
    sources = (encoder @ read.T).argmax(1)
    np.testing.assert_allclose(encoder, read[sources], atol=1e-5)
    np.testing.assert_allclose(single.params.W_dec[::3], written[sources], atol=1e-5)
