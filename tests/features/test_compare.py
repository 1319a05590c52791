"""Two dictionaries: both ways in one pass, on meshes too; matches by firing against dense correlations, apart from directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_array

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.features.compare import firing
from saejax.features.compare.dictionaries import compare, write
from saejax.features.index.neighbours import nearest, nearest_both_ways
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig

F, D, K = 128, 64, 4
MESHES = [None, (1, 8), (2, 4)]


def mesh_of(sizes):
    return None if sizes is None else sharding.make_mesh(MeshOptions(*sizes))


def sae_of(W_enc, W_dec, mesh=None, kind="topk") -> SAE:
    params = SAEParams(W_enc=jnp.asarray(W_enc), b_enc=jnp.zeros(len(W_enc)), W_dec=jnp.asarray(W_dec), b_dec=jnp.zeros(D))
    k = K if kind == "topk" else 0
    return SAE(params, SAEConfig(kind, D, len(W_enc), k, False, ("blocks.1.hook_resid_post",), "tiny"), mesh)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((F, D)).astype(np.float32)
    return W / np.linalg.norm(W, axis=1, keepdims=True), rng.standard_normal((3000, D)).astype(np.float32)


@pytest.mark.parametrize("sizes", MESHES)
def test_both_ways_in_one_pass_are_the_two_passes(sizes):
    rng, mesh = np.random.default_rng(1), mesh_of(sizes)
    a, b = (rng.standard_normal((n, D)).astype(np.float32) for n in (512, 768))
    a[5], a[9], b[11] = 0, a[8], b[10]

    def placed(x):
        return jnp.asarray(x) if mesh is None else jax.device_put(x, sharding.sharding(mesh, "features", None))

    expected = [x[:, 0] for x in (*nearest(placed(b), a, 1, mesh), *nearest(placed(a), b, 1, mesh))]
    for pieces in ([a], [a[:300], a[300:]]):
        found = nearest_both_ways(placed(b), pieces, mesh)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[2], expected[2])
        np.testing.assert_allclose(found[1], expected[1], atol=3e-7)  # a block that is not full may be summed in another order
        np.testing.assert_allclose(found[3], expected[3], atol=3e-7)


def test_the_program_of_a_block_has_one_product():
    from saejax.features.index.neighbours import _both_ways
    mesh = sharding.single_device_mesh()
    with jax.set_mesh(mesh):
        rows = jax.device_put(np.ones((512, D), np.float32), sharding.sharding(mesh, "features", None))
        best = [sharding.place(np.zeros(512, kind), sharding.sharding(mesh, "features")) for kind in (np.int32, np.float32)]
        cost = _both_ways.lower(rows, np.ones((256, D), np.float32), *best, np.int32(0), np.int32(256)).cost_analysis()
    assert cost["flops"] < 1.5 * 2 * 256 * 512 * D


def dense(acts_A, acts_B):
    """Every correlation [F_A, F_B], NaN where fewer than three rows are shared or one never fires."""
    A, B = (x.toarray().astype(np.float64) for x in (acts_A, acts_B))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(A.T, B.T)[:A.shape[1], A.shape[1]:]
    return r, np.where((A > 0).T.astype(int) @ (B > 0) >= firing.LEAST_SUPPORT, r, np.nan)


@pytest.mark.parametrize("products", [1, 200, 1 << 24])
def test_matches_are_those_of_dense_correlations(monkeypatch, products):
    monkeypatch.setattr(firing, "_PRODUCTS", products)
    rng = np.random.default_rng(2)
    a, b = ((rng.random((400, n)) * (rng.random((400, n)) < 0.04)).astype(np.float32) for n in (60, 50))
    b[:, :20] = a[:, 20:40] * (0.5 + rng.random((400, 20)))
    a[:, 7], b[:, 45] = 0, 0
    named_A, named_B = rng.integers(0, 50, 60), rng.integers(0, 60, 50)
    acts = csr_array(a), csr_array(b)
    found, (whole, some) = firing.matches(*acts, named_A, named_B), dense(*acts)
    for match, r, table in ((found.match_A, found.r_A, some), (found.match_B, found.r_B, some.T)):
        filled = np.where(np.isnan(table), -1, table)
        best = filled.max(1) > 0
        np.testing.assert_array_equal(match, np.where(best, filled.argmax(1), -1))
        np.testing.assert_allclose(r[best], filled.max(1)[best], atol=1e-9)
        assert np.isnan(r[~best]).all()
    np.testing.assert_allclose(found.pair_A, whole[np.arange(60), named_A], atol=1e-9)
    np.testing.assert_allclose(found.pair_B, whole[named_B, np.arange(50)], atol=1e-9)
    assert found.match_A[7] == -1 and np.isnan(found.pair_A[7])


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_active_pairs_are_the_activations(world, kind, monkeypatch):
    W, x = world
    monkeypatch.setattr(firing, "_PIECE", 700 * F)
    monkeypatch.setattr(firing, "_ROWS", 700)
    for sizes in MESHES:
        sae = sae_of(W, W, mesh_of(sizes), kind)
        np.testing.assert_allclose(firing.active(sae, x).toarray(), sharding.to_host(sae.encode(x)), atol=1e-6)


def test_dictionaries_of_different_placement(world):
    """One on one device, the other over a mesh, and the other way round."""
    W, x = world
    order = np.random.default_rng(6).permutation(F)
    one, whole = sae_of(W, W), sae_of(W[order], W[order], mesh_of((2, 4)))
    for a, b, expected in ((one, whole, np.argsort(order)), (whole, one, order)):
        found = compare(a, b, [x], progress=False)
        np.testing.assert_array_equal(found.match_A, expected)
        np.testing.assert_array_equal(found.firing.match_A, expected)


def test_firing_and_direction_are_apart(world, tmp_path):
    """B reads as A does in one order and writes as A does in another: each measure finds its own."""
    W, x = world
    read, written = (np.random.default_rng(seed).permutation(F) for seed in (3, 4))
    found = compare(sae_of(W, W), sae_of(W[read], W[written]), [x[:1000], x[1000:]], progress=False)
    np.testing.assert_array_equal(found.match_A[written], np.arange(F))
    np.testing.assert_array_equal(found.firing.match_A[read], np.arange(F))
    np.testing.assert_array_equal(found.firing.match_B, read)
    shares = found.shares()
    fixed = float((read == written).mean())
    assert shares["shared_A"] == shares["by_firing"]["shared_A"] == 1 and shares["by_firing"]["rows"] == 3000
    assert shares["by_firing"]["same_A"] == fixed < 0.1 and shares["by_firing"]["other_A"] == 1 - fixed
    assert shares["by_firing"]["correlation"] == pytest.approx(1) and shares["by_firing"]["paired"] < 0.2
    write(found, tmp_path / "matches.parquet")
    table = pq.read_table(tmp_path / "matches.parquet").to_pandas()
    assert len(table) == 2 * F and (table.match != table.firing_match).mean() > 0.9


def test_only_one_of_the_measures_shares(world):
    """Half of B's features write elsewhere, a quarter of the others read elsewhere."""
    W, x = world
    other = np.random.default_rng(5).standard_normal((2, F, D)).astype(np.float32)
    reads, writes = W.copy(), W.copy()
    writes[:F // 2], reads[F // 2:5 * F // 8] = other[0, :F // 2], other[1, F // 2:5 * F // 8]
    said = compare(sae_of(W, W, kind="relu"), sae_of(reads, writes, kind="relu"), [x], progress=False).shares()["by_firing"]
    assert said["firing_alone_A"] == 0.5 and said["direction_alone_A"] == 0.125 and said["same_A"] == 0.375
    assert said["silent_A"] <= 0.125 and compare(sae_of(W, W), sae_of(W, W), progress=False).firing is None
    assert "by_firing" not in compare(sae_of(W, W), sae_of(W, W), [], progress=False).shares()
