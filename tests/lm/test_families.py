"""Every family against transformers + torch: logits and hookpoints, and no config field without effect.

The golden files hold outputs only. When one does not fit and the change is meant: `python benchmarks/lm_golden.py
--families` (with torch) writes them anew; say in the commit why they changed.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.base.errors import LMError, WeightsError
from saejax.lm import weights
from saejax.lm.arch import RopeConfig
from saejax.lm.hf_config import READERS, from_hf
from tests.lm import families

GOLDEN = Path(__file__).parent / "golden" / "families"
REGENERATE = "if the change is meant: python benchmarks/lm_golden.py --families"
# The two codes agree to 1e-5; a tanh GELU in place of the exact one moves some logits by less than 1e-3.
LOGITS_ATOL = 1e-4
HOOK_RTOL = 1e-3


def golden(label: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{label}.npz"))


@jax.jit
def logits_of(model, tokens_BT):
    return model(tokens_BT)


@jax.jit
def hooks_of(model, tokens_BT):
    rows, columns = zip(*families.POSITIONS, strict=True)
    kept = lm.capture(model, tokens_BT, lm.hookpoints(model.cfg))
    return {name: value[jnp.array(rows), jnp.array(columns)] for name, value in kept.items()}


def logits_error(model, wanted) -> float:
    return float(np.abs(np.asarray(logits_of(model, jnp.asarray(families.TOKENS)))[:, ::3] - wanted["logits"]).max())


def test_every_supported_family_has_a_golden_file():
    assert {config["model_type"] for config in families.CONFIGS.values()} == set(READERS)


@pytest.mark.parametrize("label", families.CONFIGS)
def test_logits_and_hookpoints_equal_torch(family_model, label):
    wanted, model = golden(label), family_model(label)
    error = logits_error(model, wanted)
    assert error <= LOGITS_ATOL, f"{label}: logits differ by {error}; {REGENERATE}"
    found = hooks_of(model, jnp.asarray(families.TOKENS))
    assert set(found) == set(wanted) - {"logits"}
    errors = {
        name: float((np.linalg.norm(found[name] - wanted[name], axis=-1) / np.linalg.norm(wanted[name], axis=-1)).max())
        for name in found
    }
    wrong = {name: error for name, error in errors.items() if not error <= HOOK_RTOL}
    assert not wrong, f"{label}: hookpoints differ by {wrong}; {REGENERATE}"
    assert all(found[name].shape[-1] == lm.width_of(model.cfg, name) for name in found)


def mutants(cfg: lm.LMConfig) -> dict[str, tuple[str, object]]:
    """The config with one field changed at a time, every field that this model uses; nested rope fields by path."""
    made = {}
    for name, changed in _CHANGES.items():
        value = getattr(cfg, name)
        for index, new in enumerate(changed(value, cfg)):
            made[f"{name}[{index}]"] = (name, new)
    for index, rope in enumerate(cfg.ropes):
        for name in (field.name for field in dataclasses.fields(rope)):
            if (name, rope.scaling) in _UNUSED_ROPE or (name not in _ALWAYS_ROPE and rope.scaling == "none"):
                continue
            if name == ("short_factors" if families.LENGTH > rope.original_context else "long_factors"):
                continue  # read in contexts of the other length: the other phi3 of the table has it
            new = dataclasses.replace(rope, **{name: _CHANGED_ROPE[name](getattr(rope, name))})
            made[f"ropes[{index}].{name}"] = ("ropes", (*cfg.ropes[:index], new, *cfg.ropes[index + 1 :]))
    return made


def _each(values: tuple, change) -> list[tuple]:
    """The tuple with one item changed at a time."""
    return [(*values[:i], change(value), *values[i + 1 :]) for i, value in enumerate(values)]


_ALWAYS_ROPE = ("theta", "dim", "attention_factor")
# Fields of a rope that its scaling does not read.
_UNUSED_ROPE = {
    *((name, "linear") for name in ("low_freq_factor", "high_freq_factor", "original_context")),
    *((name, scaling) for name in ("short_factors", "long_factors") for scaling in ("linear", "llama3", "yarn")),
    *((name, scaling) for name in ("low_freq_factor", "high_freq_factor") for scaling in ("longrope", "yarn")),
    ("factor", "longrope"),
    *((name, scaling) for name in ("beta_fast", "beta_slow", "truncate") for scaling in ("linear", "llama3", "longrope")),
}
_CHANGED_ROPE = {
    "theta": lambda value: 1.1 * value,
    "dim": lambda value: value - 2,
    "scaling": lambda value: "none",
    "factor": lambda value: 1.2 * value,
    "low_freq_factor": lambda value: 0.7 * value,
    "high_freq_factor": lambda value: 1.4 * value,
    "original_context": lambda value: value + 40 if value == 32 else 32,
    "short_factors": lambda value: tuple(1.1 * x for x in value),
    "long_factors": lambda value: tuple(1.1 * x for x in value),
    "attention_factor": lambda value: 1.1 * value,
    "beta_fast": lambda value: 0.5 * value,
    "beta_slow": lambda value: 2.0 * value,
    "truncate": lambda value: not value,
}
_CHANGES = {
    **{
        name: (lambda value, cfg: [value + 1])
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp")
    },
    "norm_eps": lambda value, cfg: [2 * value],
    "max_context": lambda value, cfg: [63],
    "attn_scales": lambda value, cfg: _each(value, lambda x: 1.3 * x),
    "ropes": lambda value, cfg: [()] if value else [],
    "layer_rope": lambda value, cfg: _each(value, lambda x: -1 if x >= 0 else 0) if cfg.ropes else [],
    "windows": lambda value, cfg: _each(value, lambda x: x - 1 if x else 40),
    "norm": lambda value, cfg: ["layer" if value == "rms" else "rms"],
    "norm_offset": lambda value, cfg: [1.0 - value] if cfg.norm == "rms" else [],
    "norm_places": lambda value, cfg: ["both" if value == "pre" else "pre"],
    "qk_norm": lambda value, cfg: ["head" if value != "head" else "none"],
    "activation": lambda value, cfg: [{"gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu": "silu", "silu": "gelu"}[value]],
    "attn_softcap": lambda value, cfg: [value + 4.0],
    "final_softcap": lambda value, cfg: [value + 4.0],
    "embed_scale": lambda value, cfg: [1.1 * value],
    **{
        name: (lambda value, cfg: [not value])
        for name in (
            "tied_embeddings",
            "parallel",
            "gated",
            "qkv_bias",
            "attn_out_bias",
            "mlp_bias",
            "learned_positions",
        )
    },
}
# No effect on the forward pass: `family` chooses the tensor names only.
_NAMES_ONLY = {"family"}


def test_the_mutation_table_has_every_field():
    assert {field.name for field in dataclasses.fields(lm.LMConfig)} - _NAMES_ONLY == set(_CHANGES)
    assert {field.name for field in dataclasses.fields(RopeConfig)} == set(_CHANGED_ROPE)


@pytest.mark.parametrize(
    "label",
    [
        pytest.param(label, marks=() if label in ("gpt_neox", "mistral", "gemma3") else pytest.mark.slow)
        for label in families.CONFIGS
    ],
)
def test_no_config_field_is_ignored(family_folder, label):
    """Each mutant is refused (its weights do not fit, or the context is too long) or its logits leave the tolerance."""
    wanted, cfg = golden(label), from_hf(families.CONFIGS[label])
    silent = []
    for name, (field, value) in mutants(cfg).items():
        try:
            changed = dataclasses.replace(cfg, **{field: value})
            model = weights.from_safetensors(changed, family_folder(label), dtype=jnp.float32)
            # Compiling some 300 mutants would take minutes; operation by operation they take seconds.
            with jax.disable_jit():
                error = logits_error(model, wanted)
        except (LMError, WeightsError):
            continue
        if not error > LOGITS_ATOL:
            silent.append(f"{name} (error {error:.1e})")
    assert set(silent) == set(), f"{label}: no effect of {', '.join(silent)}; {REGENERATE}"
