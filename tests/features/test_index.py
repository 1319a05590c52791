"""An index against brute force on the same rows, what it was made from, interruptions, and everything that is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError, FormatError
from saejax.base.records import MeshOptions
from saejax.data.text import Text
from saejax.features.index import bits, corpus, examples, fidelity
from saejax.features.index import build as building
from saejax.features.index.build import BuildOptions, build
from saejax.features.index.neighbours import Coactivation, nearest
from saejax.features.index.reader import FILES, MANIFEST, FeatureIndex, manifest_digest, sae_fingerprint
from saejax.features.index.state import FIELDS, FeatureState
from saejax.lm import capture
from saejax.sae.inference import SAE
from tests import tiny_experiment as tiny
from tests.features.conftest import DEAD, FEATURES, make_sae, other_lm
from tests.features.reference import random_acts, state_of

QUIET = BuildOptions(rows=512, progress=False)


@pytest.fixture(scope="module")
def acts(sae, store):
    """All activations [N, F]; 0 at masked tokens."""
    x = store.read(tiny.HOOKPOINT, 0, store.rows)
    return np.where(store.keep(0, store.rows)[:, None], np.asarray(make_sae().encode(x)), 0)


def test_numbers_of_features_are_those_of_all_activations(index, acts, store):
    fired = (acts > 0).sum(0)
    np.testing.assert_array_equal(index.column("fired"), fired)
    np.testing.assert_allclose(index.column("density"), fired / store.kept_rows)
    np.testing.assert_allclose(index.column("max"), acts.max(0), rtol=1e-5)
    np.testing.assert_allclose(index.column("mean"), acts.sum(0, dtype=np.float64) / np.maximum(fired, 1), rtol=1e-5)
    W = np.asarray(make_sae().W_dec)
    np.testing.assert_allclose(index.column("decoder_norm"), np.linalg.norm(W, axis=1), rtol=1e-5)
    totals = index.manifest["totals"]
    assert totals["dead"] == len(DEAD) == (fired == 0).sum() and totals["kept_rows"] == store.kept_rows
    assert totals["l0"] == pytest.approx(fired.sum() / store.kept_rows)
    assert sum(totals["density_histogram"]["counts"]) + totals["density_histogram"]["never"] == FEATURES


def test_histograms_and_tokens_of_a_feature(index, acts, store):
    row, values = index.rows(3, 4)[0], acts[:, 3][acts[:, 3] > 0]
    assert sum(row["log_counts"]) == sum(row["linear_counts"]) == len(values)
    edges = np.arange(65) * row["linear_width"]
    np.testing.assert_array_equal(row["linear_counts"], np.histogram(values, edges)[0])
    np.testing.assert_array_equal(row["log_counts"][:5],
                                  np.histogram(values, row["log_edges"][5::-1])[0][::-1])
    exact = np.histogram(values, np.linspace(0, values.max(), 11))[0]
    np.testing.assert_allclose(row["interval_counts"], exact, atol=0.05 * len(values))
    tokens = store.tokens(0, store.rows)
    share = np.bincount(tokens, acts[:, 3], 32) / acts[:, 3].sum()
    for token, estimate in zip(row["token_ids"][:3], row["token_shares"][:3], strict=True):
        assert estimate == pytest.approx(share[token], abs=0.15), "128 samples"
    assert abs(sum(row["token_shares"]) - 1) < 0.2 or len(row["token_ids"]) == examples.TOP_TOKENS


def test_examples_are_the_rows_they_say(index, acts, store):
    for feature in (3, 9, 20):
        found = index.examples(feature)
        top = [e for e in found if e["interval"] == 0]
        per_context = acts[:, feature].reshape(-1, store.context).max(1)
        np.testing.assert_allclose([e["value"] for e in top], np.sort(per_context)[::-1][:20], rtol=1e-5)
        assert len({e["context"] for e in top}) == len(top) == examples.TOP_EXAMPLES
        assert {e["interval"] for e in found} >= {0, 1, 2, 3}
        for e in found:
            row = e["context"] * store.context + e["position"]
            assert e["value"] == pytest.approx(acts[row, feature], rel=1e-5)
            around = acts[e["context"] * store.context + e["start"]:][:index.window, feature]
            np.testing.assert_allclose(e["acts"], around, rtol=1e-5, atol=1e-6)
            if e["interval"]:
                share = e["value"] / acts[:, feature].max() * examples.INTERVALS
                assert e["interval"] - 1 - 1e-4 < share <= e["interval"] + 1e-4


def test_rows_are_normalised_as_the_sae_says(words, store, lm_, tmp_path):
    """The index once passed over `input_norm`, and held activations that the SAE never gives."""
    sae = make_sae(sharding.single_device_mesh())
    sae = SAE(sae.params, dataclasses.replace(sae.cfg, input_norm="layer_norm"), sae.mesh)
    index = build(tmp_path / "features", sae, words, lm_, QUIET)
    acts = np.asarray(sae.encode(store.read(tiny.HOOKPOINT, 0, store.rows)))
    kept = store.keep(0, store.rows)
    np.testing.assert_allclose(index.column("max"), acts[kept].max(0), rtol=1e-5)
    for e in index.examples(3):
        around = np.where(kept, acts[:, 3], 0)[e["context"] * store.context + e["start"]:][:index.window]
        np.testing.assert_allclose(e["acts"], around, rtol=1e-5, atol=1e-6)


def test_dead_features_have_no_examples(index):
    for feature in DEAD:
        assert index.examples(feature) == [] and index.rows(feature, feature + 1)[0]["token_ids"] == []


def test_interval_samples_are_the_least_keys_of_their_interval():
    """Though bins lie across the ends of intervals, up to the last key that is known of such a bin."""
    acts = (random_acts(np.random.default_rng(5), 4096, 12, density=0.9) > 0) * np.random.default_rng(6).uniform(
        0, 3, (4096, 12)).astype(np.float32)
    fields, chosen, uniform = state_of(acts, 16), 0, 0
    state = FeatureState(**{name: fields[name] for name in FIELDS})
    for interval in range(1, 11):
        feature, slot = examples.interval_sample(state, interval)
        keys, values = fields["sample_key"].reshape(12, -1), fields["sample_value"].reshape(12, -1)
        assert set(feature) == set(range(11)), "the last is dead"
        for f in range(11):
            mine, top = slot[feature == f], np.float64(acts[:, f].max())
            low, high = top * (interval - 1) / 10, top * interval / 10
            assert ((values[f, mine] > low) & (values[f, mine] <= high)).all() and len(mine) >= 1
            chosen += len(mine)
            rows = np.flatnonzero((acts[:, f] > low) & (acts[:, f] <= high)).astype(np.uint32)
            least = np.sort(bits.pair_key(np.array([f]), rows))[:5]
            edges = bits.code_edge((np.float32(top).view(np.uint32) >> 21) + 1 - np.arange(17))
            beside = [b for b in range(16) if edges[b] > low and edges[b + 1] <= high]
            known = fields["sample_key"][f, beside, -1].min()
            np.testing.assert_array_equal(keys[f, mine][keys[f, mine] <= known], least[least <= known])
            uniform += (least <= known).sum()
    assert chosen > 0.9 * 550 and uniform > 0.6 * 550, "11 features, 10 intervals, 5 examples"


def test_nearest_by_cosine_and_logit_effects(index, lm_):
    W = np.asarray(make_sae().W_dec)
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosine = unit @ unit.T - 2 * np.eye(FEATURES)
    whole = lm_.model.whole
    table = np.asarray(whole["embed" if lm_.cfg.tied_embeddings else "unembed"][...], np.float64)
    for row in index.rows(0, FEATURES):
        f = row["feature"]
        np.testing.assert_allclose(row["cosine_scores"], np.sort(cosine[f])[::-1][:10], atol=1e-5)
        effect = table @ (W[f] * np.asarray(whole["final_norm"][...]))
        effect -= effect[lm_.known_V].mean()
        effect = np.where(lm_.known_V, effect, -np.inf)
        np.testing.assert_allclose(row["logit_effects"][:10], np.sort(effect)[::-1][:10], atol=1e-5)
        np.testing.assert_allclose(effect[row["logit_ids"]], row["logit_effects"], atol=1e-5)


def test_features_that_fire_together_are_found():
    """Against the correlation of all rows: a pair that shares most of its rows, and one that shares none."""
    rng = np.random.default_rng(0)
    acts = (rng.random((20_000, 30)) < rng.uniform(0.005, 0.05, 30)).astype(np.float32)
    acts[:, 1] = acts[:, 0] * (rng.random(20_000) < 0.8)
    acts[:, 2] = acts[:, 3] * (rng.random(20_000) < 0.5)
    fields = state_of(acts, 16)
    count_F, *columns = Coactivation(fields["sketch"], fields["fired"], 20_000).of(0, 30, 5)
    found = [list(zip(*part, strict=True)) for part in zip(*(np.split(x, np.cumsum(count_F)[:-1]) for x in columns), strict=True)]
    exact = np.corrcoef(acts.T)
    for a, b in ((0, 1), (1, 0), (2, 3), (3, 2)):
        feature, phi, support = found[a][0]
        assert feature == b and support >= 3 and phi == pytest.approx(exact[a, b], abs=0.2)
    assert all(phi < 0.3 for f in range(4, 30) for _, phi, _ in found[f])


def test_every_example_run_again_gives_its_activation(index, sae, lm_):
    found = fidelity.check(index, sae, lm_, 10**9)
    assert found.examples == index.manifest["totals"]["examples"] > 1000
    assert found.within_tolerance > 0.99 and found.mean_difference < 1e-3, found


def stopping(words, calls: list[int], n: int) -> corpus.Corpus:
    """Which reads n batches, and notes the first row of each that it is asked for."""
    def activations(start, stop, tokens):
        calls.append(start)
        if len(calls) > n:
            raise KeyboardInterrupt
        return words.activations(start, stop, tokens)

    return dataclasses.replace(words, activations=activations)


def test_interrupted_is_as_uninterrupted(index, sae, words, lm_, tmp_path):
    options = BuildOptions(rows=512, save_rows=1024, progress=False)
    out, calls = tmp_path / "features", []
    for n, begins in ((5, 0), (4, 2048), (6, 0)):  # in the first pass, behind its end, in the second pass
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            build(out, sae, stopping(words, calls, n), lm_, options)
        assert calls[0] == begins and not (out / MANIFEST).exists()
    with pytest.raises(FeatureIndexError, match="missing, so there is no finished index"):
        FeatureIndex.open(out)
    calls.clear()
    resumed = build(out, sae, stopping(words, calls, 9), lm_, options)
    assert calls[0] == 3072, "the second pass went on, too"
    assert resumed.manifest == index.manifest, "digests of all files among it"
    assert not (out / building.PROGRESS).exists()


def test_what_takes_long_is_saved_by_the_clock(index, sae, words, lm_, tmp_path):
    for seconds, saved in ((1e9, 0), (0.0, 5)):
        out, calls = tmp_path / str(saved), []
        options = dataclasses.replace(QUIET, save_rows=1 << 40, save_seconds=seconds)
        for passes in range(2):  # interrupted in each of them
            with pytest.raises(KeyboardInterrupt):
                build(out, sae, stopping(words, calls, 5 if passes == 0 else 8 - saved + 5), lm_, options)
            assert calls[0] == passes * saved * 512
            calls.clear()
        resumed = build(out, sae, stopping(words, calls, 8 - saved), lm_, options)
        assert calls == list(range(saved * 512, 8 * 512, 512)), "the rest of the second pass"
        assert resumed.manifest == index.manifest, "digests of all files among it"


@pytest.mark.parametrize("shape", [pytest.param(s, marks=pytest.mark.slow) for s in ((2, 4), (1, 8))])
def test_a_sharded_build_gives_the_same_index(index, words, lm_, tmp_path, shape):
    sharded = build(tmp_path / "features", make_sae(sharding.make_mesh(MeshOptions(*shape))), words, lm_, QUIET)
    np.testing.assert_array_equal(sharded.column("fired"), index.column("fired"))
    for feature in range(FEATURES):
        a, b = sharded.examples(feature), index.examples(feature)
        for name in ("interval", "context", "position"):
            assert [e[name] for e in a] == [e[name] for e in b]
        np.testing.assert_allclose([e["acts"] for e in a], [e["acts"] for e in b], rtol=1e-5, atol=1e-6)


def test_text_and_its_store_give_the_same_index(index, config, sae, lm_, store, tmp_path):
    text = corpus.from_text(Text.of(config), lm_, (tiny.HOOKPOINT,), split="train", tokens=store.rows,
                            batch=config.lm.batch_contexts)
    other = build(tmp_path / "features", sae, text, lm_, QUIET)
    np.testing.assert_array_equal(other.tokens_NT, index.tokens_NT)
    np.testing.assert_allclose(other.column("max"), index.column("max"), rtol=0.02)
    np.testing.assert_allclose(other.column("fired"), index.column("fired"), atol=5)


def test_an_index_of_something_else_is_refused(index, sae, words, lm_, tmp_path):
    another = make_sae(sharding.single_device_mesh(), seed=1)
    assert sae_fingerprint(another) != sae_fingerprint(sae) == sae_fingerprint(make_sae())
    for arguments, message in (({"sae": another}, "another checkpoint"), ({"lm_": other_lm(lm_)}, "another model"),
                               ({"sae": another, "lm_": other_lm(lm_)}, "another checkpoint.* and another model")):
        with pytest.raises(FeatureIndexError, match=message):
            FeatureIndex.open(index.path, **arguments)
    with pytest.raises(FeatureIndexError, match="another checkpoint"):
        build(index.path, another, words, lm_, QUIET)
    with pytest.raises(FeatureIndexError, match="another corpus"):
        build(index.path, sae, dataclasses.replace(words, digest="x"), lm_, QUIET)
    with pytest.raises(FeatureIndexError, match="another language model"):
        build(tmp_path / "features", sae, words, other_lm(lm_), QUIET)
    with pytest.raises(FeatureIndexError, match="another checkpoint"):
        fidelity.check(index, another, lm_, 10)
    assert build(index.path, sae, words, lm_, QUIET).manifest == index.manifest, "the one that is there is opened"


def test_a_directory_of_others_is_left_alone(sae, words, lm_, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FeatureIndexError, match="is not empty"):
        build(tmp_path, sae, words, lm_, QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_every_token_id_has_a_text(index):
    known = len(index.vocabulary)
    assert [index.token(np.int32(i)) for i in (0, known - 1)] == [index.vocabulary[0], index.vocabulary[-1]]
    assert index.token(known) == f"token {known}" and index.token(-1) == "token -1"


def test_features_out_of_range_are_named(index):
    for feature in (-1, FEATURES, 10**9):
        with pytest.raises(FeatureIndexError, match=f"feature {feature}.*0 to {FEATURES - 1}"):
            index.examples(feature)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_named(index, tmp_path, name):
    import shutil
    copy = tmp_path / "features"
    shutil.copytree(index.path, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FeatureIndexError, match=name):
        FeatureIndex.open(copy, full=True)
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(FeatureIndexError, match=name):
        FeatureIndex.open(copy)


@pytest.mark.parametrize("change, message", [({"schema_version": 99}, "schema version 99"), ({"kind": "x"}, "not the manifest"),
                                             ({"totals": {}}, "altered")])
def test_manifests_are_checked(index, tmp_path, change, message):
    values = json.loads((index.path / MANIFEST).read_text()) | change
    if "totals" not in change:
        values["sha256"] = manifest_digest(values)
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(FeatureIndexError, match=message):
        FeatureIndex.open(tmp_path)


def test_another_width_is_refused(sae, words, lm_, tmp_path):
    wide = dataclasses.replace(words, activations=lambda a, b, t: np.pad(words.activations(a, b, t), ((0, 0), (0, 1))))
    with pytest.raises(FormatError, match="width 48, the corpus has 49"):
        build(tmp_path / "features", sae, wide, lm_, QUIET)


def test_queries_by_direction(sae):
    mesh = sae.mesh
    W = np.asarray(sae.params.W_dec)
    ids, cosines = nearest(sae.params.W_dec, W[[4, 9]] * 3, 2, mesh)
    assert ids[:, 0].tolist() == [4, 9] and cosines[:, 0] == pytest.approx([1, 1], abs=1e-5)


def test_capture_and_store_agree_on_places(lm_, index, store):
    """Row numbers of the index are those of the store: context x length + position."""
    tokens = np.asarray(index.tokens_NT[:2])
    np.testing.assert_array_equal(tokens.reshape(-1), store.tokens(0, 2 * store.context))
    x = jax.jit(lambda model: capture(model, tokens, [tiny.HOOKPOINT])[tiny.HOOKPOINT])(lm_.model).astype(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(x, np.float32).reshape(-1, tiny.D_IN),
                               np.asarray(store.read(tiny.HOOKPOINT, 0, 2 * store.context), np.float32), rtol=0.02, atol=0.02)
