import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.lm import attention
from saejax.lm.attention import Scoring
from saejax.lm.hf_config import from_hf
from saejax.lm.leaves import leaves
from tests.lm import families


def qkv(length, batch=2, k=2, g=3, h=8):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, length, k, *n, h)), jnp.float32) for n in ((g,), (), ()))


def reference(q, k, v, scale, window, softcap):
    """One query at a time in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for t in range(q.shape[1]):
        first = max(0, t - window + 1) if window else 0
        scores = np.einsum("bkgh,bskh->bkgs", q[:, t], k[:, first : t + 1]) * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, t] = np.einsum("bkgs,bskh->bkgh", probs / probs.sum(-1, keepdims=True), v[:, first : t + 1])
    return out


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (13, 0.0), (0, 1.5), (13, 1.5)])
@pytest.mark.parametrize("chunked", [False, True])
def test_equals_the_definition(monkeypatch, window, softcap, chunked):
    if chunked:
        monkeypatch.setattr(attention, "WHOLE_UP_TO", 8)
        monkeypatch.setattr(attention, "CHUNK", 16)
    x = qkv(70)
    found = attention.causal(*x, Scoring(0.4, window, softcap, "highest"))
    np.testing.assert_allclose(found, reference(*x, 0.4, window, softcap), atol=2e-6)
    traced = jax.jit(lambda w: attention.causal(*x, Scoring(0.4, w, softcap, "highest")))(window)
    np.testing.assert_allclose(traced, found, atol=2e-6)


def test_chunked_gradient_equals_whole(monkeypatch):
    x = qkv(70)

    def loss(x):
        return jnp.sum(jnp.sin(attention.causal(*x, Scoring(0.4, 13, 1.5, "highest"))))

    whole = jax.grad(loss)(x)
    monkeypatch.setattr(attention, "WHOLE_UP_TO", 8)
    monkeypatch.setattr(attention, "CHUNK", 16)
    for a, b in zip(jax.grad(loss)(x), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_context_of_4096_holds_no_square_of_scores(gradient):
    """4096 x 4096 float32 scores of the 4 heads are 256 MiB; the forward takes less than one head's, the gradient two's."""
    config = families.CONFIGS["gemma2"] | {"max_position_embeddings": 4096, "sliding_window": 512}
    cfg = from_hf(config)
    params = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in leaves(cfg).items()}

    def run(params, tokens):
        def loss(params):
            return jnp.sum(lm.capture(lm.Decoder(cfg, params), tokens, ["blocks.0.hook_attn_out"])["blocks.0.hook_attn_out"])

        return jax.grad(loss)(params) if gradient else loss(params)

    compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct((1, 4096), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (128 if gradient else 64) << 20
