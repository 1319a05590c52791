"""k falls as a value of one program: each step is that of a program of so many features, on every path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sharding
from saejax.logs import read_metrics
from saejax.sae import SAESpec
from saejax.train import loop, optim
from saejax.train.programs import make_joint_step, stacked
from saejax.train.state import initial_state
from saejax.train.step import make_step

from .synthetic import HOOKPOINT, WIDTHS, make_config, make_store

TOTAL = 50
LAZY = {"train__lazy": True, "train__beta1": 0.0, "train__state_bytes": 8}
PATHS = {"dense": ("topk", {}), "multi": ("topk", {"sae__multi_topk": True}), "pairs": ("topk", {"train__sparse": "always"}),
         "lazy": ("topk", LAZY), "batch": ("batchtopk", {}), "pairs of batch": ("batchtopk", {"train__sparse": "always"}),
         "lazy batch": ("batchtopk", LAZY)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("annealing") / "store")


def spec_of(config, k):
    return SAESpec.from_options(dataclasses.replace(config.sae, k=k), WIDTHS)


def state_at(config, store, mesh, step):
    x = np.random.default_rng(0).standard_normal((32, WIDTHS[HOOKPOINT])).astype(np.float32)
    state = initial_state(config, spec_of(config, config.sae.k), [store.stats(HOOKPOINT)], x, mesh)
    rows = sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None))
    return state.replace(step=jax.device_put(jnp.full_like(state.step, step), state.step.sharding)), rows


CORE = ("dense", "lazy", "pairs of batch")


@pytest.mark.parametrize("path", [path if path in CORE else pytest.param(path, marks=pytest.mark.slow) for path in PATHS])
def test_a_step_is_that_of_a_program_of_so_many_features(store, tmp_path, path):
    kind, changes = PATHS[path]
    falling = make_config(kind, tmp_path, sae__k_start=12, train__k_anneal=0.5, mesh__data=2, mesh__dict=4, **changes)
    mesh = sharding.make_mesh(falling.mesh)
    with jax.set_mesh(mesh):
        k = int(optim.annealed_k(falling.sae, 25)(11))
        still = make_config(kind, tmp_path, sae__k=k, mesh__data=2, mesh__dict=4, **changes)
        new, metrics = make_step(falling, spec_of(falling, 12), TOTAL)(*state_at(falling, store, mesh, 11))
        expected, expected_metrics = make_step(still, spec_of(still, k), TOTAL)(*state_at(falling, store, mesh, 11))
    assert k == 7 and {key: float(value) for key, value in metrics.items()} == pytest.approx(
        {key: float(value) for key, value in expected_metrics.items()}, rel=1e-5)
    for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-6)


def test_saes_of_one_program_fall_together(store, tmp_path):
    config = make_config("topk", tmp_path, sae__k_start=12, train__k_anneal=0.5, mesh__data=2, mesh__dict=4)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, rows = state_at(config, store, mesh, 11)
        both = stacked([state, state])
        _, alone = make_step(config, spec_of(config, 12), TOTAL)(state, rows)
        _, metrics = make_joint_step([config, config], spec_of(config, 12), TOTAL)(both, rows)
    np.testing.assert_allclose(np.asarray(metrics["l0"]), 2 * [float(alone["l0"])])
    np.testing.assert_allclose(np.asarray(metrics["loss"]), 2 * [float(alone["loss"])], rtol=1e-5)


def test_a_run_falls_step_by_step_in_two_programs(store, tmp_path, monkeypatch):
    config = make_config("topk", tmp_path, sae__k_start=12, train__k_anneal=0.5, sae__aux_k=0, log__every_steps=1)
    made, make = [], loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda config, spec, total: made.append(spec.k) or make(config, spec, total))
    loop.train(config, store)
    l0 = [line["l0"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    ks = [int(optim.annealed_k(config.sae, 25)(step)) for step in range(50)]
    assert made == [12, 4] and ks[0] == 12 and len(set(ks)) == 9
    assert all(k - 1 < found <= k for k, found in zip(ks, l0, strict=True))
