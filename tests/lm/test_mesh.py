import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from saejax import lm
from saejax.base.errors import LMError
from saejax.lm import weights
from saejax.lm.hf_config import from_hf
from tests.lm import families

# Sizes that divide over 8 devices: every kind of leaf is split.
_BIG = {"vocab_size": 56, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 48}
_SPLIT = {
    "gpt2": {"vocab_size": 56, "n_embd": 64, "n_head": 8, "n_inner": 48},
    "gpt_neox": {key: value for key, value in _BIG.items() if key != "num_key_value_heads"}
    | {"rope_parameters": {"rope_theta": 70.0, "partial_rotary_factor": 0.5}},
    "qwen3": _BIG,
    "gemma2": _BIG,
    "olmo2": _BIG,
    "phi3": _BIG | {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
}
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 53, (4, 24)))


@pytest.mark.parametrize("label", _SPLIT)
@pytest.mark.parametrize("data, model", [(1, 8), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_tensor_parallel_equals_one_device(tmp_path, label, data, model):
    config = families.CONFIGS[label] | _SPLIT[label]
    cfg, folder = from_hf(config), families.write(tmp_path / label, config)
    mesh = lm.make_mesh(data, model)
    found = weights.from_safetensors(cfg, folder, dtype=jnp.float32, mesh=mesh)
    for name, axis in (("qkv", 2), ("mlp_in", 3), ("down", 1), ("attn_out", 1)):
        leaf = found.blocks[name][...]
        assert leaf.sharding.spec[axis] == "model"
        assert leaf.addressable_shards[0].data.shape[axis] * model == leaf.shape[axis]
    single = weights.from_safetensors(cfg, folder, dtype=jnp.float32)
    run = jax.jit(lambda m, t: (m(t), lm.capture(m, t, ["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]))
    for a, b in zip(run(found, jax.device_put(TOKENS, NamedSharding(mesh, P("data")))), run(single, TOKENS), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    moved = lm.place(single, mesh)
    assert [x.sharding for x in jax.tree.leaves(moved)] == [x.sharding for x in jax.tree.leaves(found)]


def test_what_does_not_divide_is_not_split(tiny, tiny_folder, tokens_BT):
    """97 words over 2 devices."""
    found = weights.from_safetensors(tiny.cfg, tiny_folder, dtype=jnp.float32, mesh=lm.make_mesh(2, 2))
    assert found.whole["unembed"][...].sharding.is_fully_replicated
    assert not found.blocks["qkv"][...].sharding.is_fully_replicated
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(found, tokens_BT), tiny(tokens_BT), atol=1e-4)


def test_generation_on_a_mesh(tmp_path):
    config = families.CONFIGS["qwen3"] | _BIG
    cfg, folder = from_hf(config), families.write(tmp_path / "m", config)
    single, split = (
        weights.from_safetensors(cfg, folder, dtype=jnp.float32, mesh=mesh) for mesh in (None, lm.make_mesh(1, 8))
    )
    assert lm.generate(split, [[3, 4, 5], [6]], 8) == lm.generate(single, [[3, 4, 5], [6]], 8)


def test_mesh_sizes():
    assert dict(lm.make_mesh(rows=12).shape) == {"data": 6, "model": 1}
    assert dict(lm.make_mesh(model=4).shape) == {"data": 2, "model": 4}
    assert dict(lm.make_mesh(2, 2, rows=6).shape) == {"data": 2, "model": 2}
    for sizes, part in (
        (dict(data=3, model=4), "3 x 4 needs more than the 8 devices"),
        (dict(model=9), "use at most model=8"),
        (dict(data=0), "data x model = 0 x 1"),
        (dict(data=4, rows=6), "4 copies of the model does not divide the 6 contexts"),
    ):
        with pytest.raises(LMError, match=part):
            lm.make_mesh(**sizes)
