"""Straight-through gradients equal finite differences of the smoothed functions; objectives equal float64 formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.config import SAEOptions
from saejax.sae import SAEParams, SAESpec, featurewise
from saejax.sae.activations import fires, jumprelu
from saejax.sae.losses import LossInputs
from saejax.sae.objectives import objective

B, D, F, BANDWIDTH = 40, 6, 16, 0.3


def ramp(u):
    """The step function smoothed by the rectangle of width 1: its slope is the window of the straight-through estimator."""
    return np.clip(u + 0.5, 0, 1)


def case(seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((B, F)), rng.uniform(0.1, 0.6, F), rng.standard_normal((B, F))


@pytest.mark.parametrize("function, smoothed", [
    (fires, lambda pre, theta, at: ramp((pre - theta) / BANDWIDTH)),
    (jumprelu, lambda pre, theta, at: at * ramp((pre - theta) / BANDWIDTH)),  # the jump's height is held at the threshold
])
def test_threshold_gradient_is_that_of_the_smoothed_step(function, smoothed):
    pre, theta, weight = case()
    h = 1e-7
    with jax.enable_x64(True):
        got = jax.grad(lambda t: (function(jnp.asarray(pre), t, BANDWIDTH) * weight).sum())(jnp.asarray(theta))
        assert got.dtype == jnp.float64
    difference = (smoothed(pre, theta + h, theta) - smoothed(pre, theta - h, theta)) / (2 * h)
    np.testing.assert_allclose(got, (difference * weight).sum(0), rtol=1e-5, atol=1e-7)
    below = (pre < theta) & (pre > theta - BANDWIDTH / 2)
    assert below.any() and (difference[below] < 0).all(), "rows just below the threshold count too"


def test_gradient_with_respect_to_pre_activations():
    pre, theta, weight = case(1)
    with jax.enable_x64(True):
        through = jax.grad(lambda p: (jumprelu(p, jnp.asarray(theta), BANDWIDTH) * weight).sum())(jnp.asarray(pre))
        counted = jax.grad(lambda p: (fires(p, jnp.asarray(theta), BANDWIDTH) * weight).sum())(jnp.asarray(pre))
    np.testing.assert_array_equal(through, np.where(pre > theta, weight, 0))
    np.testing.assert_array_equal(counted, 0)


OPTIONS = SAEOptions(kind="jumprelu", d_sae=F, bandwidth=BANDWIDTH, aux_k=0)
PRE_ACTIVATION = 0.3  # so large that it can be seen
LAMBDA, TARGET = 0.9, 5.0
INPUTS = LossInputs(sparsity=jnp.float32(LAMBDA), target_l0=jnp.float32(TARGET),
                    dead_after=jnp.uint32(9), inverse_variance=jnp.float32(0.3), tokens_since_fired_F=jnp.zeros(F, jnp.uint32))


def expected(options, p, x):
    """Loss and gradients in float64, each derived on paper."""
    theta = np.exp(p["log_threshold"])
    pre = x @ p["W_enc"].T + p["b_enc"]
    on = pre > theta
    acts = np.where(on, pre, 0)
    error = acts @ p["W_dec"] + p["b_dec"] - x
    window = (np.abs(pre - theta) < BANDWIDTH / 2) / BANDWIDTH
    norm = np.linalg.norm(p["W_dec"], axis=1)
    d_acts = 2 * error @ p["W_dec"].T / B
    d_W_dec = 2 * acts.T @ error / B
    d_pre, d_theta = np.zeros_like(pre), np.zeros(F)
    rate = on.mean(0)
    loss = np.square(error).sum(1).mean()
    if options.penalty == "tanh":
        c = 4.0
        t = np.tanh(c * acts * norm)
        short = np.maximum(theta - pre, 0)
        loss += LAMBDA * t.sum(1).mean() + PRE_ACTIVATION * (short * norm).sum(1).mean()
        d_acts = d_acts + LAMBDA * (1 - t**2) * c * norm / B
        d_norm = (LAMBDA * (1 - t**2) * c * acts + PRE_ACTIVATION * short).mean(0)
        d_W_dec += d_norm[:, None] * p["W_dec"] / norm[:, None]
        d_pre -= PRE_ACTIVATION * (short > 0) * norm / B
        d_theta += PRE_ACTIVATION * (short > 0).mean(0) * norm
    else:
        sparsity, slope = rate.sum(), 1.0
        if options.penalty == "target_l0":
            ratio = sparsity / TARGET
            sparsity, slope = (ratio - 1) ** 2, 2 * (ratio - 1) / TARGET
        loss += LAMBDA * sparsity
        d_theta -= LAMBDA * slope * window.mean(0)
    d_pre += d_acts * on
    d_theta -= theta * (d_acts * window).sum(0)
    return loss, {"W_enc": d_pre.T @ x, "b_enc": d_pre.sum(0), "W_dec": d_W_dec, "b_dec": 2 * error.mean(0),
                  "log_threshold": theta * d_theta}


@pytest.mark.parametrize("name", ["l0", "target_l0", "tanh"])
def test_objective_and_all_its_gradients(name, monkeypatch):
    monkeypatch.setattr(featurewise, "PRE_ACTIVATION", PRE_ACTIVATION)
    options = dataclasses.replace(OPTIONS, penalty=name)
    rng = np.random.default_rng(2)
    p = {"W_enc": rng.standard_normal((F, D)) * 0.4, "b_enc": rng.standard_normal(F) * 0.1, "W_dec": rng.standard_normal((F, D)),
         "b_dec": rng.standard_normal(D), "log_threshold": np.log(rng.uniform(0.1, 0.6, F))}
    x = rng.standard_normal((B, D))
    loss, gradients = expected(options, p, x)
    params = SAEParams(**{k: jnp.asarray(v, jnp.float32) for k, v in p.items() if k != "log_threshold"},
                       per_feature={"log_threshold": jnp.asarray(p["log_threshold"], jnp.float32)})
    inputs = INPUTS.replace(inverse_variance=jnp.float32(1))
    spec = SAESpec("jumprelu", D, F, bandwidth=BANDWIDTH)
    (got, parts), grads = jax.value_and_grad(lambda q: objective(spec, options, q, jnp.asarray(x, jnp.float32), inputs),
                                             has_aux=True)(params)
    assert float(got) == pytest.approx(loss, rel=1e-5)
    for key, value in ({k: getattr(grads, k) for k in p if k != "log_threshold"} | grads.per_feature).items():
        np.testing.assert_allclose(value, gradients[key], rtol=2e-4, atol=2e-5, err_msg=key)
        assert np.abs(gradients[key]).max() > 0


def float32_params(seed=3):
    rng = np.random.default_rng(seed)
    p = [rng.standard_normal((F, D)) * 0.4, rng.standard_normal(F) * 0.1, rng.standard_normal((F, D)), rng.standard_normal(D)]
    return p, SAEParams(*(jnp.asarray(v, jnp.float32) for v in p)), rng.standard_normal((B, D))


@pytest.mark.parametrize("penalty, bent", [("l1", lambda a: a), ("tanh", lambda a: np.tanh(4 * a) / 4),
                                           ("log", lambda a: np.log(1 + 4 * a) / 4)])
def test_penalties_of_relu(penalty, bent):
    (W_enc, b_enc, W_dec, b_dec), params, x = float32_params()
    options = SAEOptions(kind="relu", d_sae=F, aux_k=0, penalty=penalty)
    acts = np.maximum(x @ W_enc.T + b_enc, 0)
    mse = np.square(acts @ W_dec + b_dec - x).sum(1).mean()
    term = bent(acts * np.linalg.norm(W_dec, axis=1)).sum(1).mean()
    loss, parts = objective(SAESpec("relu", D, F), options, params, jnp.asarray(x, jnp.float32), INPUTS)
    assert float(loss) == pytest.approx(mse + LAMBDA * term, rel=1e-5)
    assert float(parts.own["l1"]) == pytest.approx(term, rel=1e-5)


def test_multi_topk_adds_an_eighth_of_the_error_with_four_times_k():
    (W_enc, b_enc, W_dec, b_dec), params, x = float32_params()
    pre = x @ W_enc.T + b_enc

    def mse(k):
        kept = np.where(pre >= np.sort(pre, axis=1)[:, -k][:, None], np.maximum(pre, 0), 0)
        return np.square(kept @ W_dec + b_dec - x).sum(1).mean()

    options = SAEOptions(kind="topk", d_sae=F, k=3, aux_k=0, multi_topk=True)
    loss, parts = objective(SAESpec("topk", D, F, k=3), options, params, jnp.asarray(x, jnp.float32), INPUTS)
    assert float(loss) == pytest.approx(0.3 * (mse(3) + mse(12) / 8), rel=1e-5)
    assert float(parts.mse) == pytest.approx(mse(3), rel=1e-5) and float(parts.l0) <= 3


@pytest.mark.parametrize("old", [0, 2, 9])
def test_aux_k_explains_the_error_with_dead_features_only(old):
    """`old` features have not fired for long; those of them that fire in this batch are not dead."""
    (W_enc, b_enc, W_dec, b_dec), params, x = float32_params(5)
    b_enc[:old] -= 2.0
    params = params.replace(b_enc=jnp.asarray(b_enc, jnp.float32))
    pre = x @ W_enc.T + b_enc

    def kept(pre, k):
        return np.where(pre >= np.sort(pre, axis=1)[:, -k][:, None], np.maximum(pre, 0), 0)

    acts = kept(pre, 2)
    since = np.where(np.arange(F) < old, 10, 9)
    dead = (since > 9) & ~(acts > 0).any(0)
    error = x - acts @ W_dec - b_dec
    estimate = kept(np.where(dead, pre, -np.inf), 4) @ W_dec
    aux = np.square(error - estimate).sum() / np.square(error - error.mean(0)).sum() if dead.any() else 0.0
    assert dead.sum() == {0: 0, 2: 2, 9: 8}[old]  # one of nine fires
    options = SAEOptions(kind="topk", d_sae=F, k=2, aux_k=4, aux_coef=0.5)
    inputs = INPUTS.replace(tokens_since_fired_F=jnp.asarray(since, jnp.uint32))
    loss, parts = objective(SAESpec("topk", D, F, k=2), options, params, jnp.asarray(x, jnp.float32), inputs)
    assert float(parts.own["aux"]) == pytest.approx(aux, rel=1e-5)
    assert float(loss) == pytest.approx(0.3 * np.square(error).sum(1).mean() + 0.5 * aux, rel=1e-5)
