"""What SAEBench is given and what is refused; the torch module itself is checked by benchmarks/ecosystem.py, where torch is."""

import dataclasses
import sys

import jax.numpy as jnp
import pytest

from saejax.base.errors import FormatError
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.saebench import config_for

CFG = SAEConfig("topk", 4, 6, 2, True, ("blocks.9.hook_resid_post",), "some/model",
                metadata={"text": {"context": 128, "bos": "document"}, "training": {"tokens": 1_000}})


def test_the_config_has_what_its_own_has():
    cfg = config_for(CFG, model_name=None, dtype="bfloat16", device="cpu")
    cfg.metadata = cfg.exclude_special_tokens = None  # set by its evaluations, and not written by its to_dict
    written = cfg.to_dict()
    assert written.pop("architecture_str") == "topk"
    assert written == {  # CustomSAEConfig of SAEBench 0.6.0, which trusts remote code of a data set; we name none, and do not
        "model_name": "some/model", "d_in": 4, "d_sae": 6, "hook_layer": 9, "hook_name": "blocks.9.hook_resid_post",
        "context_size": 128, "hook_head_index": None, "architecture": "topk", "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "prepend_bos": False,
        "normalize_activations": "none", "dtype": "bfloat16", "device": "cpu", "model_from_pretrained_kwargs": {},
        "dataset_path": "", "dataset_trust_remote_code": False, "seqpos_slice": (None,), "training_tokens": 1_000,
        "sae_lens_training_version": None, "neuronpedia_id": None}


def test_a_preset_goes_by_the_name_of_the_published_model():
    cfg = config_for(dataclasses.replace(CFG, model="smollm2-135m"), model_name=None, dtype="float32", device="cpu")
    assert cfg.model_name == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("changes, message", [
    ({"d_out": 3, "target": "blocks.9.hook_mlp_out"}, "it is a transcoder"),
    ({"hookpoints": ("embed",)}, "'embed' is not one of"),
    ({"input_norm": "layer_norm"}, "normalised one by one .layer_norm"), ({"kind": "batchtopk"}, "the other rows of a batch"),
    ({"model": "", "hookpoints": ("x", "y"), "layers": (2, 2)}, "crosscoder.*not one of a block; no model is named")])
def test_what_it_cannot_evaluate_is_refused(changes, message):
    with pytest.raises(FormatError, match=message):
        config_for(dataclasses.replace(CFG, **changes), model_name=None, dtype="float32", device="cpu")


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "saejax.sae.torch_view", raising=False)
    params = SAEParams(jnp.ones((6, 4)), jnp.zeros(6), jnp.ones((6, 4)), jnp.zeros(4))
    with pytest.raises(FormatError, match=r"needs torch .*pip install 'saejax\[torch\]'"):
        SAE(params, CFG).as_saebench()
