import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import lm
from saejax.base.errors import HookpointError, LMError
from saejax.lm import hf_config, weights
from saejax.lm.leaves import leaves
from tests.lm import tiny_llama

LAST = "blocks.2.hook_resid_post"


def primitives(jaxpr) -> list[str]:
    """Names of all primitives, those inside scans and calls included."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += primitives(inner)
    return found


def traced(function, *arguments) -> list[str]:
    return primitives(jax.make_jaxpr(function)(*arguments).jaxpr)


def flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_hookpoint_names(tiny):
    names = lm.hookpoints(tiny.cfg)
    assert (
        names[0] == "hook_embed"
        and names[-1] == "ln_final.hook_normalized"
        and len(set(names)) == len(names) == 2 + 3 * 10
    )
    assert [lm.layer_of(name) for name in (names[0], "blocks.2.hook_mlp_out", names[-1])] == [None, 2, None]
    widths = {name.split(".", 2)[-1]: lm.width_of(tiny.cfg, name) for name in names}
    assert widths.pop("attn.hook_z") == 72 and widths.pop("mlp.hook_post") == 80 and set(widths.values()) == {48}


@pytest.mark.parametrize(
    "name, part",
    [
        ("blocks.3.hook_resid_post", "use blocks.0 to blocks.2"),
        ("blocks.1.hook_resid_pst", "blocks.1.hook_resid_post"),
        ("blocks.01.hook_resid_post", "closest"),
        ("", "hook_embed"),
        ("blocks.-1.hook_resid_post", "blocks.1.hook_resid_post"),
    ],
)
def test_unknown_hookpoint(tiny, tokens_BT, name, part):
    for call in (
        lambda: lm.check_hookpoint(tiny.cfg, name),
        lambda: lm.width_of(tiny.cfg, name),
        lambda: lm.capture(tiny, tokens_BT, [name]),
        lambda: tiny(tokens_BT, taps={name: lambda x: x}),
        lambda: tiny(tokens_BT, stop_at=name),
    ):
        with pytest.raises(HookpointError) as caught:
            call()
        assert part in str(caught.value)


def test_tap_above_stop_at_is_refused(tiny, tokens_BT):
    with pytest.raises(HookpointError, match="would never be called"):
        tiny(tokens_BT, taps={"blocks.1.hook_mlp_out": lambda x: x}, stop_at="blocks.1.hook_attn_out")


def test_context_longer_than_the_model_allows(tiny):
    with pytest.raises(LMError, match="65 tokens is longer than the model's 64"):
        tiny(jnp.zeros((1, 65), jnp.int32))


def test_every_hookpoint_fits_the_others(tiny, tokens_BT):
    x = jax.jit(lambda model, tokens: lm.capture(model, tokens, lm.hookpoints(model.cfg)))(tiny, tokens_BT)
    assert set(x) == set(lm.hookpoints(tiny.cfg))
    np.testing.assert_array_equal(x["hook_embed"], tiny.whole["embed"][...][tokens_BT])
    np.testing.assert_array_equal(x["hook_embed"], x["blocks.0.hook_resid_pre"])
    for i in range(3):
        pre, attn, mid, mlp, post = (
            x[f"blocks.{i}.{hook}"]
            for hook in ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        )
        np.testing.assert_allclose(mid, pre + attn, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(post, mid + mlp, rtol=1e-6, atol=1e-6)
        assert jnp.abs(attn).mean() > 0.1 and jnp.abs(mlp).mean() > 0.1
    final = np.asarray(x[LAST], np.float64)
    wanted = final / np.sqrt((final**2).mean(-1, keepdims=True) + tiny.cfg.norm_eps)
    np.testing.assert_allclose(x["ln_final.hook_normalized"], wanted, rtol=1e-5, atol=1e-6)


def test_scanned_equals_unrolled(tiny, tokens_BT):
    def segmented(model, tokens_BT, names):
        return model(tokens_BT, taps={name: lambda x: x for name in names})

    plain = jax.jit(lambda model, tokens: model(tokens))(tiny, tokens_BT)
    for names in (lm.hookpoints(tiny.cfg), ["blocks.1.hook_resid_mid"], ["hook_embed"]):
        np.testing.assert_allclose(
            jax.jit(segmented, static_argnums=2)(tiny, tokens_BT, tuple(names)), plain, atol=2e-5
        )
    assert traced(lambda model, tokens: model(tokens), tiny, tokens_BT).count("scan") == 1
    assert "scan" not in traced(lambda m, t: segmented(m, t, lm.hookpoints(m.cfg)), tiny, tokens_BT)


def test_causal(tiny, tokens_BT):
    changed = tokens_BT.at[:, 25].set((tokens_BT[:, 25] + 1) % 97)
    before, after = tiny(tokens_BT), tiny(changed)
    np.testing.assert_allclose(after[:, :25], before[:, :25], atol=1e-5)
    assert (jnp.abs(after[:, 25:] - before[:, 25:]).max(-1) > 1e-3).all()


def test_stop_at_needs_no_weights_above(tiny, tokens_BT):
    def poison(name, leaf):
        return (
            leaf.at[2:].set(jnp.nan)
            if name.startswith("blocks.")
            else jnp.full_like(leaf, jnp.nan)
            if name != "embed"
            else leaf
        )

    params = {name: leaf[...] for name, leaf in tiny.whole.items()}
    params |= {f"blocks.{name}": leaf[...] for name, leaf in tiny.blocks.items()}
    poisoned = lm.Decoder(tiny.cfg, {name: poison(name, leaf) for name, leaf in params.items()})
    for name in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        np.testing.assert_array_equal(
            lm.capture(poisoned, tokens_BT, [name])[name], lm.capture(tiny, tokens_BT, [name])[name]
        )
    assert jnp.isnan(poisoned(tokens_BT)).all()


@pytest.mark.parametrize(
    "name, products",
    [
        ("hook_embed", 0),
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.0.hook_attn_out", 4),
        ("blocks.0.hook_resid_mid", 4),
        ("blocks.0.hook_mlp_out", 6),
        ("blocks.0.hook_resid_post", 6),
        ("blocks.1.hook_resid_pre", 6),
    ],
)
def test_stop_at_traces_nothing_above(tiny, tokens_BT, name, products):
    def run(model, tokens):
        assert model(tokens, stop_at=name) is None
        return lm.capture(model, tokens, [name])

    # Both calls of `run` stop at `name`: twice the products of one.
    assert traced(run, tiny, tokens_BT).count("dot_general") == 2 * products


def test_replaced_tap_decides_what_follows_and_cuts_the_prefix(tiny, tokens_BT):
    new_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((*tokens_BT.shape, 48)), jnp.float32)

    def splice(model, tokens, new):
        return model(tokens, taps={LAST: lambda _: new})

    spliced = jax.jit(splice)(tiny, tokens_BT, new_BTD)
    np.testing.assert_allclose(spliced, jax.jit(splice)(tiny, tokens_BT * 0, new_BTD), atol=0)
    clean = lm.capture(tiny, tokens_BT, [LAST])[LAST]
    np.testing.assert_allclose(jax.jit(splice)(tiny, tokens_BT, clean), tiny(tokens_BT), atol=2e-5)
    head = 2 * tokens_BT.size * 48 * 97
    assert flops(splice, tiny, tokens_BT, new_BTD) < 1.2 * head
    assert flops(lambda model, tokens: model(tokens), tiny, tokens_BT) > 3 * head


def test_taps_run_once_in_order(tiny, tokens_BT):
    seen = []
    names = ["blocks.2.hook_attn_out", "hook_embed", LAST, "blocks.2.hook_resid_pre"]
    tiny(tokens_BT, taps={name: (lambda x, name=name: seen.append(name) or x) for name in names})
    assert seen == ["hook_embed", "blocks.2.hook_resid_pre", "blocks.2.hook_attn_out", LAST]


def test_cross_entropy_is_that_of_the_next_token(tiny, tokens_BT):
    logits = np.asarray(tiny(tokens_BT), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_probs[:, :-1], np.asarray(tokens_BT)[:, 1:, None], -1)[..., 0]
    found = jax.jit(lm.cross_entropy)(jnp.asarray(logits, jnp.float32), tokens_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_cross_entropy_makes_no_second_logits_array():
    logits = jax.ShapeDtypeStruct((4, 32, 4096), jnp.float32)
    compiled = jax.jit(lm.cross_entropy).lower(logits, jax.ShapeDtypeStruct((4, 32), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 32 * 4096


def test_bfloat16_is_close(tiny, tiny_folder, tokens_BT):
    model = weights.from_safetensors(tiny.cfg, tiny_folder, dtype=jnp.bfloat16)
    found, wanted = (lm.capture(m, tokens_BT, [LAST])[LAST] for m in (model, tiny))
    assert found.dtype == model(tokens_BT).dtype == jnp.bfloat16
    assert jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted) < 0.03


def test_data_parallel_equals_one_device_without_communication(tiny, tiny_folder):
    tokens_BT = jnp.asarray(np.random.default_rng(3).integers(0, 97, (16, 20)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    model = weights.from_safetensors(tiny.cfg, tiny_folder, dtype=jnp.float32, mesh=mesh)
    assert all(
        leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(model)
    )

    def run(model, tokens):
        kept = lm.capture(model, tokens, ["blocks.1.hook_resid_mid"])
        return lm.cross_entropy(model(tokens), tokens), kept["blocks.1.hook_resid_mid"]

    sharded = jax.device_put(tokens_BT, NamedSharding(mesh, P("data")))
    compiled = jax.jit(run).lower(model, sharded).compile()
    assert not any(
        word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    )
    for found, wanted in zip(compiled(model, sharded), jax.jit(run)(tiny, tokens_BT), strict=True):
        assert found.sharding.spec[0] == "data"
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_inside_auto_axes_of_an_explicit_mesh(tiny, tiny_folder):
    tokens_BT = jnp.asarray(np.random.default_rng(4).integers(0, 97, (8, 12)))
    mesh = jax.make_mesh((4, 2), ("data", "dict"), axis_types=(AxisType.Explicit, AxisType.Explicit))
    model = weights.from_safetensors(tiny.cfg, tiny_folder, dtype=jnp.float32, mesh=mesh)
    forward = jax.sharding.auto_axes(lambda m, t: lm.capture(m, t, [LAST])[LAST], out_sharding=P("data", None, None))
    with jax.set_mesh(mesh):
        found = jax.jit(forward)(model, jax.device_put(tokens_BT, NamedSharding(mesh, P("data"))))
    assert jax.typeof(found).sharding.spec == P("data", None, None)
    np.testing.assert_allclose(found, lm.capture(tiny, tokens_BT, [LAST])[LAST], atol=2e-5)


def test_decoder_refuses_arrays_that_do_not_fit(tiny):
    cfg = hf_config.from_hf(tiny_llama.CONFIG)
    params = {name: jnp.zeros(leaf.shape) for name, leaf in leaves(cfg).items() if name != "unembed"}
    params["blocks.down"] = jnp.zeros((3, 3))
    with pytest.raises(LMError, match="unembed, blocks.down"):
        lm.Decoder(cfg, params)
