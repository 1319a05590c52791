"""Kinds without k over tiles of features give what one tile gives: loss, what was seen and every gradient, on every mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import hardware, sharding
from saejax.base.records import MeshOptions
from saejax.config import SAEOptions
from saejax.sae import SAEParams, SAESpec, featurewise, losses, param_shardings, sparse, tensors, tiles
from saejax.sae.losses import LossInputs
from saejax.sae.objectives import objective
from saejax.sae.params import PER_FEATURE
from tests.hlo import moved_shapes
from tests.sae.test_sparse import check_equal
from tests.train.synthetic import OnDemand

B, D, OUT, F = 64, 12, 10, 264  # no tile of 16 divides a shard of it
SKIP = {"target": "there", "skip": True, "pre_bias": False}
CASES = {
    "relu": {"kind": "relu"},
    "relu tanh": {"kind": "relu", "penalty": "tanh"},
    "relu log": {"kind": "relu", "penalty": "log"},
    "crosscoder": {"kind": "relu", "crosscoder": ("here", "there")},
    "gated": {"kind": "gated", "pre_bias": True},
    "gated transcoder": {"kind": "gated", **SKIP},
    "l0": {"kind": "jumprelu", "penalty": "l0"},
    "target_l0": {"kind": "jumprelu", "penalty": "target_l0", "pre_bias": True},
    "tanh": {"kind": "jumprelu", "penalty": "tanh"},
    "matryoshka": {"kind": "jumprelu", "penalty": "target_l0", "groups": (0.1, 0.3, 0.6), "pre_bias": True},
    "transcoder": {"kind": "jumprelu", "penalty": "l0", "aux_k": 8, **SKIP},
}
CORE = ("relu", "gated transcoder", "matryoshka")
MESHES = [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4), pytest.param((1, 8), marks=pytest.mark.slow)]


def of_case(name):
    options = SAEOptions(**{"aux_k": 0, "d_sae": F, **CASES[name]})
    return options, SAESpec(options.kind, D, F, pre_bias=options.pre_bias, bandwidth=0.3, skip=options.skip,
                            d_out=OUT if options.target else None, layers=(7, 5) if options.crosscoder else ())


def inputs_of(spec):
    rng = np.random.default_rng(0)
    values = {"W_enc": rng.standard_normal((F, D)), "b_enc": rng.standard_normal(F) * 0.1 - 0.5,
              "W_dec": rng.standard_normal((F, spec.width_out)), "b_dec": rng.standard_normal(spec.width_out)}
    if spec.skip:
        values["W_skip"] = rng.standard_normal((D, OUT))
    own = {name: rng.uniform(-1.5, -0.5, F).astype(np.float32) for name in PER_FEATURE.get(spec.kind, ())}
    if spec.kind == "jumprelu":
        own["log_threshold"][::6] = 4.0  # never reached, but above 0 for AuxK
    x = rng.standard_normal((B, D + (spec.d_out or 0))).astype(np.float32)
    return SAEParams(**{name: value.astype(np.float32) for name, value in values.items()}, per_feature=own), x


def gradients_of(options, spec):
    def of(params, x):
        silent = jnp.where(jnp.arange(F) % 3 == 0, jnp.uint32(100), jnp.uint32(0))
        inputs = LossInputs(sparsity=jnp.float32(0.9), target_l0=jnp.float32(20), dead_after=jnp.uint32(10),
                            inverse_variance=jnp.float32(0.1), tokens_since_fired_F=silent)
        return jax.value_and_grad(lambda p: objective(spec, options, p, x, inputs), has_aux=True)(params)

    return of


def made(name, mesh_shape):
    """(the program, what it returns)."""
    options, spec = of_case(name)
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    params, x = inputs_of(spec)
    of = gradients_of(options, spec)
    with jax.set_mesh(mesh):
        given = (jax.tree.map(sharding.place, params, param_shardings(mesh, tensors(params))),
                 sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None)))
        program = jax.jit(of).lower(*given).compile()
        return program, jax.device_get(program(*given))


@pytest.fixture(scope="module", autouse=True)
def a_pre_activation_loss_that_can_be_seen():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(featurewise, "PRE_ACTIVATION", 0.3)
        yield


@pytest.fixture(scope="module")
def whole():
    return OnDemand(lambda name: made(name, (1, 1)))


def in_tiles(monkeypatch, size=16):
    monkeypatch.setattr(tiles, "tile_width", lambda rows, features, chip: min(size, features))


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("name", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_tiles_give_what_one_tile_gives(monkeypatch, whole, name, mesh_shape):
    monkeypatch.setattr(losses, "FEW", 1)  # AuxK takes the path of many dead features
    _, expected = whole[name]
    in_tiles(monkeypatch)
    _, got = made(name, mesh_shape)
    assert all(np.abs(value).max() > 0 for value in jax.tree.leaves(expected))
    check_equal(expected, got)


@pytest.mark.parametrize("name", ["matryoshka", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES
                                                  if name != "matryoshka")])
def test_nothing_is_as_large_as_batch_times_features(monkeypatch, whole, name):
    array = rf"(f32|pred|s32|u32)\[(?:\d+,)*(?:{B},{F}|{F},{B})\]"
    assert re.search(array, whole[name][0].as_text())
    monkeypatch.setattr(losses, "FEW", 1)
    monkeypatch.setattr(sparse, "TILE", 8 * F)
    in_tiles(monkeypatch, 24)  # divides the dictionary
    text = made(name, (1, 1))[0].as_text()
    assert not re.search(array, text) and re.search(rf"f32\[(?:{B},24|24,{B})\]", text)


def test_a_pass_moves_reconstructions_once(monkeypatch):
    """Rows, reconstruction and its gradient: no more than with one tile, and none in the loop."""
    expected = sorted(moved_shapes(made("relu", (1, 8))[0].as_text()))
    in_tiles(monkeypatch)
    assert sorted(moved_shapes(made("relu", (1, 8))[0].as_text())) == expected


@pytest.mark.parametrize("rows, features, chip, expected", [
    (4096, 2**17, "v5e", 2**14), (4096, 2**16, "v5e", 2**16), (16_384, 2**17, "v5p", 2**17), (8192, 2**17, "h100", 2**17),
    (2048, 65_536, "cpu", 8192), (2048, 32_768, "cpu", 32_768), (2**20, 2**17, "v5e", 1024), (2**20, 100, "v5e", 100),
    (2048, 65_537, "cpu", 9472)])
def test_the_width_of_a_tile(rows, features, chip, expected):
    assert tiles.tile_width(rows, features, hardware.CHIPS[chip]) == expected
