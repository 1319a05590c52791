"""k falls as a value of one compiled step: each step is that of a program of so many features, on every path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.fingerprints import fingerprints
from saejax.base.logs import read_metrics
from saejax.sae import SAESpec
from saejax.train import loop, optim
from saejax.train.checkpoint import read_meta
from saejax.train.state import initial_state
from saejax.train.step import make_step

from .synthetic import HOOKPOINT, WIDTHS, make_config, make_store

TOTAL = 50
LAZY = {"train__optimizer": "lazy"}
PATHS = {"dense": ("topk", {}), "multi": ("topk", {"sae__multi_topk": True}), "pairs": ("topk", {"train__path": "sparse"}),
         "lazy": ("topk", LAZY), "batch": ("batchtopk", {}), "pairs of batch": ("batchtopk", {"train__path": "sparse"}),
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


CORE = ("lazy", "pairs of batch")


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


def annealed(run_dir, **changes):
    return make_config("topk", run_dir, sae__k_start=12, train__k_anneal=0.5, sae__aux_k=0, log__every_steps=1, **changes)


def counted(monkeypatch):
    """k of every step that is compiled."""
    made, make = [], loop.shared_step
    monkeypatch.setattr(loop, "shared_step", lambda config, spec, total: made.append(spec.k) or make(config, spec, total))
    return made


def test_a_run_falls_step_by_step_in_two_programs(store, tmp_path, monkeypatch):
    config, made = annealed(tmp_path), counted(monkeypatch)
    loop.train(config, store)
    l0 = [line["l0"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    ks = [int(optim.annealed_k(config.sae, 25)(step)) for step in range(50)]
    assert made == [12, 4] and ks[0] == 12 and len(set(ks)) == 9
    assert all(k - 1 < found <= k for k, found in zip(ks, l0, strict=True))


@pytest.mark.slow
def test_several_saes_fall_in_the_same_two(store, tmp_path, monkeypatch):
    made, rates = counted(monkeypatch), (1e-3, 3e-3)
    outcomes = loop.train_all([annealed(tmp_path / str(lr), train__lr=lr, mesh__data=2, mesh__dict=4) for lr in rates], store)
    assert made == [12, 4]
    for lr, outcome in zip(rates, outcomes, strict=True):
        alone = loop.train(annealed(tmp_path / "alone" / str(lr), train__lr=lr, mesh__data=2, mesh__dict=4), store)
        assert read_meta(outcome.paths.checkpoints / str(outcome.step)).fingerprints == fingerprints(alone.state)
