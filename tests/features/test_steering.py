"""Steering against numpy: exact values at the hookpoint, the same text with and without a cache, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saejax
from saejax.base import sharding
from saejax.base.errors import FeatureIndexError, HookpointError, LMError, SaejaxError, SteeringError
from saejax.base.records import MeshOptions
from saejax.features.effects import steering
from saejax.features.effects.prompting import encoded, padded
from saejax.features.effects.steering import Change
from saejax.formats import saelens
from saejax.lm import capture, generate
from saejax.lm.prompts import values
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from tests import tiny_experiment as tiny
from tests.features.conftest import DEAD, FEATURES, make_sae

PROMPT = "the quick brown fox"


def random_sae(kind: str, norm: str = "none", hookpoint: str = tiny.HOOKPOINT, target: str = "", mesh=None,
               skip: bool = False) -> SAE:
    rng = np.random.default_rng(1)
    W, V = rng.standard_normal((2, FEATURES, tiny.D_IN)).astype(np.float32) / tiny.D_IN**0.5
    own = {"jumprelu": {"threshold": 0.2}, "gated": {"r_mag": 0.3, "b_mag": 0.1}}.get(kind, {})
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.full(FEATURES, -0.1), W_dec=jnp.asarray(V),
                       b_dec=jnp.asarray(rng.standard_normal(tiny.D_IN), jnp.float32),
                       per_feature={name: jnp.full(FEATURES, value) for name, value in own.items()},
                       W_skip=jnp.asarray(rng.standard_normal((tiny.D_IN, tiny.D_IN)), jnp.float32) if skip else None)
    cfg = SAEConfig(kind, tiny.D_IN, FEATURES, 8 if kind == "topk" else 0, True, (hookpoint,), "tiny", target=target,
                    d_out=tiny.D_IN if target else None, input_norm=norm, skip=skip)
    return SAE(params, cfg, mesh)


def set_by_decoding(sae: SAE, x, feature: int, value: float, read=None):
    """SAE(x) with the feature at a value, plus the error: by decoding all activations, in numpy from there on."""
    acts = np.array(sae.encode(x if read is None else read))
    error = np.asarray(x) - np.asarray(sae.decode(acts, x))
    acts[..., feature] = value
    return np.asarray(sae.decode(acts, x)) + error


@pytest.fixture(scope="module")
def tokens(lm_):
    return encoded(lm_, PROMPT)


@pytest.fixture(scope="module")
def clean(lm_, tokens):
    """[T, D] at the hookpoint."""
    return np.asarray(values(lm_.model, tokens[None], (tiny.HOOKPOINT,))[tiny.HOOKPOINT][0])


@pytest.mark.parametrize("kind, norm, on_a_mesh", [
    ("topk", "none", False), ("topk", "layer_norm", True), ("relu", "constant_norm_rescale", False),
    ("jumprelu", "layer_norm", True), ("gated", "none", False)])
def test_a_clamped_feature_has_its_value_and_the_error_stays(lm_, clean, kind, norm, on_a_mesh):
    sae = random_sae(kind, norm, mesh=sharding.single_device_mesh() if on_a_mesh else None)
    plain, ramp, T = random_sae(kind, norm), np.arange(tiny.D_IN, dtype=np.float32), len(clean)
    changes = [Change(), Change("up", {3: 7.0}), Change("off", {5: 0.0}), Change("other", {3: -2.0}, ramp),
               Change("both", {3: 7.0, 5: 0.0})]
    at = np.ones((5, T - 1), bool)
    at[:, 2] = False
    for after in (True, False):
        tap = steering.plan(lm_, sae, changes, at, after=after)()[tiny.HOOKPOINT]
        x = np.asarray(tap(jnp.tile(clean, (5, 1, 1)), jnp.tile(jnp.arange(T), (5, 1))))
        expected = np.stack([clean, set_by_decoding(plain, clean, 3, 7.0), set_by_decoding(plain, clean, 5, 0.0),
                             set_by_decoding(plain, clean, 3, -2.0) + ramp, clean])
        expected[4] = expected[1] + expected[2] - clean  # each by what it adds
        expected[:, 2] = clean[2]
        if not after:
            expected[:, -1] = clean[-1]
        np.testing.assert_allclose(x, expected, atol=2e-5)
        np.testing.assert_array_equal(x[0], clean)
        np.testing.assert_array_equal(x[:, 2], np.tile(clean[2], (5, 1)))


def test_a_transcoder_reads_at_one_place_and_is_changed_at_another(lm_, tokens, clean):
    """Seen at the layer's end, whose stream differs by exactly what was changed at the MLP's output."""
    sae, kept = random_sae("topk", hookpoint="blocks.1.hook_mlp_in", target="blocks.1.hook_mlp_out"), []
    taps = steering.plan(lm_, sae, [Change("up", {3: 4.0})])()

    @jax.jit
    def forward(model, tokens_BT):
        model(tokens_BT, taps=taps | {tiny.HOOKPOINT: lambda x: kept.append(x) or x}, stop_at=tiny.HOOKPOINT)
        return kept.pop(), capture(model, tokens_BT, sae.cfg.hookpoints)

    x, read = forward(lm_.model, tokens[None])
    act = np.asarray(sae.encode(read[sae.cfg.hookpoints[0]]))[0, :, 3:4]
    np.testing.assert_allclose(x[0], clean + (4.0 - act) * np.asarray(sae.W_dec)[3], atol=2e-5)


@pytest.mark.parametrize("kind, positions", [("topk", "all"), pytest.param("relu", "last", marks=pytest.mark.slow),
                                             pytest.param("topk", (1, 4), marks=pytest.mark.slow),
                                             pytest.param("relu", "all", marks=pytest.mark.slow)])
def test_generation_with_a_cache_is_generation_without(lm_, tokens, kind, positions):
    sae, changes = random_sae(kind), [Change(), Change("up", {3: 90.0}), Change("off", {5: 0.0})]
    at, after = steering.places(lm_, tokens, positions)
    taps = steering.plan(lm_, sae, changes, np.tile(at, (3, 1)), after=after)
    found = generate(lm_.model, [tokens.tolist()] * 3, 6, taps=taps)
    rows = np.zeros((3, len(tokens) + 6), np.int32)
    rows[:, :len(tokens)] = tokens
    forward = jax.jit(lambda model, made, rows: model(rows, taps=made()))
    for end in range(len(tokens), rows.shape[1]):
        rows[:, end] = np.asarray(forward(lm_.model, taps, rows))[:, end - 1].argmax(-1)
    assert rows[:, len(tokens):].tolist() == found
    assert found[0] == generate(lm_.model, [tokens.tolist()], 6)[0]
    if positions == "all":
        assert found[1] != found[0]


def test_where_a_prompt_is_changed(lm_, tokens):
    at, after = steering.places(lm_, tokens, "all")
    assert after and at.tolist() == [False] + [True] * (len(tokens) - 1), "BOS is left alone"
    at, after = steering.places(lm_, tokens, "last")
    assert not after and np.flatnonzero(at).tolist() == [len(tokens) - 1]
    at, after = steering.places(lm_, tokens, (0, 3))
    assert not after and np.flatnonzero(at).tolist() == [0, 3]
    for wrong in ((len(tokens),), (-1,), (), ("x",)):
        with pytest.raises(SteeringError, match="the prompt has tokens 0 to 19"):
            steering.places(lm_, tokens, wrong)


def test_continuations_and_their_baseline(lm_, sae, index):
    feature = int(index.column("max").argmax())
    vector = steering.few_shot_vector(lm_, tiny.HOOKPOINT, ["zz", "a zz"], ["the"])
    last = [np.asarray(values(lm_.model, padded(lm_, encoded(lm_, p)), (tiny.HOOKPOINT,))[tiny.HOOKPOINT])[0, len(p)]
            for p in ("zz", "a zz", "the")]
    np.testing.assert_allclose(vector, (last[0] + last[1]) / 2 - last[2], atol=1e-5)
    changes = [Change(), steering.clamped(feature, 20, steering.maximum(index, feature)), steering.ablated(feature),
               Change("nothing", vector=0 * vector)]
    found = steering.continuations(lm_, sae, PROMPT, changes, tokens=6)
    assert found[0] == found[3] != found[1] and changes[1].label == f"feature {feature} x 20"
    assert found == steering.continuations(lm_, sae, PROMPT, changes, tokens=6)


def test_a_dictionary_of_another_library(lm_, clean, tmp_path):
    """Written as SAELens files and read back."""
    ours = random_sae("relu")
    saelens.write(tmp_path / "foreign", ours)
    x, positions = clean[None], np.arange(len(clean))[None]
    found = [steering.plan(lm_, sae, [Change("up", {3: 9.0})])()[tiny.HOOKPOINT](jnp.asarray(x), positions)
             for sae in (ours, saejax.load(tmp_path / "foreign"))]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert np.abs(found[0] - x).max() > 1


@pytest.mark.parametrize("call, error, message", [
    (lambda lm_, index: steering.maximum(index, FEATURES), FeatureIndexError, "features 0 to 39"),
    (lambda lm_, index: steering.maximum(index, DEAD[0]), SteeringError, "feature 7: never active on"),
    (lambda lm_, index: steering.plan(lm_, make_sae(), [Change("", {-1: 0.0})]), SteeringError, "numbered 0 to 39"),
    (lambda lm_, index: steering.plan(lm_, make_sae(), [Change("mine", vector=np.zeros(3))]), SteeringError,
     r"mine: .* takes \(48,\)"),
    (lambda lm_, index: steering.plan(lm_, random_sae("relu", hookpoint="blocks.9.hook_resid_post"), [Change()]), HookpointError,
     "blocks.0 to blocks.2"),
    (lambda lm_, index: steering.plan(lm_, random_sae("relu", hookpoint="blocks.0.mlp.hook_post"), [Change()]), SteeringError,
     "48 wide at blocks.0.mlp.hook_post, this model 80"),
    (lambda lm_, index: steering.plan(lm_, random_sae("relu", hookpoint=tiny.HOOKPOINT, target="blocks.0.hook_mlp_out"),
                                      [Change()]), SteeringError, "before it has read"),
    (lambda lm_, index: steering.continuations(lm_, make_sae(), "a" * 63, [Change()]), LMError, "do not fit the context of 64"),
    (lambda lm_, index: steering.few_shot_vector(lm_, tiny.HOOKPOINT, ["a"], []), FeatureIndexError, "positive and negative")])
def test_what_cannot_be_steered_says_so_in_one_line(lm_, index, call, error, message):
    with pytest.raises(error, match=message) as found:
        call(lm_, index)
    assert "\n" not in str(found.value) and issubclass(error, SaejaxError)


def test_a_crosscoder_is_refused(lm_):
    W = jnp.ones((FEATURES, 2 * tiny.D_IN))
    cfg = SAEConfig("relu", 2 * tiny.D_IN, FEATURES, 0, False, ("blocks.0.hook_resid_post", tiny.HOOKPOINT), "tiny",
                    layers=(tiny.D_IN,) * 2)
    sae = SAE(SAEParams(W_enc=W, b_enc=jnp.zeros(FEATURES), W_dec=W, b_dec=jnp.zeros(2 * tiny.D_IN)), cfg)
    with pytest.raises(SteeringError, match="neither steered nor ablated"):
        steering.plan(lm_, sae, [Change("up", 3, 1.0)])


def test_a_dictionary_over_several_devices(lm_, clean):
    """Features that do not compete are gathered by themselves; those that do need their whole dictionary on one device."""
    mesh = sharding.make_mesh(MeshOptions(1, 2), jax.devices()[:2])
    changes, positions = [Change("up", {3: 9.0})], np.arange(len(clean))[None]
    found = [steering.plan(lm_, random_sae("relu", mesh=where), changes)()[tiny.HOOKPOINT](jnp.asarray(clean[None]), positions)
             for where in (None, mesh)]
    np.testing.assert_allclose(*found, atol=1e-5)
    with pytest.raises(SteeringError, match="load it without a mesh"):
        steering.plan(lm_, random_sae("topk", mesh=mesh), changes)


def test_what_a_change_does_to_the_next_token(lm_, tokens, index):
    """KL and probabilities against two passes of the whole model."""
    sae, change = make_sae(), Change("up", {3: 40.0})
    [found] = steering.next_tokens(lm_, sae, PROMPT, [change], n=2)
    taps = steering.plan(lm_, sae, [change], np.array([~np.isin(tokens, [lm_.tokenizer.bos_id])]))
    clean, changed = (jax.nn.softmax(lm_.model(tokens[None], taps=made)[0, -1]) for made in (None, taps()))
    assert found.kl == pytest.approx(float((clean * jnp.log(clean / changed)).sum()), rel=1e-3) and found.kl > 1e-4
    token, before, after = found.rises[0]
    rise = np.where(lm_.known_V, changed - clean, -1)  # the model has rows that no token belongs to
    assert token == int(rise.argmax()) and not lm_.known_V.all()
    assert (before, after) == pytest.approx((float(clean[token]), float(changed[token])), rel=1e-3)
    assert found.falls[0][0] == int((changed - clean).argmin()) and len(found.rises) == 2
    [nothing] = steering.next_tokens(lm_, sae, PROMPT, [Change()])
    assert nothing.kl == 0
