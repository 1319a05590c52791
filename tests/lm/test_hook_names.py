"""Hugging Face module names as hookpoints, against what a torch hook on these modules gave (the golden files)."""

import numpy as np
import pytest

from saejax import lm
from saejax.base.errors import HookpointError
from saejax.lm.hf_config import from_hf
from tests.lm import families
from tests.lm.test_families import GOLDEN

LAYERS = (
    "layers.9",
    "model.layers.9",
    "transformer.h.9",
    "h.9",
    "gpt_neox.layers.9",
    "model.language_model.layers.9",
    "language_model.model.layers.9",
    "language_model.layers.9",
)
# The names of the layer's modules in transformers, by family; all families of the table norm before, not after.
MODULES = {
    "gpt2": ("transformer.h", "mlp", "attn"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention"),
    "qwen2": ("model.layers", "mlp", "self_attn"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_form_of_a_layer(layer):
    assert lm.hookpoint_of(layer) == "blocks.9.hook_resid_post"
    for part in ("mlp", "feed_forward"):
        assert lm.hookpoint_of(f"{layer}.{part}") == "blocks.9.hook_mlp_out"
    for part in ("self_attn", "attn", "attention"):
        assert lm.hookpoint_of(f"{layer}.{part}") == "blocks.9.hook_attn_out"


@pytest.mark.parametrize("label", ["gpt2", "gemma2", "olmo2"])
def test_names_of_transformer_lens_pass(label):
    cfg = from_hf(families.CONFIGS[label])
    assert [lm.hookpoint_of(name, cfg) for name in lm.hookpoints(cfg)] == list(lm.hookpoints(cfg))
    assert lm.hookpoint_of("blocks.3.attn.hook_q") == "blocks.3.attn.hook_q"


@pytest.mark.parametrize("label", MODULES)
def test_a_module_is_the_hookpoint_that_torch_saw_there(family_model, label):
    """The golden hookpoints were kept by hooks on these very modules (`MODULES` of benchmarks/lm_golden.py)."""
    model, wanted = family_model(label), np.load(GOLDEN / f"{label}.npz")
    layers, mlp, attention = MODULES[label]
    layer = f"{layers}.1"
    names = {layer: "hook_resid_post", f"{layer}.{mlp}": "hook_mlp_out", f"{layer}.{attention}": "hook_attn_out"}
    found = lm.capture(model, families.TOKENS, [lm.hookpoint_of(name, model.cfg) for name in names])
    rows, columns = zip(*families.POSITIONS, strict=True)
    for name, hook in names.items():
        value = np.asarray(found[lm.hookpoint_of(name)])[rows, columns]
        np.testing.assert_allclose(value, wanted[f"blocks.1.{hook}"], atol=1e-4)


@pytest.mark.parametrize("label", ["gemma2", "gemma3", "olmo2"])
@pytest.mark.parametrize("part, hook", [("mlp", "hook_mlp_out"), ("self_attn", "hook_attn_out")])
def test_an_output_before_a_norm_is_refused(label, part, hook):
    cfg = from_hf(families.CONFIGS[label])
    with pytest.raises(HookpointError, match=f"model.layers.2.{part}'.*before the norm.*blocks.2.{hook} is after"):
        lm.hookpoint_of(f"model.layers.2.{part}", cfg)
    assert lm.hookpoint_of("model.layers.2", cfg) == "blocks.2.hook_resid_post"


@pytest.mark.parametrize(
    "name",
    ["", "layers", "layers.-1", "layers.09", "layers.9.", "layers.9.mlp.act_fn", "layers.9.input_layernorm", "encoder.layers.9",
     "transformer.layers.9", "model.h.9", "blocks.9", "9", "lm_head", "layers.9\nmlp"],
)
def test_names_of_no_family_are_refused(name):
    with pytest.raises(HookpointError) as caught:
        lm.hookpoint_of(name)
    message = str(caught.value)
    assert repr(name) in message and "transformer.h.9" in message and "\n" not in message
