"""Training is the same on every mesh, and its step holds what the recipes promise."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.base.records import MeshOptions
from saejax.data.stream import Stream
from saejax.sae import SAESpec, tensors
from saejax.train.member import total_steps
from saejax.train.state import geometric_median, initial_state, normalization_scale
from saejax.train.step import make_step
from tests.hlo import moved_shapes, widest_sort

from .synthetic import CONTEXT, D_IN, HOOKPOINT, KINDS, VARIANTS, WIDTHS, OnDemand, kinds, make_config, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("step") / "store", contexts=64)


def train(store, config, mesh_shape, n_steps):
    devices = jax.devices()[: mesh_shape[0] * mesh_shape[1]]
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), devices)
    spec = SAESpec.from_options(config.sae, WIDTHS)
    batches = []
    with Stream(store, config.sae.hookpoints, config.train.batch, config.stream, config.seed_of_data) as stream:
        batches = [x.copy() for x in itertools.islice(stream, n_steps)]
    sample, stats = np.concatenate(batches[:4]).astype(np.float32), [store.stats(name) for name in config.sae.hookpoints]
    state = initial_state(config, spec, stats, sample, mesh)
    step = make_step(config, spec, n_steps)
    history = []
    with jax.set_mesh(mesh):
        for x in batches:
            state, metrics = step(state, sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None)))
            history.append({k: float(v) for k, v in metrics.items()})
    return jax.device_get(state), history


@pytest.fixture(scope="module")
def single(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("single")
    return OnDemand(lambda kind: train(store, config_of(kind, path), (1, 1), 50))


def config_of(kind, path):
    """With an order of rows in which no activation comes so near to a threshold that rounding decides."""
    return make_config(kind, path, **({"data_seed": 1} if kind == "matryoshka_jumprelu" else {}))


def kinds_and_meshes():
    """The two oldest kinds on a mesh of each sort, others on the mixed one; what remains is slow. Variants of a kind on two."""
    meshes = [(1, 8), (8, 1), (2, 4), (4, 2)]
    for kind, shape in [*itertools.product(KINDS, meshes), *itertools.product(VARIANTS, [(1, 8), (2, 4)])]:
        mixed = ("jumprelu", "batchtopk", "matryoshka", "transcoder", "crosscoder", "pairs")
        core = (kind in ("relu", "topk") and shape != (4, 2)) or (shape == (2, 4) and kind in mixed)
        yield pytest.param(kind, shape, marks=() if core else pytest.mark.slow)


@pytest.mark.parametrize("kind, mesh_shape", list(kinds_and_meshes()))
def test_sharded_equals_single_device_over_50_steps(store, single, tmp_path, kind, mesh_shape):
    state, history = train(store, config_of(kind, tmp_path), mesh_shape, 50)
    expected, expected_history = single[kind]
    for name, a in tensors(state.params).items():
        b = tensors(expected.params)[name]
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), name
    np.testing.assert_array_equal(state.tokens_since_fired_F, expected.tokens_since_fired_F)
    for got, want in zip(history, expected_history, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", kinds("relu", "topk", "jumprelu", "batchtopk", "matryoshka"))
def test_it_learns(single, kind):
    _, history = single[kind]
    first, last = history[0], history[-1]
    # relu ramps its penalty up, so the reconstruction is compared, not the loss
    assert last["fvu"] < 0.7 * first["fvu"]
    assert kind != "topk" or all(h["l0"] <= 4 for h in history)


def test_batchtopk_keeps_the_mean_of_its_least_kept_activations(single):
    state, history = single["batchtopk"]
    assert all(h["l0"] <= 4 for h in history) and history[-1]["l0"] == 4
    assert history[-1]["threshold"] == float(state.moving["threshold"]) > 0


def test_dead_counters_and_unit_decoder(single):
    state, history = single["topk"]
    np.testing.assert_allclose(np.linalg.norm(state.params.W_dec, axis=1), 1.0, rtol=1e-6)
    since = np.asarray(state.tokens_since_fired_F)
    assert set(np.unique(since % 32)) == {0} and since.max() <= 50 * 32
    assert history[-1]["dead_fraction"] == pytest.approx((since > 160).mean())
    assert any(h["aux"] > 0 for h in history)


def test_schedules(single):
    _, history = single["relu"]
    lr = [h["lr"] for h in history]
    assert lr[0] == lr[39] == pytest.approx(3e-3) and lr[45] == pytest.approx(3e-3 * 5 / 10)
    l1 = [h["l1_coefficient"] for h in history]
    assert l1[0] == 0 and l1[1] == pytest.approx(0.05) and l1[2:] == pytest.approx([0.1] * 48)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_bfloat16_compute_keeps_float32_parameters(store, tmp_path, compute):
    config = make_config("topk", tmp_path, train__compute_dtype=compute)
    spec = SAESpec.from_options(config.sae, WIDTHS, compute)
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    x = store.read(HOOKPOINT, 0, 32)
    state = initial_state(config, spec, [store.stats(HOOKPOINT)], x.astype(np.float32), mesh)
    with jax.set_mesh(mesh):
        state, metrics = make_step(config, spec, 10)(state, sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("kind", kinds("relu", "topk", "matryoshka"))
def test_the_step_moves_no_dictionary_wide_array(store, tmp_path, kind):
    config = make_config(kind, tmp_path, sae__d_sae=1024)
    spec = SAESpec.from_options(config.sae, WIDTHS)
    mesh = sharding.make_mesh(MeshOptions(1, 8))
    x = store.read(HOOKPOINT, 0, 32)
    state = initial_state(config, spec, [store.stats(HOOKPOINT)], x.astype(np.float32), mesh)
    with jax.set_mesh(mesh):
        rows = sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None))
        hlo = make_step(config, spec, 10).lower(state, rows).compile().as_text()
    assert widest_sort(hlo) <= 4 * max(config.sae.k, config.sae.aux_k)
    widest = max(map(math.prod, moved_shapes(hlo)))
    bound = 32 * max(D_IN * max(1, len(config.sae.groups)), 8 * max(config.sae.k, config.sae.aux_k))
    assert widest <= bound < 32 * 1024, "only [B, D] rows and candidate values may travel"


@pytest.mark.parametrize("kind, path, least", [("batchtopk", "dense", 2), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("batchtopk", "sparse", 2), ("topk", "dense", 1), ("topk", "sparse", 0)))])
def test_conditions_are_branches(store, tmp_path, kind, path, least):
    """AuxK, on the sparse path loops of one round instead; ties at the threshold of a batch."""
    config = make_config(kind, tmp_path, train__path=path)
    spec, mesh = SAESpec.from_options(config.sae, WIDTHS), sharding.make_mesh(config.mesh)
    x = store.read(HOOKPOINT, 0, 32)
    state = initial_state(config, spec, [store.stats(HOOKPOINT)], x.astype(np.float32), mesh)
    with jax.set_mesh(mesh):
        rows = sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None))
        hlo = make_step(config, spec, 50).lower(state, rows).compile().as_text()
    assert len(re.findall(r" conditional\(", hlo)) >= least


def test_normalisation_conventions(store):
    stats = store.stats(HOOKPOINT)
    rows = np.concatenate([store.read(HOOKPOINT, 0, store.rows)[i::CONTEXT] for i in range(1, CONTEXT)]).astype(np.float64)

    def mean_sq(s):
        return np.square(rows * s).sum(1).mean()

    assert mean_sq(normalization_scale("mean_sq_norm_D", stats, D_IN)) == pytest.approx(D_IN, rel=1e-5)
    assert mean_sq(normalization_scale("mean_sq_norm_1", stats, D_IN)) == pytest.approx(1, rel=1e-5)
    s = normalization_scale("mean_norm_sqrt_D", stats, D_IN)
    assert np.linalg.norm(rows * s, axis=1).mean() == pytest.approx(D_IN**0.5, rel=1e-5)
    assert normalization_scale("none", stats, D_IN) == 1


def test_geometric_median_resists_outliers():
    x = np.random.default_rng(0).standard_normal((400, 5))
    x[:40] += 1e4
    assert np.linalg.norm(geometric_median(x)) < 0.5 < np.linalg.norm(x.mean(0))


def test_batch_and_dictionary_must_divide_the_mesh():
    mesh = sharding.make_mesh(MeshOptions(2, 4))
    with pytest.raises(ConfigError, match="config.train.batch: 100 .* nearest valid value is 96 or 104"):
        sharding.check_batch(100, mesh)
    with pytest.raises(ConfigError, match="config.sae.d_sae: 30 .* nearest valid value is 32"):
        sharding.check_features(30, mesh)
    with pytest.raises(ConfigError, match="3 x 2 does not use the 8 devices"):
        sharding.make_mesh(MeshOptions(3, 2))


def test_total_steps_cover_the_tokens(tmp_path):
    assert total_steps(make_config("topk", tmp_path, train__tokens=33)) == 2


@pytest.mark.slow
def test_parts_of_a_batch_have_the_same_dead_features_on_both_paths(store, tmp_path):
    """A feature that fires in any part is not dead in the others, dense or sparse; AuxK has something to do."""
    found = {}
    for path in ("dense", "sparse"):
        config = make_config("topk", tmp_path / path, train__path=path, train__accumulate=4, sae__dead_tokens=40)
        spec, mesh = SAESpec.from_options(config.sae, WIDTHS), sharding.make_mesh(MeshOptions(1, 2), jax.devices()[:2])
        x = store.read(HOOKPOINT, 0, 32)
        state = initial_state(config, spec, [store.stats(HOOKPOINT)], x.astype(np.float32), mesh)
        with jax.set_mesh(mesh):
            step = make_step(config, spec, 50)
            rows, seen = sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None)), []
            for _ in range(12):
                state, metrics = step(state, rows)
                seen.append(float(metrics["aux"]))
        found[path] = np.array(seen), np.asarray(state.params.W_enc)
    (dense, W_dense), (pairs, W_pairs) = found["dense"], found["sparse"]
    assert dense[-3:].max() > 0
    np.testing.assert_allclose(pairs, dense, rtol=1e-3, atol=1e-6)
    assert np.linalg.norm(W_pairs - W_dense) <= 1e-4 * np.linalg.norm(W_dense)
