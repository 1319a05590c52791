"""Both passes of an index work on pairs and tiles: what the activations say, and no array of rows x features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.records import MeshOptions
from saejax.features.index import accumulate
from saejax.features.index.lookup import Lookup
from saejax.sae import SAEParams, sparse, tiles
from saejax.sae.inference import SAE, SAEConfig, selected_raw
from tests.features.reference import assert_equal, state_of

D, F, T, CONTEXTS = 16, 48, 8, 16
KINDS = ("relu", "jumprelu", "gated", "topk", "batchtopk", "groupmax")
# Every kind on one mesh; the others for the two ways of selecting, each feature by itself and the largest of a row.
CASES = [*((kind, (2, 4)) for kind in KINDS),
         *(pytest.param(kind, shape, marks=pytest.mark.slow) for kind in ("relu", "topk") for shape in ((1, 1), (1, 8), (8, 1)))]


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


def on_mesh(kind: str, shape: tuple[int, int]) -> tuple[SAE, tuple[jax.Array, jax.Array], np.ndarray]:
    """(SAE on a mesh, rows and which of them count there, all activations of those)."""
    mesh, (x, keep) = sharding.make_mesh(MeshOptions(*shape), jax.devices()[:shape[0] * shape[1]]), rows()
    return made(kind, mesh), placed(mesh, x, keep), np.where(keep[:, None], np.asarray(made(kind).encode(x)), 0)


@pytest.mark.parametrize("kind, shape", CASES)
def test_the_state_is_that_of_the_activations(kind, shape, monkeypatch):
    in_tiles(monkeypatch)
    sae, given, acts = on_mesh(kind, shape)
    step, state = accumulate.make_step(sae, T, CONTEXTS), accumulate.empty_state(F, sae.mesh)
    with jax.set_mesh(sae.mesh):
        state = step(state, sae.params, *given, jnp.uint32(0))
    assert (acts > 0).sum() > len(acts)
    assert_equal(jax.tree.map(sharding.to_host, state), state_of(acts, T))


@pytest.mark.parametrize("kind, shape", CASES)
def test_windows_are_those_of_the_activations(kind, shape, monkeypatch):
    in_tiles(monkeypatch)
    sae, (x_BD, keep_B), acts = on_mesh(kind, shape)
    row, feature = (index.astype(np.int32) for index in np.nonzero(acts[::T]))
    row, feature = np.resize(row * T, 128), np.append(np.sort(np.resize(feature, 127)), np.int32(-1))
    lookup = Lookup.of(sae, T)
    with jax.set_mesh(sae.mesh):
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


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1), (1, 8)])
@pytest.mark.parametrize("k", [6, 32])
@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_places_for_pairs_are_counted(kind, k, shape):
    """Those of a batch on a device once they are gathered along `data`, the empty ones among them."""
    mesh = sharding.make_mesh(MeshOptions(*shape), jax.devices()[:shape[0] * shape[1]])
    sae, B = SAE(made(kind, mesh, 1024).params, SAEConfig(kind, D, 1024, k, False, ("h",), "tiny"), mesh), CONTEXTS * T
    with jax.set_mesh(mesh):
        pairs = jax.eval_shape(lambda params, x: selected_raw(sae.cfg.spec, "none", params, x), sae.params,
                               *placed(mesh, *rows())[:1])
    there, most = pairs.values_Ln.size // shape[1], B * accumulate.pairs_per_row(sae)
    assert most - B * 16 < there <= most, "a line that is not full for each row"


def sized(kind: str, features: int, k: int, data: int) -> SAE:
    sae = SAE(None, SAEConfig(kind, 64, features, k, False, ("h",), "tiny"))
    sae.mesh = sharding.make_mesh(MeshOptions(data, 1), jax.devices()[:data])
    return sae


def test_a_batch_has_no_more_pairs_than_are_counted(monkeypatch):
    monkeypatch.setattr(accumulate, "MEMORY", 1e9)
    for kind, k, data, per_row in (("topk", 32, 2, 32), ("batchtopk", 32, 2, 64 + 16), ("relu", 0, 2, accumulate.PAIRS_PER_ROW)):
        contexts = accumulate.batch_contexts(sized(kind, 4096, k, data), 128, 10**9, rows=10**12)
        assert contexts * 128 * per_row <= accumulate.COUNTED < (contexts + data) * 128 * per_row


@pytest.mark.parametrize("given, context, message", [
    (("topk", 1 << 20, 1 << 13, 2), 1 << 17, "2 contexts of 131072 tokens.*config.mesh.data=2.*2147483648 active.*k=8192"),
    (("batchtopk", 1 << 20, 128, 8), 1 << 17, "8 contexts of 131072 tokens.*index shorter contexts"),
    (("relu", 1 << 20, 0, 1), 1 << 25, "1 contexts of 33554432 tokens"),
    (("topk", 1 << 27, 32, 1), 128, "134217728 features on a device: an index holds at most 67108864 there.*mesh.dict=1")])
def test_what_cannot_be_counted_is_refused(given, context, message):
    with pytest.raises(FeatureIndexError, match=message) as raised:
        accumulate.batch_contexts(sized(*given), context, 10)
    assert "\n" not in str(raised.value)
    kind, features, k, _ = given
    assert accumulate.batch_contexts(sized(kind, features // 2, k // 2, 1), min(context, 1 << 16), 1) == 1, "which is counted"
