"""SAELens: variants without a file of the peer, built from the description of the layout, formulas in float64."""

import math

import numpy as np
import pytest

import saejax
from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.records import MeshOptions
from tests.formats.building import (
    D,
    F,
    bf16,
    check,
    common,
    f32,
    inputs,
    jump,
    layer_norm,
    loaded,
    pre,
    relu,
    topk,
    weights,
    write_json,
    write_lens,
    write_safetensors,
)

X = inputs()
NORMS = np.linalg.norm(weights()["W_dec"], axis=1)
S = 0.37  # factor on the inputs


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale", "none"])
def test_saelens_norms(tmp_path, norm, centred):
    w = weights()
    write_lens(
        tmp_path, common(w, "threshold"), architecture="jumprelu", normalize_activations=norm, apply_b_dec_to_input=centred
    )
    by = np.linalg.norm(X, axis=1, keepdims=True) / math.sqrt(D)
    z, std, mean = {
        "layer_norm": lambda: layer_norm(X),
        "constant_norm_rescale": lambda: (X / by, by, 0),
        "none": lambda: (X, 1, 0),
    }[norm]()
    acts = jump(pre(w, z, centred), w["threshold"])
    sae = loaded(tmp_path, "saelens")
    check(sae, X, acts, (acts @ w["W_dec"] + w["b_dec"]) * std + mean)
    assert sae.cfg.metadata["text"] == {"context": 128, "bos": "row"} and sae.cfg.hookpoint == "h"
    if norm == "layer_norm" and centred:
        check(
            saejax.load(tmp_path, mesh=sharding.make_mesh(MeshOptions(2, 4))),
            X,
            acts,
            (acts @ w["W_dec"] + w["b_dec"]) * std + mean,
        )


def test_saelens_layer_norm_in_a_transcoder_is_not_undone(tmp_path):
    w = weights(10)
    skip = np.random.default_rng(5).standard_normal((10, D)).astype(np.float32)
    write_lens(
        tmp_path,
        common(w) | {"W_skip": skip},
        architecture="skip_transcoder",
        normalize_activations="layer_norm",
        d_out=10,
        apply_b_dec_to_input=False,
    )
    acts = relu(pre(w, layer_norm(X)[0], False))
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"] + X @ skip.T)


def test_saelens_topk_selects_by_norm(tmp_path):
    w = weights()
    write_lens(tmp_path, common(w), architecture="topk", k=5, rescale_acts_by_decoder_norm=True)
    acts = topk(pre(w, X, True) * NORMS, 5)
    check(loaded(tmp_path, "saelens"), X, acts, (acts / NORMS) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_saelens_training_checkpoint_with_scaler(tmp_path, architecture, rescaled):
    """What SAELens exports: inputs times s folded, then decoder norms; its threshold is one float64 number."""
    w, threshold = weights(), 1.1
    write_lens(
        tmp_path,
        common(w),
        architecture=architecture,
        k=5.5,
        rescale_acts_by_decoder_norm=rescaled,
        topk_threshold_lr=0.01,
        normalize_activations="expected_average_only_in",
        aux_loss_coefficient=1.0,
        decoder_init_norm=0.1,
    )
    write_safetensors(tmp_path / "sae_weights.safetensors", {**f32(common(w)), "topk_threshold": np.float64(threshold)})
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": S, "has_whitening": False})
    z = pre(w, X * S, True)
    by = NORMS / S if rescaled else np.ones(F)
    acts = jump(z * by, threshold / S if rescaled else threshold)
    check(loaded(tmp_path, "saelens"), X, acts, (acts / by) @ (w["W_dec"] / S) + w["b_dec"] / S)


def test_saelens_log_threshold_of_older_checkpoints(tmp_path):
    w = weights()
    write_lens(tmp_path, common(w) | {"log_threshold": np.log(w["threshold"])}, architecture="jumprelu", jumprelu_bandwidth=0.05)
    acts = jump(pre(w, X, True), w["threshold"])
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"])


def test_saelens_before_6(tmp_path):
    w = weights()
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(common(w) | {"scaling_factor": np.ones(F)}))
    write_json(
        tmp_path / "cfg.json",
        {
            "d_in": D,
            "d_sae": F,
            "hook_point": "blocks.2.attn.hook_z",
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 5},
            "model_name": "m",
            "context_size": 64,
            "dtype": "torch.float32",
        },
    )
    acts = topk(pre(w, X, True), 5)
    sae = loaded(tmp_path, "saelens")
    check(sae, X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert (sae.cfg.hookpoint, sae.cfg.model, sae.cfg.metadata["reshape"]) == ("blocks.2.attn.hook_z", "m", "hook_z")


def test_layer_norm_adds_its_eps_going_in_only(tmp_path):
    """Rows whose spread is near the eps: 0.7 % in the activations, nothing in the way back."""
    w, x = weights(), X * 1e-3
    write_lens(tmp_path, common(w), normalize_activations="layer_norm")
    z, std, mean = layer_norm(x.astype(np.float64))
    acts = relu(pre(w, z, True))
    recon, got = saejax.load(tmp_path).reconstruct(x)
    np.testing.assert_allclose(got, acts, atol=1e-4)
    np.testing.assert_allclose(recon, (acts @ w["W_dec"] + w["b_dec"]) * std + mean, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("stored", ["threshold", "topk_threshold"])
def test_a_feature_at_its_threshold_is_off(tmp_path, stored):
    """Numbers that float32 holds, so that pre = threshold to the last bit."""
    identity = {"W_enc": np.eye(D), "b_enc": np.zeros(D), "W_dec": np.eye(D), "b_dec": np.zeros(D)}
    architecture = "jumprelu" if stored == "threshold" else "batchtopk"
    write_lens(tmp_path, identity, architecture=architecture, d_sae=D, **({"k": 2.0} if stored != "threshold" else {}))
    value = np.full(D, 2, np.float32) if stored == "threshold" else np.float64(2)
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(identity) | {stored: value})
    x = np.arange(D, dtype=np.float32)[None] - 3
    np.testing.assert_array_equal(saejax.load(tmp_path).encode(x), np.where(x > 2, x, 0))


@pytest.mark.parametrize("skip", [True, False])
def test_saelens_jumprelu_transcoders(tmp_path, skip):
    w = weights(10)
    W_skip = np.random.default_rng(5).standard_normal((10, D)).astype(np.float32)
    architecture = "jumprelu_skip_transcoder" if skip else "jumprelu_transcoder"
    tensors = common(w, "threshold") | ({"W_skip": W_skip} if skip else {})
    write_lens(tmp_path, tensors, architecture=architecture, d_out=10, apply_b_dec_to_input=False)
    acts = jump(pre(w, X, False), w["threshold"])
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"] + (X @ W_skip.T if skip else 0))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_saelens_before_6_other_kinds(tmp_path, architecture):
    w = weights()
    tensors = common(w, *(["threshold"] if architecture == "jumprelu" else []))
    r_mag, b_mag = np.linspace(-0.5, 0.5, F), np.linspace(-0.2, 0.2, F)
    if architecture == "gated":
        tensors = tensors | {"b_gate": tensors.pop("b_enc"), "r_mag": r_mag, "b_mag": b_mag}
    write_safetensors(tmp_path / "sae_weights.safetensors", f32(tensors))
    config = {"d_in": D, "d_sae": F, "architecture": architecture, "apply_b_dec_to_input": False, "normalize_activations": False}
    write_json(tmp_path / "cfg.json", config | {"hook_name": "h", "activation_fn": "relu", "l1_coefficient": 3})
    z = pre(w, X, False)
    magnitude = (z - w["b_enc"]) * np.exp(r_mag.astype(np.float32)) + b_mag.astype(np.float32)
    acts = {"standard": relu(z), "gated": np.where(z > 0, relu(magnitude), 0), "jumprelu": jump(z, w["threshold"])}[architecture]
    check(loaded(tmp_path, "saelens"), X, acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_that_lose_nothing(tmp_path, dtype):
    rounded = {
        "bfloat16": lambda v: (bf16(v).astype(np.uint32) << 16).view(np.float32),
        "float16": lambda v: v.astype(np.float16),
        "float64": lambda v: v,
    }[dtype]
    w = {name: rounded(value).astype(np.float64) for name, value in weights().items()}
    stored = {"bfloat16": bf16, "float16": lambda v: v.astype(np.float16), "float64": lambda v: v}[dtype]
    write_lens(tmp_path, common(w), dtype=dtype)
    write_safetensors(tmp_path / "sae_weights.safetensors", {name: stored(value) for name, value in common(w).items()})
    sae = saejax.load(tmp_path)
    np.testing.assert_array_equal(sae.W_enc, w["W_enc"])
    np.testing.assert_array_equal(sae.W_dec, w["W_dec"])


def _centred(model="gpt2-small", hook="blocks.1.hook_resid_pre", **kwargs):
    return {"model_name": model, "hook_name": hook, "prepend_bos": True, "context_size": 128, "sae_lens_version": "6.0.0",
            "model_from_pretrained_kwargs": kwargs}


@pytest.mark.parametrize("model, hook, centred", [
    ("gpt2-small", "blocks.1.hook_resid_pre", True), ("EleutherAI/pythia-70m-deduped", "blocks.0.hook_mlp_out", True),
    ("gpt2-small", "blocks.1.mlp.hook_post", False), ("google/gemma-2-2b", "blocks.1.hook_resid_pre", False),
])
def test_saelens_centred_writing_weights(tmp_path, model, hook, centred):
    """Rows less their mean, where the model has LayerNorm and the hookpoint is in the residual stream."""
    w = weights()
    write_lens(tmp_path / "a", common(w), metadata=_centred(model, hook, center_writing_weights=True, fold_ln=True))
    mean = X.mean(1, keepdims=True) if centred else 0
    acts = relu(pre(w, X - mean, True))
    recon = acts @ w["W_dec"] + w["b_dec"]
    sae = loaded(tmp_path / "a", "saelens")
    check(sae, X, acts, recon + mean)
    if centred:
        np.testing.assert_allclose(np.asarray(sae.decode(sae.encode(X))), recon, atol=1e-4)
    sae.save(tmp_path / "b")
    check(saejax.load(tmp_path / "b"), X, acts, recon + mean)


@pytest.mark.parametrize("model, hook, kwargs, part", [
    ("any", "blocks.1.hook_resid_pre", {"center_writing_weights": True}, "center_writing_weights=True .*whether 'any' is one"),
    ("gpt2", "blocks.1.hook_resid_pre", {"checkpoint_index": 3, "fold_ln": True}, "checkpoint_index=3 .changes what"),
    ("gpt2", "blocks.1.attn.hook_z", {"fold_value_biases": True}, "fold_value_biases=True .changes what"),
    ("gpt2", "blocks.1.ln2.hook_normalized", {"fold_ln": True}, "fold_ln=True .changes what"),
])
def test_saelens_models_that_were_changed_are_refused_by_name(tmp_path, model, hook, kwargs, part):
    write_lens(tmp_path, common(weights()), metadata=_centred(model, hook, **kwargs))
    with pytest.raises(FormatError, match=part) as caught:
        saejax.load(tmp_path)
    assert "\n" not in str(caught.value)
