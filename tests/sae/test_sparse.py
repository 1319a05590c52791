"""The sparse path gives what the dense one gives: loss, what was seen and every gradient, on every mesh."""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.config import SAEOptions, TrainOptions
from saejax.sae import SAEParams, SAESpec, losses, param_shardings, row_gradients, select_batch, sparse, tensors
from saejax.sae.activations import batchtopk
from saejax.sae.losses import LossInputs
from saejax.sae.model import pre_activations
from saejax.sae.objectives import objective
from saejax.sae.products import product
from saejax.train.step import takes_pairs
from tests.hlo import moved_shapes, widest_sort
from tests.train.synthetic import OnDemand

B, D, OUT, F, K = 64, 12, 10, 256, 5
MESHES = [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4), pytest.param((1, 8), marks=pytest.mark.slow),
          pytest.param((8, 1), marks=pytest.mark.slow)]


def case(target: bool, equal_rows: bool = False):
    rng = np.random.default_rng(0)
    width = OUT if target else D
    values = {"W_enc": rng.standard_normal((F, D)), "b_enc": rng.standard_normal(F) * 0.1 - 0.5,
              "W_dec": rng.standard_normal((F, width)), "b_dec": rng.standard_normal(width)}
    if target:
        values["W_skip"] = rng.standard_normal((D, OUT))
    if equal_rows:  # features in fours that always tie
        values |= {name: np.repeat(values[name][::4], 4, axis=0) for name in ("W_enc", "b_enc")}
    x = rng.standard_normal((B, D + (OUT if target else 0)))
    return SAEParams(**{name: value.astype(np.float32) for name, value in values.items()}), x.astype(np.float32)


def loss_and_gradients(options, spec, mesh_shape, as_pairs, params, x, *long_silent):
    """(the program, what it returns for each number of tokens that a third of the features has been silent for)."""
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), jax.devices()[: mesh_shape[0] * mesh_shape[1]])

    def of(params, x, silent):
        inputs = LossInputs(sparsity=jnp.float32(0), target_l0=jnp.float32(0), dead_after=jnp.uint32(10),
                            inverse_variance=jnp.float32(0.1),
                            tokens_since_fired_F=jnp.where(jnp.arange(F) % 3 == 0, silent, jnp.uint32(0)))
        if not as_pairs:
            return jax.value_and_grad(lambda p: objective(spec, options, p, x, inputs), has_aux=True)(params)
        return of_pieces(spec, options, params, x, inputs)

    with jax.set_mesh(mesh):
        given = (jax.tree.map(sharding.place, params, param_shardings(mesh, tensors(params))),
                 sharding.place(x, sharding.sharding(mesh, "rows_at_rest", None)))
        program = jax.jit(of).lower(*given, jnp.uint32(0)).compile()
        return program, [jax.device_get(program(*given, jnp.uint32(tokens))) for tokens in long_silent]


def of_pieces(spec, options, params, x, inputs):
    """The same from the sparse path's gradients of rows."""
    batch = row_gradients.parts_of(spec, params, x, 1)
    found = row_gradients.of_fired(spec, options, params, batch, inputs, row_gradients.room_for(spec, B * K))
    dead = row_gradients.Dead(losses.dead_features(inputs, found.seen.fired_F), found.errors)

    def none():
        return jnp.float32(0), jax.tree.map(jnp.zeros_like, params)

    def with_dead(of, room):
        def case():
            aux, second = of(spec, options, params, batch, dead, room)
            zero = found.shared.replace(**{name: None if value is None else jnp.zeros_like(value) for name, value in (
                ("b_dec", found.shared.b_dec), ("W_skip", found.shared.W_skip))})
            return aux, whole(spec, params, second, zero)
        return case

    rooms = losses.rooms_here(spec, B)
    cases = [none, *(with_dead(row_gradients.of_dead_in_room, room) for room in rooms),
             with_dead(row_gradients.of_many_dead, row_gradients.room_for(spec, B * options.aux_k))]
    aux, more = lax.switch(losses.level(dead.dead_F, rooms), cases)
    loss = found.seen.loss + options.aux_coef * aux
    first = whole(spec, params, found.gradients, found.shared)
    return (loss, found.seen.replace(own={"aux": aux}, loss=loss)), jax.tree.map(jnp.add, first, more)


def whole(spec, params, some, shared):
    """The gradient of all parameters that those of some rows and of the shared parameters stand for."""
    def local(place_F, *values, shards):
        here = place_F < len(values[0])
        return tuple(jnp.where(here.reshape(-1, *[1] * (value.ndim - 1)), value[jnp.minimum(place_F, len(value) - 1)], 0)
                     for value in values)

    rows, g = some.turn()
    row, matrix = sharding.spec("features"), sharding.spec("features", None)
    W_enc, b_enc, W_dec = sharding.on_shards(local, (row, matrix, row, matrix), (matrix, row, matrix))(
        rows.place_F, g.W_enc, g.b_enc, g.W_dec)
    through_D = product("f,fd->d", b_enc, params.W_enc, spec.compute_dtype, sharding.out(None)) if spec.pre_bias else 0.0
    return shared.replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=shared.b_dec - through_D)


CASES = {
    "topk": {"kind": "topk"},
    "ties": {"kind": "topk"},
    "transcoder": {"kind": "topk", "target": "there", "skip": True, "pre_bias": False},
    "batchtopk": {"kind": "batchtopk"},
    "matryoshka": {"kind": "batchtopk", "groups": (0.1, 0.3, 0.6)},
    "matryoshka transcoder": {"kind": "batchtopk", "groups": (0.1, 0.3, 0.6), "target": "there", "skip": True, "pre_bias": False},
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A third of the features is more than one on every shard: AuxK takes the path that is tested here."""
    monkeypatch.setattr(losses, "FEW", 1)


@pytest.fixture(scope="module")
def dense():
    return OnDemand(lambda name: loss_and_gradients(*of_case(name), (1, 1), False, *inputs_of(name), 0, 100)[1])


def of_case(name):
    options = SAEOptions(**CASES[name], d_sae=F, k=K, aux_k=8)
    return options, SAESpec(options.kind, D, F, k=K, pre_bias=options.pre_bias, d_out=OUT if options.target else None,
                            skip=options.skip)


def inputs_of(name):
    return case("target" in CASES[name], equal_rows=name == "ties")


def check_equal(expected, got):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), jax.tree_util.keystr(path)


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("name, room", [("topk", 4), ("batchtopk", 1), ("matryoshka transcoder", 4), *(
    pytest.param(name, room, marks=pytest.mark.slow)
    for name, room in (("ties", 4), ("transcoder", 4), ("batchtopk", 4), ("matryoshka", 4), ("matryoshka", 1)))])
def test_pairs_give_what_the_dense_path_gives(monkeypatch, dense, name, room, mesh_shape):
    """With nothing dead and with dead features. room 1: more rows than the widest keep more features than there is room for."""
    monkeypatch.setattr(select_batch, "ROOM", room)
    _, results = loss_and_gradients(*of_case(name), mesh_shape, True, *inputs_of(name), 0, 100)
    assert (dense[name][0][0][1].own["aux"], dense[name][1][0][1].own["aux"] > 0) == (0, True)
    for expected, got in zip(dense[name], results, strict=True):
        check_equal(expected, got)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_batch_of_one_row(name):
    """Its variance is 0, so there is no FVU and no AuxK; the loss and all gradients are there."""
    params, x = inputs_of(name)
    (expected,), (got,) = (loss_and_gradients(*of_case(name), (1, 1), as_pairs, params, x[:1], 100)[1]
                           for as_pairs in (False, True))
    (loss, parts), gradient = got
    assert np.isfinite(loss) and parts.own["aux"] == 0 and parts.l0 == K and np.linalg.norm(gradient.W_dec) > 0
    check_equal(expected[0][0], loss)
    check_equal(expected[1], gradient)


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_a_few_rows_that_keep_many_are_done_again(monkeypatch, mesh_shape):
    """One row in eight keeps nearly everything, among values that tie all over the batch (small integers, so exact)."""
    monkeypatch.setattr(select_batch, "ROOM", 1)
    monkeypatch.setattr(select_batch, "WIDE_SHARE", 1 / 8)
    rng = np.random.default_rng(4)
    params = SAEParams(*(rng.integers(-3, 4, shape).astype(np.float32) for shape in ((F, D), F, (F, D), D)))
    x = rng.integers(-3, 4, (B, D)).astype(np.float32) * np.where(np.arange(B) % 8, 1, 3).astype(np.float32)[:, None]
    spec = SAESpec("batchtopk", D, F, k=K, pre_bias=False)
    expected = np.asarray(batchtopk(pre_activations(spec, params, x), K))
    mesh = sharding.make_mesh(MeshOptions(*mesh_shape), jax.devices()[: mesh_shape[0] * mesh_shape[1]])
    with jax.set_mesh(mesh):
        given = (jax.tree.map(sharding.place, params, param_shardings(mesh, tensors(params))),
                 sharding.place(x, sharding.sharding(mesh, "rows", None)))
        pairs = jax.device_get(jax.jit(lambda params, x: sparse.selected(spec, params, x, K, over_batch=True))(*given))
    n_data, n_dict = mesh_shape
    got = np.zeros((n_data, B // n_data, n_dict, F // n_dict), np.float32)
    device = np.repeat(np.arange(n_data * n_dict), len(pairs.row_L) // (n_data * n_dict))
    at = (device // n_dict, pairs.row_L, device % n_dict)
    np.add.at(got, (*(value[:, None] for value in at), pairs.index_Ln), pairs.values_Ln)
    np.testing.assert_array_equal(got.reshape(B, F), expected)
    assert (expected > 0).sum(1).max() > 5 * K and (pairs.values_Ln > 0).sum() == B * K


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_few_dead_features_give_what_many_give(monkeypatch, dense, mesh_shape):
    """AuxK takes up to `FEW` dead features of a shard for an SAE of their own."""
    monkeypatch.setattr(losses, "FEW", F // 2 // mesh_shape[1])
    _, (got,) = loss_and_gradients(*of_case("topk"), mesh_shape, True, *inputs_of("topk"), 100)
    check_equal(dense["topk"][1], got)


def test_nothing_is_as_large_as_batch_times_features(monkeypatch):
    """The encoder goes tile by tile; over `dict` candidates and reconstructions move, and nothing wider than they is sorted."""
    monkeypatch.setattr(sparse, "TILE", 8 * F)
    text = loss_and_gradients(*of_case("topk"), (1, 1), True, *inputs_of("topk"))[0].as_text()
    assert f"f32[{B},{F}]" not in text and f"f32[8,{F}]" in text
    text = loss_and_gradients(*of_case("topk"), (1, 8), True, *inputs_of("topk"))[0].as_text()
    assert max(map(math.prod, moved_shapes(text))) <= B * D
    assert widest_sort(text) <= 4 * 8


@pytest.mark.parametrize("name", ["batchtopk", pytest.param("matryoshka", marks=pytest.mark.slow)])
def test_no_branch_of_a_selection_over_the_batch_is_as_large(monkeypatch, name):
    """Where rows keep more than there are candidates, all are counted, tile by tile: in no branch as many as B x F at once."""
    monkeypatch.setattr(sparse, "TILE", 8 * F)
    text = loss_and_gradients(*of_case(name), (1, 1), True, *inputs_of(name))[0].as_text()
    assert not re.search(rf"(f32|u32|s32|pred)\[(?:\d+,)*{B},{F}\]", text) and re.search(rf"f32\[8,{F}\]", text)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_pre_activations_are_not_sorted(name):
    """Not even where one tile holds the batch: XLA makes a sort, ten times as slow, of a top_k of which a part is read."""
    options, spec = of_case(name)
    params, x = inputs_of(name)
    encode = jax.jit(lambda params, x: sparse.selected(spec, params, x, K, over_batch=name == "batchtopk"))
    text = encode.lower(params, x).compile().as_text()
    assert "TopK" in text and widest_sort(text) < F


@pytest.mark.slow
def test_bfloat16_products_agree():
    options, spec = of_case("topk")
    spec = dataclasses.replace(spec, compute_dtype="bfloat16")
    (dense,), (pairs,) = (loss_and_gradients(options, spec, (1, 1), as_pairs, *inputs_of("topk"), 0)[1]
                          for as_pairs in (False, True))
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(pairs), strict=True):
        assert np.linalg.norm(np.float64(a) - np.float64(b)) <= 1e-2 * np.linalg.norm(np.float64(a))


@pytest.mark.parametrize("kind, d_sae, path, multi_topk, expected", [
    ("topk", 65_536, "auto", False, True), ("topk", 64, "auto", False, False), ("topk", 64, "sparse", False, True),
    ("topk", 65_536, "dense", False, False), ("relu", 65_536, "sparse", False, False), ("topk", 65_536, "sparse", True, False),
])
def test_which_path_is_taken(kind, d_sae, path, multi_topk, expected):
    config = SimpleNamespace(train=TrainOptions(path=path), sae=SAEOptions(multi_topk=multi_topk))
    assert takes_pairs(config, SAESpec(kind, 8, d_sae, k=32)) == expected
