"""Attribution against finite differences and ablation against plain runs of the model, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base.errors import PromptError, SteeringError
from saejax.features.effects import attribution
from saejax.features.effects.attribution import ablate, agreement, attribute
from tests import tiny_experiment as tiny
from tests.features.conftest import make_sae
from tests.features.test_steering import random_sae

PROMPT = "the quick brown"


def runner(lm_, tokens, place):
    """difference(parts [B, T, D] added at a place) -> [B] logit("a") - logit("b") at the last token."""
    a, b = (lm_.tokenizer.encode(text)[0] for text in "ab")

    @jax.jit
    def run(model, parts):
        logits = model(jnp.tile(tokens, (len(parts), 1)), taps={place: lambda x: x + parts})[:, -1]
        return logits[:, a] - logits[:, b]

    return lambda parts: np.asarray(run(lm_.model, jnp.asarray(parts, jnp.float32)), np.float64)


@pytest.mark.parametrize("kind, norm, target", [
    ("topk", "none", ""), ("relu", "layer_norm", ""),
    pytest.param("topk", "none", "blocks.1.hook_mlp_out", marks=pytest.mark.slow)])
def test_attribution_is_the_slope_and_ablation_the_step(lm_, kind, norm, target):
    """The contribution of each pair, found by decoding with and without it, added in part and taken away whole."""
    sae = random_sae(kind, norm, hookpoint="blocks.1.hook_mlp_in" if target else tiny.HOOKPOINT, target=target)
    found = attribute(lm_, sae, PROMPT, "a", "b")
    assert 0 not in found.position_P and len(found.position_P) > 50, "BOS has no pairs"
    place = sae.cfg.targets[0]
    x = np.asarray(attribution.values(lm_.model, found.tokens_T[None], sae.cfg.hookpoints)[sae.cfg.hookpoints[0]][0])
    acts = np.asarray(sae.encode(x))
    chosen = np.r_[found.best(12), np.arange(0, len(found.position_P), 37)]
    parts = np.zeros((len(chosen), *x.shape), np.float32)
    for part, p in zip(parts, chosen, strict=True):
        t, f = found.position_P[p], found.feature_P[p]
        assert found.activation_P[p] == pytest.approx(acts[t, f], rel=1e-4)
        without = acts[t].copy()
        without[f] = 0
        part[t] = np.asarray(sae.decode(acts[t], x[t])) - np.asarray(sae.decode(without, x[t]))
    run, step = runner(lm_, found.tokens_T, place), 0.02
    clean = run(np.zeros_like(parts))
    assert found.difference == pytest.approx(clean[0], abs=1e-5)
    largest = np.abs(found.attribution_P[chosen]).max()
    slope = (run(step * parts) - run(-step * parts)) / (2 * step)
    np.testing.assert_allclose(found.attribution_P[chosen], slope, atol=2e-3 * largest)
    measured = ablate(lm_, sae, found, chosen, batch=5, progress=False)
    np.testing.assert_allclose(measured.ablation_P[chosen], clean - run(-parts), atol=2e-5)
    assert np.isfinite(measured.ablation_P).sum() == len(np.unique(chosen))
    assert agreement([measured])["attribution"] > 0.5


def pairs_only(activation_P, attribution_P, ablation_P, **more):
    """An `Attribution` of 3 tokens whose pairs are all at the first; more: instead of zeros."""
    zero_T, n = {name: np.zeros(3) for name in ("error_T", "bias_T", "special_T", "error_ablation_T")}, len(activation_P)
    return attribution.Attribution(np.zeros(3), ("<s>", "a", "b"), 0, None, 0.0, **zero_T | more, position_P=np.zeros(n, int),
                                   feature_P=np.arange(n), activation_P=activation_P, attribution_P=attribution_P,
                                   ablation_P=ablation_P)


SUMS = [("topk", "none", "", False), ("relu", "layer_norm", "", False), ("topk", "none", "blocks.1.hook_mlp_out", False),
        ("relu", "none", "blocks.1.hook_mlp_out", True)]


@pytest.mark.parametrize("kind, norm, target, skip", SUMS)
def test_features_error_bias_and_bos_add_up_to_the_first_order_sum(lm_, kind, norm, target, skip):
    """The sum over tokens of x . grad, from the model differentiated as a whole; each part from its own definition."""
    sae = random_sae(kind, norm, hookpoint="blocks.1.hook_mlp_in" if target else tiny.HOOKPOINT, target=target, skip=skip)
    found = attribute(lm_, sae, PROMPT, "a", "b")
    place, hookpoint, tokens = sae.cfg.targets[0], sae.cfg.hookpoints[0], found.tokens_T[None]
    both = attribution.values(lm_.model, tokens, (hookpoint, place))
    x, y = (np.asarray(both[name][0], np.float64) for name in (hookpoint, place))
    a, b = (lm_.tokenizer.encode(text)[0] for text in "ab")

    def difference(parts):
        logits = lm_.model(tokens, taps={place: lambda value: value + parts})[0, -1]
        return logits[a] - logits[b]

    slope = np.asarray(jax.jit(jax.grad(difference))(jnp.zeros((1, *y.shape), jnp.float32))[0], np.float64)
    first_order = (slope * y).sum()
    assert found.sums["sum"] == pytest.approx(first_order, rel=1e-4, abs=1e-4)
    assert sum(value for name, value in found.sums.items() if name != "sum") == pytest.approx(first_order, rel=1e-4, abs=1e-4)
    assert sum(part.attribution for part in found.parts()) == pytest.approx(first_order, rel=1e-4, abs=1e-4)
    error = (slope * (y - np.asarray(sae(x), np.float64))).sum(-1)
    assert found.error_T[0] == found.bias_T[0] == 0 and not found.special_T[1:].any(), "BOS apart"
    np.testing.assert_allclose(found.error_T[1:], error[1:], atol=1e-4)
    assert found.sums["BOS"] == pytest.approx((slope * y)[0].sum(), abs=1e-4)
    bias = np.broadcast_to(np.asarray(sae.b_dec, np.float64), y.shape)
    if norm == "layer_norm":
        bias = bias * x.std(-1, ddof=1, keepdims=True) + x.mean(-1, keepdims=True)
    if skip:
        bias = bias + x @ np.asarray(sae.params.W_skip, np.float64)
    np.testing.assert_allclose(found.bias_T[1:], (slope * bias).sum(-1)[1:], atol=2e-4)


def test_the_error_is_ablated_as_a_feature_is(lm_):
    sae = random_sae("topk", "none", hookpoint=tiny.HOOKPOINT)
    found = attribute(lm_, sae, PROMPT, "a", "b")
    every = found.largest(10 ** 6)
    assert len(every) == len(found.position_P) + len(found.tokens_T) - 1, "BOS has no error"
    sizes = [abs(found.part(number).attribution) for number in every]
    assert sizes == sorted(sizes, reverse=True)
    token = 3
    measured = ablate(lm_, sae, found, np.array([len(found.position_P) + token, every[0]]), batch=4, progress=False)
    x = np.asarray(attribution.values(lm_.model, found.tokens_T[None], sae.cfg.hookpoints)[tiny.HOOKPOINT][0])
    parts = np.zeros((2, *x.shape), np.float32)
    parts[1, token] = np.asarray(sae(x))[token] - x[token]
    whole, without = runner(lm_, found.tokens_T, tiny.HOOKPOINT)(parts)
    assert measured.error_ablation_T[token] == pytest.approx(whole - without, abs=2e-5)
    frame = measured.to_pandas()
    assert frame.ablation.notna().sum() == 2 and set(frame.kind) == {"feature", "error", "bias", "BOS"}
    assert frame.attribution.sum() == pytest.approx(measured.sums["sum"]) and frame.feature.isna().sum() > 0
    assert "features " in repr(measured) and ", error " in repr(measured) and "; logit difference " in repr(measured)


def test_agreement_counts_pairs_of_all_prompts():
    rng = np.random.default_rng(0)

    def made(n):
        a, b, c = rng.standard_normal((3, n))
        return pairs_only(a, b, np.where(c > -1.5, b + c, np.nan))

    founds = [made(60), made(30)]
    said = agreement(founds)
    a, b, c = (np.concatenate([getattr(f, name)[np.isfinite(f.ablation_P)] for f in founds])
               for name in ("activation_P", "attribution_P", "ablation_P"))
    assert said["pairs"] == len(c) < 90 and said["attribution"] == pytest.approx(np.corrcoef(b, c)[0, 1])
    assert said["activation"] == pytest.approx(np.corrcoef(a, c)[0, 1])
    same = [pairs_only(np.ones(20), v := rng.random(20), v)]
    assert agreement(same)["top_by_attribution"] == 10 and agreement(same)["activation"] is None


def test_without_a_second_token_the_mean_logit_stands_in(lm_):
    sae = make_sae()
    one, many = attribute(lm_, sae, PROMPT, "a"), [attribute(lm_, sae, PROMPT, "a", c) for c in "bc"]
    assert one.against is None and len({f.difference for f in (one, *many)}) == 3
    assert (one.feature_P == many[0].feature_P).all()


def test_mistakes(lm_):
    for prompt, target, message in (("", "a", "prompt is empty"), ("a", "", "'' is 0 tokens"), ("a", "ab", "'ab' is 2 tokens"),
                                    ("a" * 64, "a", "has 65 tokens, the model's context 64")):
        with pytest.raises(PromptError, match=message):
            attribute(lm_, make_sae(), prompt, target)
    with pytest.raises(SteeringError, match="48 wide at blocks.0.mlp.hook_post"):
        attribute(lm_, random_sae("relu", hookpoint="blocks.0.mlp.hook_post"), PROMPT, "a")
