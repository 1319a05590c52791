"""Sound files whose tensors or configs do not fit: every one is refused with one line that names the key."""

import json
from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base.errors import FormatError
from tests.formats.building import (
    D,
    F,
    common,
    f32,
    lens_config,
    torch_save,
    weights,
    write_json,
    write_safetensors,
)

ROOT = Path(__file__).parent / "fixtures"
GOOD = f32(common(weights()))


def lens(path, tensors, **changes):
    write_safetensors(path / "sae_weights.safetensors", GOOD | tensors)
    write_json(path / "cfg.json", lens_config(**changes))
    return path


def scaled():
    return {"scaling_factor": np.linspace(1, 2, F, dtype=np.float32)}


def nan(name):
    bad = GOOD[name].copy()
    bad.flat[3] = np.nan
    return {name: bad}


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        (nan("W_dec"), {}, "tensor W_dec holds NaN"),
        (scaled(), {}, "scaling_factor is not 1 for all features"),
        (nan("b_enc"), {}, "tensor b_enc holds NaN"),
        ({"W_enc": GOOD["W_enc"].T}, {}, "W_enc: F32 \\(40, 12\\), expected"),
        ({"../../outside": np.zeros(1, np.float32)}, {}, "../../outside: unexpected"),
        ({"threshold": np.zeros(F, np.float32)}, {}, "threshold: unexpected"),
        ({"W_dec": GOOD["W_dec"].astype(np.float64) + 1e-12}, {}, "W_dec is float64 and would lose values"),
        ({"b_enc": np.zeros(F, np.int64)}, {}, "b_enc: I64"),
        ({}, {"d_sae": 1 << 60}, "d_sae=1152921504606846976"),
        ({}, {"d_sae": -3}, "d_sae=-3"),
        ({}, {"d_sae": True}, "d_sae=True"),
        ({}, {"d_in": 12.0}, "d_in=12.0"),
        ({}, {"architecture": "gated"}, "b_mag: missing"),
        ({}, {"architecture": "topk", "k": 41}, "k=41 of 40 features"),
        ({}, {"architecture": "topk"}, ": k is missing"),
        ({}, {"output_gain": 2.0}, "output_gain=2.0 \\(unknown key; written by a newer version"),
        ({}, {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input='yes'"),
        ({}, {"normalize_activations": "expected_average_only_in"}, "the factor is not known"),
        ({}, {"reshape_activations": "conv"}, "reshape_activations='conv' \\(not one of"),
        ({}, {"architecture": "batchtopk"}, "topk_threshold: missing"),
        ({}, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm=True"),
        ({}, {"metadata": [1]}, "metadata=\\[1\\]"),
    ],
)
def test_saelens(tmp_path, tensors, changes, message):
    with pytest.raises(FormatError, match=message):
        saejax.load(lens(tmp_path / "sae", tensors, **changes))


@pytest.mark.parametrize(
    "scaler, norm, message",
    [
        ({"scaling_factor": 2.0}, "none", "folded already or not is not known"),
        ({"scaling_factor": 2.0, "has_whitening": True}, "expected_average_only_in", "has_whitening=True"),
        ({"scaling_factor": None}, "expected_average_only_in", "scaling_factor is null"),
        ({"scaling_factor": -1.0}, "expected_average_only_in", "scaling_factor=-1.0"),
        ({"scaling_factor": 2.0, "offset": 1}, "expected_average_only_in", "offset=1 \\(unknown key"),
    ],
)
def test_saelens_scaler(tmp_path, scaler, norm, message):
    path = lens(tmp_path / "sae", {}, normalize_activations=norm)
    write_json(path / "activation_scaler.json", scaler)
    with pytest.raises(FormatError, match=message):
        saejax.load(path)


def dictionary(path, change):
    values = {
        "encoder.weight": GOOD["W_enc"].T,
        "encoder.bias": GOOD["b_enc"],
        "decoder.weight": GOOD["W_dec"].T,
        "b_dec": GOOD["b_dec"],
        "k": np.array(4, np.int32),
        "threshold": np.array(0.5, np.float32),
    } | change.pop("tensors", {})
    torch_save(path / "ae.pt", values)
    write_json(path / "config.json", {"trainer": {"dict_class": "BatchTopKSAE", "k": 4} | change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dict_class": "AutoEncoder"}, "can be AutoEncoderTopK or BatchTopKSAE"),
        ({"k": 5}, "k=4 of 40 features, trainer.k=5"),
        ({"tensors": {"threshold": np.array(-1.0, np.float32)}}, "threshold that was never set"),
        ({"tensors": {"k": np.array(41, np.int32)}}, "k=41 of 40"),
        ({"tensors": {"scale": np.ones(F, np.float32)}}, "are those of none of"),
        ({"tensors": {"threshold": np.array(np.nan, np.float32)}}, "threshold holds NaN"),
        ({"tensors": {"note": "hi"}}, "unknown key note"),
        ({"dict_class": 7}, "trainer.dict_class=7"),
    ],
)
def test_dictionary_learning(tmp_path, change, message):
    dictionary(tmp_path, dict(change))
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


OPENAI = {
    "pre_bias": GOOD["b_dec"],
    "latent_bias": GOOD["b_enc"],
    "encoder.weight": GOOD["W_enc"].T,
    "decoder.weight": GOOD["W_dec"].T,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "TopK", "activation_state_dict": {"k": 4, "postact_fn": "Identity"}}, "postact_fn='Identity'"),
        ({"activation": "TopK", "activation_state_dict": {"postact_fn": "ReLU"}}, "k=None"),
        ({"activation": "Sigmoid"}, "is not ReLU or TopK"),
        ({"activation": "TopK", "activation_state_dict": {"k": 4, "extra": 1}}, "with extra"),
        ({"gain": 2.0}, "unknown key gain"),
        ({"scale": np.ones(F, np.float32)}, "scale: unexpected"),
    ],
)
def test_openai(tmp_path, change, message):
    torch_save(tmp_path / "1.pt", OPENAI | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path / "1.pt")


MOSS = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": F / D,
    "act_fn": "relu",
    "norm_activation": "inference",
    "hook_point_in": "h",
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_glu_encoder": True}, "use_glu_encoder=True \\(not one of"),
        ({"sae_type": "clt"}, "sae_type='clt'"),
        ({"norm_activation": "batch-wise"}, "norm_activation='batch-wise'"),
        ({"act_fn": "jumprelu"}, "neither a tensor of thresholds"),
        ({"norm_activation": "dataset-wise"}, "no dataset_average_activation_norm"),
        ({"d_model": 13}, "has W_enc for 12 and 40"),
        ({"act_fn": "topk"}, "top_k=0"),
        ({"gain": 1}, "gain=1 \\(unknown key"),
        ({"act_fn": "topk", "top_k": "all"}, "top_k='all'"),
    ],
)
def test_openmoss(tmp_path, change, message):
    tensors = {"W_E": GOOD["W_enc"], "b_E": GOOD["b_enc"], "W_D": GOOD["W_dec"], "b_D": GOOD["b_dec"]}
    write_safetensors(tmp_path / "sae_weights.safetensors", tensors)
    write_json(tmp_path / "config.json", MOSS | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"signed": True}, "signed=True"),
        ({"activation": "relu"}, "activation='relu' \\(not one of"),
        ({"k": 200}, "k=200 does not fit"),
        ({"skip_connection": True}, "skip_connection=True without transcode"),
        ({"num_latents": 64}, "expected F32 or"),
        ({"activation": "groupmax", "k": 7}, "k=7 does not fit"),
        ({"temperature": 1}, "temperature=1 \\(unknown key"),
    ],
)
def test_sparsify(tmp_path, change, message):
    source = ROOT / "sparsify" / "topk"
    (tmp_path / "sae.safetensors").write_bytes((source / "sae.safetensors").read_bytes())
    write_json(tmp_path / "cfg.json", json.loads((source / "cfg.json").read_text()) | change)
    with pytest.raises(FormatError, match=message):
        saejax.load(tmp_path)


def test_gemma_scope_2(tmp_path):
    tensors = {n.replace("W_", "w_"): v for n, v in f32(weights()).items()}
    write_safetensors(tmp_path / "params.safetensors", tensors)
    for change, message in (
        ({"architecture": "topk"}, "architecture='topk'"),
        ({"affine_connection": True}, "lacks affine_skip_connection"),
        ({"input_scale": 2}, "input_scale=2 \\(unknown key"),
    ):
        write_json(tmp_path / "config.json", {"architecture": "jump_relu"} | change)
        with pytest.raises(FormatError, match=message):
            saejax.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"expansion_factor": float("nan")},
        {"expansion_factor": float("inf")},
        {"expansion_factor": 1 << 2000},
        {"jump_relu_threshold": float("inf"), "act_fn": "jumprelu"},
        {"model_name": 7},
    ],
)
def test_numbers_that_are_none(tmp_path, change):
    test_openmoss(tmp_path, change, rf"config.json: {next(iter(change))}=.* \(not a (number|text)\)")
