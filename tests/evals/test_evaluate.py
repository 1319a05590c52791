"""Identities and references for everything that evaluation reports."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FormatError, NonFiniteError, SaejaxError
from saejax.base.records import ActivationStats, MeshOptions, RunPaths
from saejax.data.text import Text
from saejax.data.tokens import token_batches
from saejax.evals import splice
from saejax.evals.evaluate import cache_key, cached, evaluate_all, remember
from saejax.evals.evaluate import evaluate as evaluated
from saejax.evals.reconstruction import Reconstruction, density_histogram
from saejax.lm import capture, cross_entropy
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig

HOOKPOINT, D_IN = "blocks.1.hook_resid_post", 48


class Linear:
    """x -> factor * x, exactly: one feature per input dimension."""

    mesh = None

    def __init__(self, factor):
        self.factor = factor
        self.cfg = SimpleNamespace(d_in=D_IN, d_sae=D_IN, hookpoint=HOOKPOINT, hookpoints=(HOOKPOINT,), targets=(HOOKPOINT,))

    def measure(self, x, counted):
        active = x * self.factor > 0
        return SimpleNamespace(recon_BD=x * self.factor, l0_B=active.sum(1), fired_F=(active & counted[:, None]).sum(0))


def stats(mean=0.3, median=5.0):
    return {HOOKPOINT: ActivationStats(1000, np.full(D_IN, mean), median, median**2, median)}


def random_sae(mesh=None, d_sae=64, k=8, seed=0):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((d_sae, D_IN)).astype(np.float32) / D_IN**0.5
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.zeros(d_sae), W_dec=jnp.asarray(W), b_dec=jnp.zeros(D_IN))
    return SAE(params, SAEConfig("topk", D_IN, d_sae, k, False, (HOOKPOINT,), "tiny"), mesh)


def evaluate(config, sae, lm, given):
    return evaluated(sae, lm, Text.of(config), given, config.eval, batch_contexts=config.lm.batch_contexts, progress=False)


def assert_same(found, expected):
    """Figures to 1e-5, all else equal."""
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def held_out(config, lm):
    batches = list(token_batches(config.text, lm.tokenizer, 64, seed=config.seed, split="heldout",
                                 max_contexts=config.eval.contexts))
    assert len(batches) == 1
    return batches[0].tokens_BT, batches[0].keep_BT


def test_identity_recovers_exactly_one_and_zero_exactly_none(config, tiny_lm):
    identity = evaluate(config, Linear(1.0), tiny_lm, stats())
    assert identity["ce_recovered"] == 1.0 and identity["ce_recovered_mean"] == 1.0
    assert identity["ce_spliced"] == identity["ce_clean"] and identity["kl"] == 0.0
    assert identity["explained_variance"] == 1.0 and identity["contexts"] == 10
    zero = evaluate(config, Linear(0.0), tiny_lm, stats())
    assert zero["ce_recovered"] == 0.0 and zero["ce_spliced"] == zero["ce_zero"] != zero["ce_clean"]
    assert zero["kl"] > 0 and zero["dead_fraction"] == 1.0 and zero["l0_mean"] == 0


@pytest.mark.slow
def test_what_fills_a_row_up_counts_nowhere(config, tiny_lm, tmp_path):
    """One document a row: figures of the documents, each by itself, without what stands behind it."""
    rng, file = np.random.default_rng(0), tmp_path / "short.jsonl"
    texts = ["".join(rng.choice(list("abcdefg "), rng.integers(3, 60))) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = dataclasses.replace(config.text, source=(str(file),), packing="document", context=40)
    config = dataclasses.replace(config, text=options)
    result = evaluate(config, Linear(0.5), tiny_lm, stats())
    [batch] = token_batches(options, tiny_lm.tokenizer, 64, seed=config.seed, split="heldout", max_contexts=10)
    assert len(set(batch.lengths_B)) > 5 and batch.lengths_B.max() == 40
    nll, x = [], []
    for tokens_T, keep_T, length in zip(batch.tokens_BT, batch.keep_BT, batch.lengths_B, strict=True):
        alone = np.asarray(tokens_T[None, :length])
        assert not keep_T[length:].any() and (tokens_T[length:] == tiny_lm.tokenizer.eos_id).all()
        nll.append(np.asarray(cross_entropy(tiny_lm.model(alone), alone)).ravel())
        x.append(np.asarray(capture(tiny_lm.model, alone, [HOOKPOINT])[HOOKPOINT])[0][keep_T[:length]])
    assert result["predicted_tokens"] == sum(map(len, nll)) and result["tokens"] == sum(map(len, x))
    assert result["masked_tokens"] == batch.lengths_B.sum() - batch.keep_BT.sum()
    np.testing.assert_allclose(result["ce_clean"], np.concatenate(nll).astype(np.float64).mean(), rtol=1e-5)
    np.testing.assert_allclose(result["mse"], np.square(0.5 * np.concatenate(x)).sum(1).mean(), rtol=1e-4)


class Between(Linear):
    """The same, from some hookpoints to others."""

    def __init__(self, factor, hookpoints, targets):
        super().__init__(factor)
        width = D_IN * len(hookpoints)
        self.cfg = SimpleNamespace(d_in=width, d_sae=width, hookpoint="", hookpoints=hookpoints, targets=targets)


def test_what_is_reconstructed_is_replaced(config, tiny_lm):
    """A transcoder between two names of the same activation, and a crosscoder over two layers."""
    before, after, last = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"
    names = {name: stats()[HOOKPOINT] for name in (before, after, last)}
    transcoder = evaluate(config, Between(1.0, (before,), (after,)), tiny_lm, names)
    assert transcoder["ce_recovered"] == 1.0 and transcoder["explained_variance"] == 1.0 and "layers" not in transcoder
    zero = evaluate(config, Between(0.0, (last,), (after,)), tiny_lm, names)
    assert zero["ce_spliced"] == zero["ce_zero"] == evaluate(config, Linear(0.0), tiny_lm, names)["ce_zero"]
    crosscoder = evaluate(config, Between(1.0, (before, last), (before, last)), tiny_lm, names)
    assert crosscoder["ce_recovered"] == 1.0 and set(crosscoder["layers"]) == {before, last}
    half = evaluate(config, Between(0.5, (before, last), (before, last)), tiny_lm, names)
    single = evaluate(config, Between(0.5, (last,), (last,)), tiny_lm, names)
    assert half["ce_spliced"] == pytest.approx(single["ce_spliced"], rel=1e-6), "the later layer decides what follows"
    assert half["fvu"] == pytest.approx(np.mean([layer["fvu"] for layer in half["layers"].values()]))
    assert half["layers"][last]["fvu"] == pytest.approx(single["fvu"], rel=1e-6)


def test_mean_ablation_with_the_mean_zero_is_zero_ablation(config, tiny_lm):
    result = evaluate(config, Linear(0.5), tiny_lm, stats(mean=0.0))
    assert result["ce_mean"] == result["ce_zero"] and result["ce_recovered_mean"] == result["ce_recovered"]


def test_every_figure_equals_a_float64_reference(config, tiny_lm):
    sae = random_sae()
    result = evaluate(config, sae, tiny_lm, stats())
    tokens_BT, keep_BT = held_out(config, tiny_lm)
    assert 0 < result["masked_tokens"] == (~keep_BT).sum()
    x_BTD = jax.jit(lambda model: capture(model, tokens_BT, [HOOKPOINT])[HOOKPOINT])(tiny_lm.model)
    recon_BTD, acts_BTF = sae.reconstruct(x_BTD)
    x, recon, acts = (np.asarray(a, np.float64)[keep_BT] for a in (x_BTD, recon_BTD, acts_BTF))
    error, variance = np.square(x - recon).sum(), np.square(x - x.mean(0)).sum()
    assert result["tokens"] == len(x) and result["outlier_tokens"] == 0
    np.testing.assert_allclose(result["fvu"], error / variance, rtol=1e-5)
    np.testing.assert_allclose(result["explained_variance"], 1 - error / variance, rtol=1e-5)
    np.testing.assert_allclose(result["normalized_mse"], error / np.square(x).sum(), rtol=1e-5)
    cosine = (x * recon).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(recon, axis=1)
    np.testing.assert_allclose(result["cosine"], cosine.mean(), rtol=1e-5)
    l0 = (acts > 0).sum(1)
    assert result["l0_mean"] == pytest.approx(l0.mean(), rel=1e-12) and result["l0_median"] == np.median(l0)
    fired = (acts > 0).sum(0)
    assert result["dead_fraction"] == (fired == 0).mean()
    assert sum(result["density_histogram"]["counts"]) + result["density_histogram"]["never"] == 64

    @jax.jit
    def spliced(model, x_BTD):
        logits = model(tokens_BT, taps={HOOKPOINT: lambda _: x_BTD})
        return jax.nn.log_softmax(logits), cross_entropy(logits, tokens_BT)

    def log_probs(x_BTD):
        return spliced(tiny_lm.model, jnp.asarray(x_BTD, jnp.float32))

    clean, nll = log_probs(x_BTD)
    np.testing.assert_allclose(result["ce_clean"], np.asarray(nll, np.float64).mean(), rtol=1e-5)
    keep = keep_BT[..., None]
    for name, value in (("spliced", recon_BTD), ("zero", 0.0), ("mean", np.full(D_IN, 0.3, np.float32))):
        other, nll = log_probs(np.where(keep, value, x_BTD))
        np.testing.assert_allclose(result[f"ce_{name}"], np.asarray(nll, np.float64).mean(), rtol=1e-5)
        if name == "spliced":
            kl = (np.exp(clean) * (clean - other)).sum(-1)[:, :-1]
            np.testing.assert_allclose(result["kl"], kl.mean(), rtol=1e-4)
    assert result["predicted_tokens"] == tokens_BT.shape[0] * (tokens_BT.shape[1] - 1)


def test_neither_batch_size_nor_chunking_changes_the_figures(config, tiny_lm, monkeypatch):
    sae = random_sae(seed=1)  # no figure near 0, where the rounding of a difference would decide
    first = evaluate(config, sae, tiny_lm, stats())
    assert min(abs(first[name]) for name in ("ce_recovered", "ce_recovered_mean")) > 0.3
    monkeypatch.setattr(splice, "_LOGIT_BYTES", {"cpu": 4 * 97 * 7})  # logits of 7 tokens at a time
    other = dataclasses.replace(config, lm=dataclasses.replace(config.lm, batch_contexts=3))
    second = evaluate(other, sae, tiny_lm, stats())
    assert_same(second, first)


def test_many_in_one_pass_measure_what_each_does_alone(config, tiny_lm):
    """An SAE on one device, one on a mesh, one with another mean: the same figures, and the language model's own only once."""
    saes = [random_sae(seed=1), random_sae(sharding.make_mesh(MeshOptions(2, 4)), seed=2), random_sae(seed=3)]
    given, suffixes = [stats(), stats(), stats(mean=0.1)], splice.suffix
    alone = [evaluate(config, sae, tiny_lm, own) for sae, own in zip(saes, given, strict=True)]
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splice, "suffix", lambda *args: runs.append(1) or suffixes(*args))
        together = evaluate_all(saes, tiny_lm, Text.of(config), given, config.eval, batch_contexts=5, progress=False)
    for one, other in zip(alone, together, strict=True):
        assert_same(other, one)
    batches = -(-config.eval.contexts // 5)
    assert len(runs) == batches * (3 + 3 + 3)  # clean, zero and mean for each mean; one for each SAE


def test_the_language_model_runs_on_all_devices(config, tiny_lm, monkeypatch):
    seen = []
    prefix = splice.prefix
    monkeypatch.setattr(splice, "prefix", lambda *args, **more: seen.append(prefix(*args, **more)) or seen[-1])
    evaluate(dataclasses.replace(config, lm=dataclasses.replace(config.lm, batch_contexts=8)), random_sae(), tiny_lm, stats())
    values = seen[0][HOOKPOINT]
    assert {shard.data.shape[0] for shard in values.addressable_shards} == {1}
    assert len(values.sharding.device_set) == len(jax.devices()) == 8


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)])
def test_sharded_sae_gives_the_same_figures(config, tiny_lm, shape):
    plain = evaluate(config, random_sae(), tiny_lm, stats())
    sharded = evaluate(config, random_sae(sharding.make_mesh(MeshOptions(*shape))), tiny_lm, stats())
    for name in ("fvu", "ce_spliced", "ce_recovered", "kl", "l0_mean", "dead_fraction"):
        assert sharded[name] == pytest.approx(plain[name], rel=1e-5), name


def test_fvu_is_accurate_where_the_mean_dominates():
    rng = np.random.default_rng(1)
    offset = np.full(16, 1e3)
    x = (offset + rng.standard_normal((4000, 16))).astype(np.float32)
    recon = (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    r = Reconstruction(x.mean(0), 1e9)
    for part in range(4):
        rows = slice(part * 1000, part * 1000 + 1000)
        r.add(x[rows], recon[rows], np.zeros(1000, int), jnp.zeros(4, int), np.ones(1000, bool))
    x64, recon64 = x.astype(np.float64), recon.astype(np.float64)
    expected = np.square(x64 - recon64).sum() / np.square(x64 - x64.mean(0)).sum()
    assert r.result()["fvu"] == pytest.approx(expected, rel=1e-5)


def test_outliers_are_counted_and_left_out():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((100, 8)).astype(np.float32)
    x[:3] *= 1000
    recon = np.where(np.arange(100)[:, None] < 3, x, 0.5 * x)  # outliers rebuilt perfectly: they flatter the whole
    r = Reconstruction(np.zeros(8), 10 * np.median(np.linalg.norm(x, axis=1)))
    keep = np.ones(100, bool)
    keep[50:] = False
    r.add(x, recon, np.ones(100, int), jnp.array([50, 0]), keep)
    result = r.result()
    x64 = x[3:50].astype(np.float64)
    assert result["outlier_tokens"] == 3 and result["tokens"] == 50
    expected = 1 - np.square(0.5 * x64).sum() / np.square(x64 - x64.mean(0)).sum()
    assert result["explained_variance_no_outliers"] == pytest.approx(expected, rel=1e-5)
    assert result["explained_variance"] > 0.999 > result["explained_variance_no_outliers"]
    assert result["dead_fraction"] == 0.5 and result["l0_median"] == 1


def test_non_finite_activations_are_refused():
    x = np.float32([[1, 2], [np.nan, 0], [3, 1]])
    kept = np.array([True, False, True])
    masked, without = Reconstruction(np.zeros(2), 10.0), Reconstruction(np.zeros(2), 10.0)
    masked.add(x, x / 2, np.zeros(3, int), jnp.zeros(1, int), kept)
    without.add(x[kept], x[kept] / 2, np.zeros(2, int), jnp.zeros(1, int), np.ones(2, bool))
    assert masked.result() == without.result() and masked.result()["fvu"] == pytest.approx(15 / 4 / 2.5)
    with pytest.raises(NonFiniteError, match="1 of 3 tokens"):
        masked.add(x, x / 2, np.zeros(3, int), jnp.zeros(1, int), np.ones(3, bool))


def test_density_histogram_places_every_feature():
    h = density_histogram(np.array([0, 1, 10, 1000, 1000]), 1000)
    assert h["never"] == 1 and sum(h["counts"]) == 4 and h["counts"][-1] == 2
    assert len(h["counts"]) == len(h["log10_edges"]) - 1


def test_wrong_width_names_the_model(config, tiny_lm):
    sae = Linear(1.0)
    sae.cfg.d_in = 7
    with pytest.raises(FormatError, match="width 7.*has 48"):
        evaluate(config, sae, tiny_lm, stats())


def test_cache_is_keyed_by_step_options_and_content(config, tmp_path):
    file, digests = RunPaths(tmp_path).evaluation, {"checkpoint": "c", "model": "m", "tokenizer": "t", "text": "x", "store": "s"}
    key = cache_key(config, 7, digests)
    assert cached(file, key) is None
    remember(file, key, {"fvu": 0.5})
    remember(file, cache_key(config, 8, digests), {"fvu": 0.4})
    assert cached(file, key) == {"fvu": 0.5}
    more = dataclasses.replace(config, eval=dataclasses.replace(config.eval, contexts=11))
    assert cached(file, cache_key(more, 7, digests)) is None
    assert cached(file, cache_key(dataclasses.replace(config, seed=1), 7, digests)) is None
    for name in digests:
        assert cached(file, cache_key(config, 7, digests | {name: "another"})) is None
    newer = json.loads(file.read_text()) | {"schema_version": 99}
    file.write_text(json.dumps(newer))
    with pytest.raises(SaejaxError, match="schema version 99"):
        cached(file, key)
