import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax.base.errors import SaejaxError, WeightsError
from saejax.lm import gguf_config, hf_config, weights
from saejax.lm.gguf_file import GGUFFile
from tests.lm import families, gguf_writer, tiny_llama

CFG = hf_config.from_hf(tiny_llama.CONFIG)


def load(folder, cfg=CFG, dtype=jnp.float32, **options):
    return weights.from_safetensors(cfg, folder, dtype=dtype, **options)


def same(first, second) -> None:
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def shard(folder, tensors: dict, files: int = 3) -> None:
    """Writes `tensors` over several files and the index, as Hugging Face does."""
    folder.mkdir()
    names, where = sorted(tensors), {}
    for number in range(files):
        own = names[number::files]
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_sharded_index(tmp_path, tiny):
    shard(tmp_path / "m", tiny_llama.tensors())
    same(load(tmp_path / "m"), tiny)


@pytest.mark.parametrize("stored", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_any_float_dtype(tmp_path, stored):
    tensors = {name: value.astype(stored) for name, value in tiny_llama.tensors().items()}
    model = load(tiny_llama.write(tmp_path / "a", weights=tensors))
    back = {name: value.astype(np.float32) for name, value in tensors.items()}
    same(model, load(tiny_llama.write(tmp_path / "b", weights=back)))


def test_loads_as_bfloat16(tiny, tiny_folder):
    for half, full in zip(jax.tree.leaves(load(tiny_folder, dtype=jnp.bfloat16)), jax.tree.leaves(tiny), strict=True):
        np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


def test_every_problem_in_one_error(tmp_path):
    tensors = tiny_llama.tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(12, np.float32)
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.ones((72, 48), np.float32)
    with pytest.raises(WeightsError) as caught:
        load(tiny_llama.write(tmp_path / "m", weights=tensors))
    message = str(caught.value)
    for part in (
        "4 tensors",
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "extra model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.self_attn.k_proj.weight has shape (72, 48), the config says (24, 48)",
    ):
        assert part in message
    assert "\n" not in message


def test_harmless_extras_are_ignored_by_name(tmp_path, tiny):
    tensors = tiny_llama.tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}
    same(load(tiny_llama.write(tmp_path / "a", weights=tensors)), tiny)
    tied = tiny_llama.CONFIG | {"tie_word_embeddings": True}
    model = load(tiny_llama.write(tmp_path / "b", tied, tensors), hf_config.from_hf(tied))
    assert "unembed" not in model.whole
    np.testing.assert_array_equal(model.whole["embed"][...], tensors["model.embed_tokens.weight"])


def test_a_config_without_biases_refuses_a_file_with_them(tiny_folder):
    with pytest.raises(WeightsError, match="extra model.layers.0.mlp.down_proj.bias"):
        load(tiny_folder, hf_config.from_hf(tiny_llama.CONFIG | {"mlp_bias": False}))


def test_integer_tensors_are_refused(tmp_path):
    tensors = tiny_llama.tensors()
    tensors["model.norm.weight"] = np.ones(48, np.int8)
    with pytest.raises(WeightsError, match=r"model.norm.weight \(I8\)"):
        load(tiny_llama.write(tmp_path / "m", weights=tensors))


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-100],
        lambda raw: raw[:5],
        lambda raw: b"",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw + b"tail",
    ],
)
def test_damaged_safetensors(tmp_path, tiny_folder, damage):
    (tmp_path / "model.safetensors").write_bytes(damage((tiny_folder / "model.safetensors").read_bytes()))
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="convert the weights to safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
        '{"weight_map": {"a": 7}}',
    ],
)
def test_hostile_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="model.safetensors.index.json"):
        load(tmp_path)


# What a GGUF file cannot say is at the value that its readers take for granted.
GGUF_CONFIGS = {
    "llama": tiny_llama.CONFIG,
    "llama3": families.CONFIGS["llama3"],
    "llama_linear": families.CONFIGS["llama_linear"],
    "qwen2": families.CONFIGS["qwen2"] | {"use_sliding_window": False},
    "qwen3": families.CONFIGS["qwen3"],
    "yarn": families.CONFIGS["llama_yarn"] | {"rope_scaling": {
        "type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "beta_fast": 1.5, "beta_slow": 0.4}},
    "gemma2": families.CONFIGS["gemma2"] | {"query_pre_attn_scalar": 12},
    "gemma3": families.CONFIGS["gemma3"] | {"query_pre_attn_scalar": 12, "final_logit_softcapping": None},
}


@pytest.mark.parametrize("label", GGUF_CONFIGS)
def test_gguf_equals_safetensors(tmp_path, label):
    config = GGUF_CONFIGS[label]
    source = tiny_llama.tensors() if label == "llama" else families.tensors(config)
    gguf_writer.write(tmp_path / "tiny.gguf", config, source)
    families.write(tmp_path / "folder", config, source)
    file = GGUFFile(tmp_path / "tiny.gguf")
    cfg = gguf_config.from_gguf(file.fields(), file.shapes(), file.read)
    model = weights.from_gguf_file(cfg, file, dtype=jnp.float32)
    wanted = load(tmp_path / "folder", hf_config.from_hf(config))
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-7)
    tokens = jnp.asarray(families.TOKENS)
    np.testing.assert_allclose(model(tokens), wanted(tokens), atol=2e-4)


def test_quantised_gguf(tmp_path):
    config = families.CONFIGS["llama_linear"] | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    source = families.tensors(config)
    gguf_writer.write(tmp_path / "q.gguf", config, source, quantise=True)
    file = GGUFFile(tmp_path / "q.gguf")
    cfg = gguf_config.from_gguf(file.fields(), file.shapes(), file.read)
    families.write(tmp_path / "folder", config, source)
    exact = load(tmp_path / "folder", hf_config.from_hf(config))
    found = weights.from_gguf_file(cfg, file, dtype=jnp.float32)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_gpt2_and_neox_files_without_prefix(tmp_path):
    for label, prefix in (("gpt2", "transformer."), ("gpt_neox", "gpt_neox.")):
        config = families.CONFIGS[label]
        bare = {name.removeprefix(prefix): value for name, value in families.tensors(config).items()}
        bare = {name.replace("embed_out", "lm_head"): value for name, value in bare.items()}
        found = load(families.write(tmp_path / label, config, bare), hf_config.from_hf(config))
        same(found, load(families.write(tmp_path / f"{label}_full", config), hf_config.from_hf(config)))


def old_names(tensors: dict) -> dict:
    """The tensors of a multimodal Gemma 3 as transformers before 4.52 named them."""
    old = {name.replace("model.language_model.", "language_model.model."): value for name, value in tensors.items()}
    return {name.replace("lm_head.", "language_model.lm_head."): value for name, value in old.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_gemma3_text_part_under_both_prefixes(tmp_path, tied):
    config = families.CONFIGS["gemma3_multimodal"] | {"tie_word_embeddings": tied}
    cfg = hf_config.from_hf(config)
    tensors = families.tensors(families.CONFIGS["gemma3_multimodal"])
    assert "lm_head.weight" in tensors and any("vision_tower" in name for name in tensors)
    found = load(families.write(tmp_path / "new", config, tensors), cfg)
    same(found, load(families.write(tmp_path / "old", config, old_names(tensors)), cfg))
    assert ("unembed" in found.whole) != tied
    text = {name.replace("model.language_model.", "model."): value for name, value in tensors.items() if "vision" not in name
            and "projector" not in name}
    alone = config["text_config"] | {"tie_word_embeddings": tied}
    same(found, load(families.write(tmp_path / "text", alone, text), hf_config.from_hf(alone)))


@pytest.mark.parametrize("name", ["audio_tower.layers.0.weight", "model.language_model.vision_tower.weight", "my_vision_tower.x"])
def test_gemma3_tensors_that_are_no_vision_tower_are_refused(tmp_path, name):
    config = families.CONFIGS["gemma3_multimodal"]
    tensors = families.tensors(config) | {name: np.ones(3, np.float32)}
    with pytest.raises(WeightsError, match=f"1 tensors do not fit .*extra {name}"):
        load(families.write(tmp_path / "m", config, tensors), hf_config.from_hf(config))


def test_only_gemma3_files_may_hold_a_vision_tower(tmp_path):
    tensors = tiny_llama.tensors() | {"vision_tower.vision_model.post_layernorm.bias": np.ones(3, np.float32)}
    with pytest.raises(WeightsError, match="extra vision_tower.vision_model.post_layernorm.bias"):
        load(tiny_llama.write(tmp_path / "m", weights=tensors))


@pytest.mark.parametrize("keep", [0, 3, 100, 1500, 20_000])
def test_truncated_gguf(tmp_path, keep):
    gguf_writer.write(tmp_path / "tiny.gguf", tiny_llama.CONFIG, tiny_llama.tensors())
    raw = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[:keep])
    with pytest.raises(WeightsError, match="cut.gguf: not a readable GGUF file"):
        GGUFFile(tmp_path / "cut.gguf")


@pytest.mark.parametrize("at, value", [(8, 0xFF), (12, 0xFF), (16, 0xFF), (23, 0x7F), (24, 0xFF), (31, 0x7F), (60, 0xFF)])
def test_hostile_gguf_header(tmp_path, at, value):
    gguf_writer.write(tmp_path / "tiny.gguf", tiny_llama.CONFIG, tiny_llama.tensors())
    raw = bytearray((tmp_path / "tiny.gguf").read_bytes())
    raw[at] = value
    (tmp_path / "bad.gguf").write_bytes(bytes(raw))
    with pytest.raises(SaejaxError) as caught:
        file = GGUFFile(tmp_path / "bad.gguf")
        cfg = gguf_config.from_gguf(file.fields(), file.shapes(), file.read)
        weights.from_gguf_file(cfg, file, dtype=jnp.float32)
    assert "\n" not in str(caught.value)
