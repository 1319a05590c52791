"""Both passes of an index work on pairs and tiles: what the activations say, and no array of rows x features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.features.index import accumulate
from saejax.features.index.lookup import Lookup
from saejax.sae import SAEParams, sparse, tiles
from saejax.sae.inference import SAE, SAEConfig
from tests.features.reference import assert_equal, state_of

D, F, T, CONTEXTS = 16, 48, 8, 16
KINDS = ("relu", "jumprelu", "gated", "topk", "batchtopk", "groupmax")
MESHES = [(2, 4), pytest.param((1, 1), marks=pytest.mark.slow), pytest.param((1, 8), marks=pytest.mark.slow),
          pytest.param((8, 1), marks=pytest.mark.slow)]


def made(kind: str, mesh=None, features: int = F) -> SAE:
    """Small integers: products are exact in float32, so that no order of summation shows."""
    rng = np.random.default_rng(0)

    def whole(low, high, *shape):
        return jnp.asarray(rng.integers(low, high, shape).astype(np.float32))

    own = {"jumprelu": {"threshold": whole(0, 30, features)},
           "gated": {"r_mag": jnp.zeros(features), "b_mag": whole(-9, 9, features)}}.get(kind, {})
    W = whole(-4, 5, features, D)
    params = SAEParams(W, whole(-30, 3, features), W, jnp.zeros(D), per_feature=own)
    k = 6 if kind in ("topk", "batchtopk", "groupmax") else 0
    return SAE(params, SAEConfig(kind, D, features, k, kind == "topk", ("h",), "tiny"), mesh)


def rows(contexts: int = CONTEXTS):
    rng = np.random.default_rng(1)
    return rng.integers(-3, 4, (contexts * T, D)).astype(np.float32), rng.random(contexts * T) > 0.1


def placed(mesh, x, keep):
    return (sharding.place(x, sharding.sharding(mesh, "rows", "d_in")), sharding.place(keep, sharding.sharding(mesh, "rows")))


def in_tiles(monkeypatch, size: int = 5) -> None:
    """Tiles that do not divide a shard, and several rounds."""
    monkeypatch.setattr(tiles, "tile_width", lambda rows, features, chip: min(features, size))
    monkeypatch.setattr(accumulate, "PAIRS_PER_ROW", 3)
    for name in ("TILE", "TILE_ELSEWHERE", "ROWS_AT_ONCE"):
        monkeypatch.setattr(sparse, name, 1)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_of_the_activations(kind, shape, monkeypatch):
    in_tiles(monkeypatch)
    mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[:shape[0] * shape[1]])
    sae, (x, keep) = made(kind, mesh), rows()
    step, state = accumulate.make_step(sae, T, CONTEXTS), accumulate.empty_state(F, mesh)
    with jax.set_mesh(mesh):
        state = step(state, sae.params, *placed(mesh, x, keep), jnp.uint32(0))
    acts = np.where(keep[:, None], np.asarray(made(kind).encode(x)), 0)
    assert (acts > 0).sum() > len(x)
    assert_equal(jax.tree.map(sharding.to_host, state), state_of(acts, T))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_the_activations(kind, shape, monkeypatch):
    in_tiles(monkeypatch)
    mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[:shape[0] * shape[1]])
    sae, (x, keep) = made(kind, mesh), rows()
    acts = np.where(keep[:, None], np.asarray(made(kind).encode(x)), 0)
    row, feature = (index.astype(np.int32) for index in np.nonzero(acts[::T]))
    row, feature = np.resize(row * T, 128), np.append(np.sort(np.resize(feature, 127)), np.int32(-1))
    lookup = Lookup.of(sae, T)
    with jax.set_mesh(mesh):
        x_BD, keep_B = placed(mesh, x, keep)
        found = np.asarray(lookup.gather(sae.params, lookup.prepare(sae.params, x_BD), keep_B, row, feature))
    expected = acts[row[:, None] + np.arange(T), feature[:, None]]
    np.testing.assert_array_equal(found[:-1], expected[:-1])
    assert not found[-1].any() and expected.any(), "no such feature"


def sizes(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all that a program makes."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {value.aval.shape for value in equation.outvars}
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found |= sizes(inner if hasattr(inner, "eqns") else inner.jaxpr)
    return found


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated", "topk"])
def test_no_array_of_rows_x_features(kind, monkeypatch):
    in_tiles(monkeypatch, 16)
    mesh, contexts, features = sharding.make_mesh(MeshOptions(1, 8)), 256, 1024
    sae, (x, keep) = made(kind, mesh, features), rows(contexts)
    step, lookup = accumulate.make_step(sae, T, contexts), Lookup.of(sae, T)
    wanted = np.zeros(64, np.int32), np.zeros(64, np.int32)
    with jax.set_mesh(mesh):
        x_BD, keep_B = placed(mesh, x, keep)
        table = lookup.prepare(sae.params, x_BD)
        made_ = [jax.make_jaxpr(step)(accumulate.empty_state(features, mesh), sae.params, x_BD, keep_B, np.uint32(0)),
                 jax.make_jaxpr(lookup.prepare)(sae.params, x_BD),
                 jax.make_jaxpr(lookup.gather)(sae.params, table, keep_B, *wanted)]
    largest = max(np.prod(shape, dtype=int) for one in made_ for shape in sizes(one.jaxpr))
    assert largest < len(x) * features // 8, "less than the activations of a shard"


@pytest.mark.parametrize("kind, features, contexts, expected", [
    ("topk", 4096, 10, 10), ("topk", 4096, 10**6, accumulate.ROWS // 128), ("relu", 4096, 10**6, accumulate.ROWS // 128),
    ("topk", 1 << 22, 10**6, 2), ("groupmax", 1 << 20, 10**6, 1)])
def test_a_batch_is_as_large_as_its_memory_allows(kind, features, contexts, expected):
    sae = SAE(None, SAEConfig(kind, 64, features, 32, False, ("h",), "tiny"))
    sae.mesh = sharding.single_device_mesh()
    assert accumulate.batch_contexts(sae, 128, contexts) == expected
