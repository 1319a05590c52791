"""Capture, replace, add and gradient at every kind of hookpoint, in families with and without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.base.errors import HookpointError
from saejax.lm.hookpoints import block_hooks
from tests.lm import families

FAMILIES = ("gpt_neox", "gemma2", "olmo2")
TOKENS = jnp.asarray(families.TOKENS[:, :12])


def names_of(cfg) -> list[str]:
    return ["hook_embed", *(f"blocks.1.{hook}" for hook in block_hooks(cfg)), "ln_final.hook_normalized"]


@pytest.mark.parametrize(
    "label, every", [("gpt_neox", 4), *(pytest.param(label, 1, marks=pytest.mark.slow) for label in FAMILIES)]
)
def test_replace_add_and_gradient_at_every_hookpoint(family_model, label, every):
    """The core tier takes every fourth hookpoint of one family: each is compiled anew."""
    model = family_model(label)
    clean = jax.jit(lambda m: m(TOKENS))(model)
    values = jax.jit(lambda m: lm.capture(m, TOKENS, names_of(m.cfg)))(model)
    for name in names_of(model.cfg)[::every]:

        @jax.jit
        def with_value(m, value, name=name):
            return m(TOKENS, taps={name: lambda _: value})

        @jax.jit
        def slope(m, delta, direction, name=name):
            step = 1e-2 * direction

            def loss(delta):
                return lm.cross_entropy(m(TOKENS, taps={name: lambda value: value + delta}), TOKENS).mean()

            return jnp.vdot(jax.grad(loss)(delta), direction), loss(delta + step), loss(delta - step)

        np.testing.assert_allclose(with_value(model, values[name]), clean, atol=2e-5)
        other = values[name][::-1]
        assert jnp.abs(with_value(model, other) - clean).max() > 1e-2, name
        width = lm.width_of(model.cfg, name)
        assert values[name].shape == (*TOKENS.shape, width)
        direction = jnp.asarray(np.random.default_rng(1).standard_normal(width), jnp.float32)
        exact, up, down = (float(x) for x in slope(model, jnp.zeros(width), direction))
        assert exact == pytest.approx((up - down) / 2e-2, rel=0.05, abs=1e-3), name
        assert abs(exact) > 1e-5, name


def test_hooks_that_a_family_does_not_have_are_refused_by_name(family_model):
    with pytest.raises(HookpointError, match="blocks.0.hook_resid_mid.*run in parallel.*hook_resid_pre"):
        lm.check_hookpoint(family_model("gpt_neox").cfg, "blocks.0.hook_resid_mid")
    for norm in ("ln1", "ln2"):
        with pytest.raises(HookpointError, match=f"blocks.2.{norm}.hook_normalized.*use hook_resid_pre or hook_mlp_in"):
            lm.check_hookpoint(family_model("olmo2").cfg, f"blocks.2.{norm}.hook_normalized")


def test_mlp_in_reaches_the_mlp_only(family_model):
    model, taps = family_model("gemma2"), {"blocks.1.hook_mlp_in": lambda x: x * 0.0}
    kept = {}

    def keep(name):
        return lambda x: kept.setdefault(name, x)

    names = ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")
    model(TOKENS, taps=taps | {name: keep(name) for name in names})
    mid, out, post = (kept[name] for name in names)
    np.testing.assert_allclose(post, mid + out, atol=1e-5)
    np.testing.assert_allclose(mid, lm.capture(model, TOKENS, names[:1])[names[0]], atol=1e-5)


def test_a_tap_with_two_parameters_gets_positions(family_model):
    seen = []
    model = family_model("gpt_neox")
    model(TOKENS, taps={"blocks.0.attn.hook_z": lambda x, positions: seen.append(positions) or x})
    np.testing.assert_array_equal(seen[0], np.broadcast_to(np.arange(12), (2, 12)))
