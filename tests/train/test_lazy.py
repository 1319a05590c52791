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

from saejax.base import sharding
from saejax.base.errors import ConfigError
from saejax.base.logs import read_metrics
from saejax.base.records import MeshOptions
from saejax.plan.hlo import moved
from saejax.sae import SAEParams, SAESpec, losses, row_gradients, select_batch, tensors
from saejax.sae.row_gradients import RowGradients
from saejax.train import loop, moments, optim, rows
from saejax.train.hyperparameters import Hyperparameters
from saejax.train.state import abstract_state, initial_state
from saejax.train.step import make_step, shared_step

from .synthetic import HOOKPOINT, TARGET, WIDTHS, OnDemand, make_config, make_store
from .test_step import train

F, D, ROOM, PLACES = 24, 3, 12, 4
SECOND = {"train__optimizer": "second", "train__path": "sparse", "sae__d_sae": 512}
LAZY = SECOND | {"train__optimizer": "lazy"}


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
    scale = jnp.minimum(1.0, config.train.clip / norm) if config.train.clip is not None else 1.0
    updates, new = optax.scale_by_adam(0.0, config.train.beta2, config.train.eps).update(
        jax.tree.map(lambda value: scale * value, g), state)
    moved = optim.constrained(config.sae, jax.tree.map(lambda p, u: p - lr * u, params, updates))
    return jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(norm), a, b), (moved, new), (params, state))


def lazy_step(config, params, opt_state, g, masks, lr):
    """The same with gradients of rows: of two sets of rows, as many at a time as `PLACES`."""
    def of(rows):
        return SAEParams(*(value.at[rows.index_C].get(mode="fill", fill_value=0) for value in (g.W_enc, g.b_enc, g.W_dec)), None)

    by_row = [RowGradients(mask_F, PLACES, ROOM, of) for mask_F in masks]
    spec = SAESpec("topk", D, F, k=2, pre_bias=False)
    parts = losses.LossParts(*[jnp.float64(0)] * 5, {}, jnp.float64(0))
    gradient = rows.Gradient(SAEParams(None, None, None, g.b_dec), by_row)
    params, opt_state, _, _, good = rows.applied(rows.Step(config, spec, None, lr, True), params, opt_state, gradient, parts)
    return params, opt_state, good


@pytest.mark.parametrize("unit, clip, at_once", [(True, 0.5, 2), (False, None, ROOM)])
def test_lazy_rows_are_dense_adam_in_float64(tmp_path, monkeypatch, unit, clip, at_once):
    """Any rows at any step, in one or several turns, some steps left out for a gradient that is not finite: parameters equal
    those of optax, and so do second moments once they are brought up to date.
    """
    monkeypatch.setattr(row_gradients, "CHUNK", at_once * D)
    config = make_config("topk", tmp_path, **LAZY | {"train__clip": clip, "sae__unit_decoder": unit})
    both = [jax.jit(functools.partial(step, config)) for step in (dense_step, lazy_step)]
    rows_of_a_step = st.lists(st.integers(0, F - 1), max_size=ROOM, unique=True)
    steps = st.lists(st.tuples(rows_of_a_step, st.sampled_from([True, True, True, False])), min_size=1, max_size=12)

    @hypothesis.settings(max_examples=30, deadline=None)
    @hypothesis.given(steps=steps, seed=st.integers(0, 99))
    def check(steps, seed):
        rng, lr = np.random.default_rng(seed), jnp.float64(0.03)
        dense = lazy_ = optim.constrained(config.sae, SAEParams(*(jnp.asarray(rng.standard_normal(shape))
                                                                  for shape in ((F, D), F, (F, D), D))))
        state, opt_state = optax.scale_by_adam(0.0).init(dense), moments.initial(config.train, dense)
        for chosen, good in steps:
            g = gradient_of(rng, chosen, good)
            dense, state = both[0](dense, state, g, lr)
            masks = [jnp.asarray(np.isin(np.arange(F), part)) for part in (chosen[::2], chosen[1::2])]
            lazy_, opt_state, counted = both[1](lazy_, opt_state, g, masks, lr)
            assert bool(counted) == good
        assert int(opt_state.count) == int(state.count) == sum(good for _, good in steps)
        faded = config.train.beta2 ** np.asarray(opt_state.count - opt_state.seen_F)
        for name, expected in tensors(dense).items():
            np.testing.assert_allclose(tensors(lazy_)[name], expected, rtol=1e-10, atol=1e-10, err_msg=name)
            v = np.asarray(tensors(opt_state.second)[name])
            v = v if name == "b_dec" else v * (faded[:, None] if v.ndim == 2 else faded)
            np.testing.assert_allclose(v, tensors(state.nu)[name], rtol=1e-8, err_msg=name)

    with jax.enable_x64(True):
        check()


VARIANTS = {
    "topk": ("topk", {"sae__aux_k": 0}),
    "few dead": ("topk", {}),
    "many dead": ("topk", {"sae__dead_tokens": 32}),
    "transcoder": ("transcoder", {"sae__skip": True}),
    "crosscoder": ("topk", {"sae__crosscoder": (HOOKPOINT, TARGET)}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "parts": ("topk", {"train__accumulate": 2}),
}


def config_of(name, path, **overrides):
    kind, extra = VARIANTS[name]
    return make_config(kind, path, **SECOND | extra | overrides)


@pytest.fixture(scope="module")
def eager(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("eager")
    return OnDemand(lambda name: train(store, config_of(name, path), (1, 1), 30))


SLOW = pytest.mark.slow


def variants_and_meshes():
    """Those whose rows win by themselves, or against a batch, on a mesh of each sort; others on one device and on both axes."""
    for name in VARIANTS:
        for shape in ((1, 1), (2, 4), *((1, 8), (8, 1)) * (name in ("topk", "batchtopk"))):
            yield pytest.param(name, shape, marks=() if (name, shape) == ("topk", (2, 4)) else SLOW)


@pytest.mark.parametrize("name, mesh_shape", list(variants_and_meshes()))
def test_a_run_is_that_of_the_dense_step(store, eager, monkeypatch, tmp_path, name, mesh_shape):
    """Loss, norms, counters and parameters over 30 steps, AuxK among them, on the sharded mesh as on one device."""
    if name == "many dead":
        monkeypatch.setattr(losses, "FEW", 2)
    if name == "matryoshka":  # some batches then have more pairs than there is room for
        monkeypatch.setattr(select_batch, "ROOM", 1)
    monkeypatch.setattr(row_gradients, "CHUNK", 16 * 48)  # some turns
    expected, expected_history = eager[name]
    got, history = train(store, config_of(name, tmp_path, train__optimizer="lazy"), mesh_shape, 30)
    for key, a in tensors(got.params).items():
        b = tensors(expected.params)[key]
        # Dense transcoders on (1, 1) and (2, 4) are 1.4e-5 apart already.
        assert np.linalg.norm(a - b) <= (2e-5 if name == "transcoder" else 1e-5) * np.linalg.norm(b), key
    np.testing.assert_array_equal(got.tokens_since_fired_F, expected.tokens_since_fired_F)
    assert name in ("topk", "parts") or any(line["aux"] > 0 for line in history)
    for mine, theirs in zip(history, expected_history, strict=True):
        assert mine.keys() == theirs.keys()
        # Explained variance is compared as 1 - it: it may be near 0, where FVU is not.
        mine, theirs = (line | {"explained_variance": 1 - line["explained_variance"]} for line in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    seen = got.opt_state.seen_F
    assert seen.max() == 30 and ((seen < 30).any() or name in ("batchtopk", "matryoshka"))


def compiled_step(store, config, mesh_shape) -> str:
    spec = SAESpec.from_options(config.sae, WIDTHS)
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    rows = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding.sharding(mesh, "rows_at_rest", None))
    step = make_step(config, spec, 10)
    with jax.set_mesh(mesh):
        return step.lower(abstract_state(config, spec, mesh), rows).compile()


def made(hlo: str, shape: str) -> set[str]:
    """The instructions that make an array of this shape; a fusion is what it is made of."""
    found = re.findall(rf" = \w+\[{shape}\]\S* ([\w\-]+)\(", hlo)
    return set(found) - {"parameter", "get-tuple-element", "bitcast", "fusion"}


@pytest.mark.parametrize("aux_k", [0, pytest.param(16, marks=SLOW)])
def test_a_step_touches_rows_only(store, tmp_path, aux_k):
    """Of every array as large as the dictionary some rows are written, in place; the dense step makes new ones."""
    options = {"sae__d_sae": 4096, "sae__aux_k": aux_k}
    program = compiled_step(store, config_of("topk", tmp_path, train__optimizer="lazy", **options), (1, 1))
    assert made(program.as_text(), "4096,16") == {"scatter"}
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes - 4096
    if not aux_k:
        eager = compiled_step(store, config_of("topk", tmp_path, **options), (1, 1))
        assert {"multiply", "add"} < made(eager.as_text(), "4096,16")


def test_gradients_move_along_data_only_and_only_those_of_touched_rows(store, tmp_path):
    config = config_of("topk", tmp_path, train__optimizer="lazy", sae__d_sae=4096)
    found = moved(compiled_step(store, config, (2, 4)).as_text(), 2, 4)
    along = {axis: max(math.prod(map(int, re.findall(r"\d+", shape.split("[")[1]))) for m in found if m.axis == axis
                       for shape in m.shapes) for axis in ("dict", "data")}
    rows, features = 32 * 4, 4096 // 4
    assert along["dict"] <= 16 * 16  # of half a batch, as without lazy rows
    assert along["data"] == rows * 16 < features * 16


@SLOW
def test_resampled_rows_start_over_as_in_the_dense_step(store, tmp_path):
    """A new row's first step is the sign of its gradient, which rounding decides near 0; with this eps it does not."""
    options = {"train__resample__every_tokens": 24 * 32, "train__resample__sample_rows": 128, "sae__dead_tokens": 64,
               "train__eps": 1e-4}
    both = [loop.train(config_of("few dead", tmp_path / name, train__optimizer=name, **options), store)
            for name in ("second", "lazy")]
    for name in ("second", "lazy"):
        assert sum(line.get("resampled", 0) for line in read_metrics(tmp_path / name / "metrics.jsonl")) > 0
    for a, b in zip(*(jax.tree.leaves(trained.state.params) for trained in both), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@SLOW
@pytest.mark.parametrize("name", ["topk", "few dead"])
def test_several_saes_of_one_step_are_each_by_itself(store, tmp_path, name):
    configs = [config_of(name, tmp_path, train__optimizer="lazy", train__lr=lr, seed=seed)
               for seed, lr in enumerate((1e-3, 3e-3))]
    spec, mesh = SAESpec.from_options(configs[0].sae, WIDTHS), sharding.single_device_mesh()
    batches = [store.read(HOOKPOINT, 32 * i, 32 * i + 32) for i in range(12)]
    sample = np.concatenate(batches).astype(np.float32)
    states = [[initial_state(c, spec, [store.stats(HOOKPOINT)], sample, mesh) for c in configs] for _ in range(2)]
    with jax.set_mesh(mesh):
        step, steps = shared_step(configs[0], spec, 12), [make_step(c, spec, 12) for c in configs]
        shared, alone = states
        for x in batches:
            rows = sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None))
            shared = [step(state, rows, Hyperparameters.of(c))[0] for c, state in zip(configs, shared, strict=True)]
            alone = [one(state, rows)[0] for one, state in zip(steps, alone, strict=True)]
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_step_that_is_not_finite_changes_counters_only(store, tmp_path):
    config = config_of("topk", tmp_path, train__optimizer="lazy")
    spec, mesh = SAESpec.from_options(config.sae, WIDTHS), sharding.single_device_mesh()
    state = initial_state(config, spec, [store.stats(HOOKPOINT)], store.read(HOOKPOINT, 0, 32).astype(np.float32), mesh)
    before = jax.device_get(state)
    with jax.set_mesh(mesh):
        rows = sharding.place(np.full((32, 16), np.nan, np.float32), sharding.sharding(mesh, "rows_at_rest", None))
        after, _ = make_step(config, spec, 10)(state, rows)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    changed = after.replace(step=before.step, skipped=before.skipped, skipped_in_row=before.skipped_in_row)
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("kind, overrides, message", [
    ("relu", {}, "kind 'relu' has no sparse path, gradients of every row are computed anyway; take kind topk or batchtopk"),
    ("gated", {}, "kind 'gated' has no sparse path"),
    ("jumprelu", {}, "the penalty (config.sae.penalty = 'target_l0') moves features that do not fire; take kind topk"),
    ("jumprelu_tanh", {}, "the pre-activation loss of the penalty 'tanh' moves features that do not fire"),
    ("topk", {"train__ema": 0.9}, "config.train.ema = 0.9 moves the mean of every row; set it to 0"),
    ("topk", {"train__path": "dense"}, "config.train.path = 'dense' computes gradients of every row; set it to 'auto'"),
    ("topk", {"sae__multi_topk": True}, "config.sae.multi_topk selects again on the dense path; set it to False"),
])
def test_what_would_move_idle_rows_is_refused(tmp_path, kind, overrides, message):
    with pytest.raises(ConfigError) as error:
        make_config(kind, tmp_path, **LAZY | overrides)
    assert f"config.train.optimizer: 'lazy', but {message}" in str(error.value) and "\n" not in str(error.value)
    assert "or take 'second'" in str(error.value)


@pytest.mark.parametrize("kind, overrides, message", [
    ("relu", {}, "kind 'relu' has no sparse path"), ("jumprelu", {}, "kind 'jumprelu' has no sparse path"),
    ("topk", {"sae__multi_topk": True}, "config.sae.multi_topk selects again on the dense path")])
def test_the_sparse_path_is_refused_where_there_is_none(tmp_path, kind, overrides, message):
    with pytest.raises(ConfigError) as error:
        make_config(kind, tmp_path, train__path="sparse", **overrides)
    assert str(error.value) == f"config.train.path: 'sparse', but {message}; set it to 'auto'"
