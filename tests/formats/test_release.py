"""A release is whole and unaltered, or one line says what is wrong with it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import saejax
from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.records import MeshOptions
from saejax.formats.release import release
from saejax.sae import tensors
from saejax.sae.inference import SAE
from saejax.train import loop
from tests.train.synthetic import kinds, make_config, make_store


@pytest.fixture(scope="module", params=[*kinds("relu", "topk", "jumprelu", "batchtopk"), "transcoder", "crosscoder",
                                        pytest.param("skip_transcoder", marks=pytest.mark.slow)])
def released(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("release")
    loop.train(make_config(request.param, path / "run"), make_store(path / "store"))
    return release(saejax.load(path / "run"), path / "run" / "release", {"l0": 4.0, "explained_variance": 0.5})


@pytest.fixture
def copy(released, tmp_path):
    shutil.copytree(released, tmp_path / "release")
    return tmp_path / "release"


def forget_digest(path):
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"]["saejax"]["weights_sha256"]
    (path / "cfg.json").write_text(json.dumps(cfg))


def test_load_release_load_is_identical(released, tmp_path):
    first = saejax.load(released)
    from saejax.formats import saelens
    saelens.write(tmp_path / "again", first)
    second = saejax.load(tmp_path / "again")
    for name, value in tensors(first.params).items():
        np.testing.assert_array_equal(value, tensors(second.params)[name])
    assert first.cfg == second.cfg
    assert first.W_enc.shape == (first.cfg.d_in, 64) and first.W_dec.shape == (64, first.cfg.spec.width_out)


def test_release_and_run_give_the_same_values(released):
    release_, run = saejax.load(released), saejax.load(released.parent)
    assert release_.cfg == run.cfg
    x = np.random.default_rng(0).standard_normal((5, run.cfg.d_in)).astype(np.float32)
    for a, b in zip(release_.reconstruct(x), run.reconstruct(x), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_each_device_reads_its_slice(released, shape):
    sae = saejax.load(released, mesh=sharding.make_mesh(MeshOptions(*shape)))
    one = saejax.load(released)
    assert {s.data.shape for s in sae.params.W_dec.addressable_shards} == {(64 // shape[1], sae.cfg.spec.width_out)}
    np.testing.assert_array_equal(jax.device_get(sae.params.W_enc), one.params.W_enc)


def test_card_and_metrics(released):
    assert "explained_variance | 0.5" in (released / "README.md").read_text()
    assert json.loads((released / "metrics.json").read_text())["l0"] == 4.0


def preset(released):
    """The SAE of a release as one of the demo's model."""
    sae = saejax.load(released)
    metadata = {name: value for name, value in sae.cfg.metadata.items() if name != "lm"}
    return SAE(sae.params, dataclasses.replace(sae.cfg, model="smollm2-135m", metadata=metadata))


def test_a_release_names_the_published_model_and_finds_the_preset(released, tmp_path):
    out = release(preset(released), tmp_path / "out")
    written = json.loads((out / "cfg.json").read_text())["metadata"]
    assert written["model_name"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    said = written["saejax"]["lm"]
    assert (said["model"], said["hub_id"], said["weights"]) == ("smollm2-135m", written["model_name"], "4 bits (GGUF Q4_1)")
    card = (out / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct in 4 bits (GGUF Q4_1), not the published weights" in card
    assert said["sha256"] in card
    assert saejax.load(out).cfg.model == "smollm2-135m"
    written["model_name"] = "some/model"  # whoever writes another name means it
    cfg = json.loads((out / "cfg.json").read_text()) | {"metadata": written}
    (out / "cfg.json").write_text(json.dumps(cfg))
    assert saejax.load(out).cfg.model == "some/model"


def test_a_release_of_another_model_has_its_name(released, tmp_path):
    assert saejax.load(released).cfg.model == json.loads((released / "cfg.json").read_text())["metadata"]["model_name"]
    card = (release(saejax.load(released), tmp_path / "out", {"model_digest": "0123"}) / "README.md").read_text()
    assert f"Language model: {saejax.load(released).cfg.model}" in card and "sha256 0123" in card


def test_the_card_says_on_how_many_tokens_features_are_silent(released, tmp_path):
    card = release(saejax.load(released), tmp_path / "out", {"tokens": 8126, "dead_fraction": 0.07}) / "README.md"
    assert "| dead_fraction (silent on 8,126 tokens) | 0.07 |" in card.read_text()


@pytest.mark.parametrize("position", [0.02, 0.3, 0.6, 0.999])
def test_flipped_bit(copy, position):
    data = bytearray((copy / "sae_weights.safetensors").read_bytes())
    data[int(len(data) * position)] ^= 1
    (copy / "sae_weights.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="sae_weights.safetensors: altered"):
        saejax.load(copy)


def test_truncated_file_of_another_writer(copy):
    forget_digest(copy)
    data = (copy / "sae_weights.safetensors").read_bytes()
    (copy / "sae_weights.safetensors").write_bytes(data[:-7])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        saejax.load(copy)


def test_all_wrong_tensors_in_one_line(copy):
    forget_digest(copy)
    tensors = load_file(copy / "sae_weights.safetensors")
    save_file({"W_enc": tensors["W_enc"][:, :-1].copy(), "W_dec": tensors["W_dec"].astype(np.float16), "extra": tensors["b_dec"],
               "b_dec": tensors["b_dec"]}, copy / "sae_weights.safetensors")
    with pytest.raises(FormatError) as error:
        saejax.load(copy)
    width, bias = len(tensors["W_enc"]), "b_gate" if "b_gate" in tensors else "b_enc"
    for part in (f"{bias}: missing", "extra: unexpected", f"W_enc: F32 ({width}, 63), expected F32 ({width}, 64)", "W_dec: F16 "):
        assert part in str(error.value)


def test_nan_is_refused(copy):
    forget_digest(copy)
    tensors = load_file(copy / "sae_weights.safetensors")
    tensors["W_dec"][3, 1] = np.nan
    save_file(tensors, copy / "sae_weights.safetensors")
    with pytest.raises(FormatError, match="tensor W_dec holds NaN"):
        saejax.load(copy)


@pytest.mark.parametrize("change, message", [
    ({"architecture": "temporal"}, "architecture='temporal' \\(not one of"),
    ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' \\(not one of"),
    ({"normalize_activations": "expected_average_only_in"}, "the factor is not known|the scale of its output is not known"),
    ({"d_sae": "many"}, "cfg.json: d_sae='many' \\(not a whole number"),
    ({"metadata": {"saejax": {"schema_version": 7}}}, "release schema version 7"),
    ({"metadata": None}, "cfg.json: metadata=None \\(not an object"),
])
def test_config_that_cannot_be_read(copy, change, message):
    cfg = json.loads((copy / "cfg.json").read_text()) | change
    (copy / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(FormatError, match=message):
        saejax.load(copy)


def test_neither_release_nor_run(tmp_path):
    with pytest.raises(FormatError, match="neither a release"):
        saejax.load(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        saejax.load(tmp_path / "nothing")
