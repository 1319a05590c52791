"""The synthetic world does what its description says, its scores have the values one can work out, and training
recovers it."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import saejax
from saejax.base.errors import SaejaxError, StoreError
from saejax.config import default_config, resolve
from saejax.data.arrays import write_rows
from saejax.data.store import Store
from saejax.data.verify import verify
from saejax.evals import synthetic
from saejax.evals.synthetic import Recovery, World, WorldOptions
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.params import SAEParams
from saejax.train import loop

FORESTRY = WorldOptions(features=60, d_in=12, max_rate=0.5, min_rate=0.02, roots=3, branching=3, depth=2, rank=4,
                        correlation=0.0, spread_mean=0.0, spread_std=1e-6, orthogonal_steps=0)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def forest():
    """True activations of 16,384 rows of a world with a tree of 39 features, without correlations."""
    return np.asarray(World.make(FORESTRY, 0).sample(KEY, 16_384)[1])


def parent_of(options: WorldOptions) -> dict[int, int]:
    """{child: parent} by walking the tree level by level."""
    out, level, following = {}, list(range(options.roots)), options.roots
    for _ in range(options.depth):
        children = []
        for parent in level:
            for _ in range(options.branching):
                out[following] = parent
                children.append(following)
                following += 1
        level = children
    return out


def expected_rates(options: WorldOptions) -> np.ndarray:
    """Exact rates of independent draws under the tree: a drawn child stays with probability 1 / (1 + rivals drawn)."""
    q, parent, rates = synthetic.drawn_rates(options), parent_of(options), None
    rates = q.copy()
    for child in sorted(parent):
        rivals = [i for i in parent if parent[i] == parent[child] and i != child]
        stays = 0.0
        for drawn in itertools.product((0, 1), repeat=len(rivals)):
            weight = np.prod([q[i] if d else 1 - q[i] for i, d in zip(rivals, drawn, strict=True)])
            stays += weight / (1 + sum(drawn))
        rates[child] = rates[parent[child]] * q[child] * stays
    return rates


def test_meant_rates_are_zipf():
    rates = synthetic.firing_rates(WorldOptions())
    assert rates[0] == pytest.approx(0.4) and rates[-1] == pytest.approx(5e-4)
    a, b, c = rates[[0, 3, 15]]  # 1, 1/2 and 1/4 before scaling to the range
    assert (a - b) / (b - c) == pytest.approx(2)


def test_published_world_has_its_tree():
    options = WorldOptions()
    assert options.levels == (128, 512, 2048, 8192) and options.tree_nodes == 10_880  # as published


def test_features_fire_at_the_rates_that_follow_from_the_tree(forest):
    expected, n = expected_rates(FORESTRY), len(forest)
    found, sigma = (forest > 0).mean(0), np.sqrt(expected * (1 - expected) / n)
    assert np.abs((found - expected) / sigma).max() < 4.5
    assert (forest > 0).sum(1).mean() == pytest.approx(expected.sum(), abs=0.06)
    alone = slice(FORESTRY.tree_nodes, None)
    assert np.array_equal(expected[alone], synthetic.firing_rates(FORESTRY)[alone])


def test_children_fire_only_with_their_parents_and_without_their_siblings(forest):
    fires, parent = forest > 0, parent_of(FORESTRY)
    for child, its in parent.items():
        assert fires[:, child].any() and not (fires[:, child] & ~fires[:, its]).any()
    for its in set(parent.values()):
        assert fires[:, [i for i in parent if parent[i] == its]].sum(1).max() == 1


def test_children_scale_with_their_parents():
    options = dataclasses.replace(FORESTRY, first_magnitude=5.0, last_magnitude=4.0, spread_mean=0.8)
    acts, mean = np.asarray(World.make(options, 0).sample(KEY, 16_384)[1]), np.linspace(5, 4, 60)
    both = acts[:, 3] > 0  # child 3 of root 0
    assert np.corrcoef(acts[both, 0], acts[both, 3])[0, 1] > 0.5
    binary = dataclasses.replace(options, scale_by_parent=False)
    plain = np.asarray(World.make(binary, 0).sample(KEY, 16_384)[1])
    np.testing.assert_array_equal(plain > 0, acts > 0)
    np.testing.assert_allclose(acts[both, 3], plain[both, 3] * acts[both, 0] / mean[0], rtol=1e-5)


def test_siblings_may_fire_together_when_not_exclusive():
    acts = np.asarray(World.make(dataclasses.replace(FORESTRY, exclusive=False), 0).sample(KEY, 2048)[1])
    assert (acts[:, 3:6] > 0).sum(1).max() == 3


def test_correlations_have_the_declared_strength_and_leave_the_rates_alone():
    options = dataclasses.replace(FORESTRY, roots=0, correlation=0.4, rank=2)
    world = World.make(options, 3)
    fires = np.asarray(world.sample(KEY, 16_384)[1]) > 0
    rates = synthetic.firing_rates(options)
    assert np.abs((fires.mean(0) - rates) / np.sqrt(rates * (1 - rates) / len(fires))).max() < 4.5
    latent = np.asarray(world.loading_FR) @ np.asarray(world.loading_FR).T
    strongest = np.unravel_index(np.argmax(latent[:10, :10] - np.eye(10) * 9), (10, 10))
    weakest = np.unravel_index(np.argmin(latent[:10, :10]), (10, 10))
    together = np.corrcoef(fires[:, :10].T)
    assert together[strongest] > 0.15 and together[weakest] < -0.1


@pytest.mark.parametrize("cuts", [(0, 1, 700), (0, 256, 512, 700), (0, 255, 300, 699, 700)])
def test_sampling_does_not_depend_on_the_batches(cuts):
    world = World.make(FORESTRY, 0)
    x, acts = world.sample(KEY, 700)
    parts = [world.sample(KEY, b - a, a) for a, b in itertools.pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), x)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), acts)
    assert [len(x) for x, _ in world.batches(KEY, 700, 300)] == [300, 300, 100]


def test_rows_are_sums_of_their_features():
    world = World.make(FORESTRY, 0)
    x, acts = (np.asarray(a, np.float64) for a in world.sample(KEY, 300))
    directions, bias = np.asarray(world.directions_FD, np.float64), np.asarray(world.bias_D)
    np.testing.assert_allclose(x, acts @ directions + bias, atol=1e-4)
    assert np.linalg.norm(world.bias_D) == pytest.approx(0.5)
    other, _ = world.sample(jax.random.key(8), 300)
    assert not np.array_equal(other, x)


def test_rows_drawn_inside_a_program_follow_the_same_laws(forest):
    world, key = World.make(FORESTRY, 0), jax.random.key(3, impl="rbg")
    x, acts = jax.jit(lambda key: world.draw(key, 5000))(key)
    assert x.shape == (5000, 12) and acts.shape == (5000, 60)
    np.testing.assert_allclose((np.asarray(acts) > 0).mean(0), (forest > 0).mean(0), atol=0.04)
    np.testing.assert_allclose(x, np.asarray(acts) @ np.asarray(world.directions_FD) + np.asarray(world.bias_D), atol=1e-4)


def test_orthogonalising_keeps_unit_rows_and_lowers_overlaps():
    def overlaps(steps):
        options = dataclasses.replace(FORESTRY, orthogonal_steps=steps, orthogonal_lr=3e-3)
        d = np.asarray(World.make(options, 0).directions_FD, np.float64)
        np.testing.assert_allclose(np.linalg.norm(d, axis=1), 1, atol=1e-5)
        return np.square(d @ d.T).sum() - len(d)

    welch = 60 * 60 / 12 - 60  # no 60 unit vectors in 12 dimensions overlap less
    assert overlaps(200) == pytest.approx(welch, rel=1e-3) and overlaps(0) > 1.1 * welch


def test_impossible_worlds_are_refused():
    with pytest.raises(SaejaxError, match="a tree of 85 nodes .* in 84 features"):
        WorldOptions(features=84, roots=1)
    with pytest.raises(SaejaxError, match="0 < min_rate < max_rate <= 1"):
        WorldOptions(min_rate=0.5)


TRUTH = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0].astype(np.float32)


def scores(W_dec, acts, true, x=None):
    """Scores of an SAE that activates as `acts` against the truth `true` on orthogonal directions."""
    x = true @ TRUTH if x is None else x
    recovery = Recovery(W_dec, TRUTH, x.mean(0))
    for rows in np.array_split(np.arange(len(x)), 3):
        recovery.add(x[rows], (acts @ W_dec)[rows], acts[rows], true[rows])
    return recovery.result()


@pytest.fixture(scope="module")
def true_acts():
    rng = np.random.default_rng(1)
    return ((rng.random((600, 8)) < 0.3) * rng.uniform(0.5, 2, (600, 8))).astype(np.float32)


def test_the_truth_scores_one(true_acts):
    found = scores(TRUTH, true_acts, true_acts)
    for name in ("mcc", "f1", "precision", "recall", "uniqueness", "explained_variance"):
        assert found[name] == pytest.approx(1, abs=1e-5), name
    assert found["l0"] == found["true_l0"] == pytest.approx((true_acts > 0).sum(1).mean())
    assert found["dead_features"] == 0 and found["rows"] == 600


def test_order_scale_and_sign_of_directions_do_not_matter(true_acts):
    order, sign = np.random.default_rng(2).permutation(8), np.array([1, -1, 3, -2, 1, 1, -1, 0.5], np.float32)
    found = scores(TRUTH[order] * sign[:, None], true_acts[:, order], true_acts)
    assert found["mcc"] == pytest.approx(1, abs=1e-5) and found["f1"] == 1 and found["uniqueness"] == 1
    assert found["explained_variance"] < 0.9  # activations do not fit the scaled decoder


def test_duplicates_cost_uniqueness_and_mcc(true_acts):
    kept = [0, 1, 2, 3, 4, 5, 6, 6]  # feature 6 twice, 7 not at all
    found = scores(TRUTH[kept], true_acts[:, kept], true_acts)
    assert found["uniqueness"] == 7 / 8 and found["f1"] == 1
    assert found["mcc"] == pytest.approx(7 / 8, abs=1e-5)  # the copy is left with a direction orthogonal to it


def test_the_matching_is_the_best_one():
    truth = np.eye(3, dtype=np.float32)
    W_dec = np.array([[0.8, 0.6, 0], [1, 0, 0]], np.float32)  # both are nearest to direction 0
    assert synthetic.best_matches(W_dec, truth).tolist() == [0, 0]
    assert synthetic.mcc(W_dec, truth) == pytest.approx((0.6 + 1) / 2)
    best = max(np.abs(W_dec @ truth.T)[[0, 1], list(p)].mean() for p in itertools.permutations(range(3), 2))
    assert synthetic.mcc(W_dec, truth) == pytest.approx(best) and synthetic.uniqueness(W_dec, truth) == 0.5


def test_f1_by_hand():
    true = np.zeros((10, 8), np.float32)
    acts = np.zeros((10, 8), np.float32)
    true[:4, 0], acts[2:8, 0] = 1, 1          # 2 of 6 firings right, 2 of 4 found: precision 1/3, recall 1/2, F1 0.4
    true[:5, 1], acts[:5, 1] = 1, 1           # perfect
    acts[0, 2] = 1                            # never true: 0; features 3-7 are dead: 0
    found = scores(TRUTH, acts, true)
    assert found["precision"] == pytest.approx((1 / 3 + 1) / 8) and found["recall"] == pytest.approx((1 / 2 + 1) / 8)
    assert found["f1"] == pytest.approx((0.4 + 1) / 8)
    assert found["dead_features"] == 5 and found["l0"] == pytest.approx(1.2) and found["true_l0"] == pytest.approx(0.9)


def test_a_random_dictionary_scores_low():
    rng = np.random.default_rng(3)
    truth, W_dec = rng.standard_normal((256, 64)), rng.standard_normal((64, 64))
    assert 0.2 < synthetic.mcc(W_dec, truth) < 0.45
    assert synthetic.mcc(truth[:64], truth) == pytest.approx(1, abs=1e-5)


SMALL = WorldOptions(features=64, d_in=24, max_rate=0.25, min_rate=0.02, roots=4, branching=2, depth=1, rank=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    world = World.make(SMALL, 0)
    path = tmp_path_factory.mktemp("synthetic") / "store"
    return world, synthetic.write_store(path, world, KEY, 16_384, context=64, shard_contexts=64)


def test_the_store_holds_the_rows(small):
    world, store = small
    x = np.asarray(world.sample(KEY, 16_384)[0])
    verify(store)
    stored = Store.open(store.path).read(synthetic.HOOKPOINT, 0, store.rows).astype(np.float32)
    np.testing.assert_allclose(stored, x, rtol=2**-8, atol=1e-30)
    assert store.kept_rows == store.rows == 16_384
    np.testing.assert_allclose(store.stats(synthetic.HOOKPOINT).mean_D, x.mean(0), atol=5e-3)


def test_too_few_rows_are_noticed(tmp_path):
    layout = {"context": 32, "shard_contexts": 1, "chunk_rows": 32}
    with pytest.raises(StoreError, match="hold 96 rows, 128 were announced"):
        write_rows(tmp_path / "a", [np.ones((96, 4))], 128, {"h": 3, "g": 1}, **layout)
    with pytest.raises(StoreError, match=r"shape \(8, 5\), expected \[n, 4\]"):
        write_rows(tmp_path / "b", [np.ones((8, 5))], 128, {"h": 3, "g": 1}, **layout)
    with pytest.raises(StoreError, match="hold more than 64 rows"):
        write_rows(tmp_path / "c", [np.ones((96, 4))], 64, {"h": 4}, **layout)


@pytest.mark.slow
def test_training_recovers_the_world(small, tmp_path):
    world, store = small
    c = default_config("topk")
    c.lm.model, c.run_dir = "synthetic", str(tmp_path / "run")
    c.harvest.hookpoints, c.sae.hookpoint = (synthetic.HOOKPOINT,), synthetic.HOOKPOINT
    c.text.context, c.stream.block_contexts, c.stream.window_rows = 64, 1, 4096
    c.sae.d_sae, c.sae.k, c.sae.aux_k, c.sae.dead_tokens = 64, 4, 16, 20_000
    c.train.batch, c.train.tokens, c.train.lr = 256, 256 * 800, 3e-3
    c.log.progress, c.log.tensorboard, c.checkpoint.every_tokens = False, False, 10**9
    loop.train(resolve(c), store)
    directions = np.asarray(world.directions_FD)
    held = list(world.batches(jax.random.key(99), 4096))
    trained = synthetic.score(saejax.load(tmp_path / "run"), held, directions)
    rng = np.random.default_rng(0)
    W = rng.standard_normal((64, 24)).astype(np.float32)
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    untrained = SAE(SAEParams(W_enc=W, b_enc=np.zeros(64, np.float32), W_dec=W, b_dec=np.zeros(24, np.float32)),
                    SAEConfig(kind="topk", d_in=24, d_sae=64, k=4, pre_bias=True,
                              hookpoints=("synthetic",), model="synthetic"))
    start = synthetic.score(untrained, held, directions)
    assert trained["mcc"] > 0.9 and start["mcc"] < 0.6
    assert trained["f1"] > 0.5 > 0.2 > start["f1"]
    assert trained["l0"] <= 4 and trained["explained_variance"] > 0.7 > start["explained_variance"]
