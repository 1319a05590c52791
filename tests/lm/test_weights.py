import json

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from saejax.errors import WeightsError
from saejax.lm import arch, weights
from saejax.lm.gguf_file import GGUFFile
from tests.lm import tiny_llama

CFG = arch.from_hf(tiny_llama.CONFIG)


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
    model = load(tiny_llama.write(tmp_path / "b", tied, tensors), arch.from_hf(tied))
    assert model.unembed is None
    np.testing.assert_array_equal(model.embed[...], tensors["model.embed_tokens.weight"])


def test_a_config_without_biases_refuses_a_file_with_them(tiny_folder):
    with pytest.raises(WeightsError, match="extra model.layers.0.mlp.down_proj.bias"):
        load(tiny_folder, arch.from_hf(tiny_llama.CONFIG | {"mlp_bias": False}))


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


def write_gguf(path, tensors: dict) -> None:
    """The tiny Llama as GGUF, query and key rows interleaved as that format's llama architecture has them."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (
        ("block_count", CFG.n_layers),
        ("context_length", CFG.max_context),
        ("embedding_length", CFG.d_model),
        ("feed_forward_length", CFG.d_mlp),
        ("attention.head_count", CFG.n_heads),
        ("attention.head_count_kv", CFG.n_kv_heads),
        ("attention.key_length", CFG.head_dim),
        ("attention.value_length", CFG.head_dim),
        ("rope.dimension_count", CFG.head_dim),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", CFG.norm_eps)
    writer.add_float32("llama.rope.freq_base", CFG.rope_theta)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CFG.n_layers)
    for name, value in tensors.items():
        heads = CFG.n_heads if "q_proj" in name else CFG.n_kv_heads if "k_proj" in name else None
        if heads:
            value = value.reshape(heads, 2, CFG.head_dim // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_equals_safetensors(tmp_path, tiny):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama.tensors())
    file = GGUFFile(tmp_path / "tiny.gguf")
    cfg = arch.from_gguf(file.fields(), file.shapes())
    assert cfg == arch.LMConfig(**(vars(CFG) | {"norm_eps": cfg.norm_eps})) and cfg.norm_eps == pytest.approx(
        CFG.norm_eps
    )
    same(jax.tree.leaves(weights.from_gguf_file(cfg, file, dtype=jnp.float32)), jax.tree.leaves(tiny))


@pytest.mark.parametrize("keep", [0, 3, 100, 1500, 20_000])
def test_truncated_gguf(tmp_path, keep):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama.tensors())
    raw = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(raw[:keep])
    with pytest.raises(WeightsError, match="cut.gguf: not a readable GGUF file"):
        GGUFFile(tmp_path / "cut.gguf")
