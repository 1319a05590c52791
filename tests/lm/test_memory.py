"""Weights reach a mesh shard by shard: the host never holds the model, not even one whole stacked parameter."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np

from saejax import lm
from saejax.lm import weights
from saejax.lm.hf_config import from_hf
from tests.lm import tiny_llama


def test_the_host_holds_one_shard_and_one_tensor_at_a_time(tmp_path):
    config = tiny_llama.CONFIG | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 512,
                                  "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    folder = tiny_llama.write(tmp_path / "model", config)
    total = sum(4 * int(np.prod(shape)) for shape in tiny_llama.shapes(config).values())
    tensor = 4 * 256 * 1024
    shard = 12 * 2 * tensor // 8                              # gate and up of all layers, split over eight devices
    mesh = lm.make_mesh(1, 8)
    cfg = from_hf(config)
    weights.from_safetensors(cfg, folder, dtype=jnp.float32, mesh=mesh)   # imports and caches
    tracemalloc.start()
    try:
        decoder = weights.from_safetensors(cfg, folder, dtype=jnp.float32, mesh=mesh)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(decoder) for s in leaf.addressable_shards)
    assert held < 1.1 * total, "weights are split over the devices, not copied to each"
    # On CPU a device array may use the host array's memory: what is kept at the end is the model itself, not a copy.
    extra = peak - kept
    assert extra < 2 * (shard + 3 * tensor) < total / 2, f"host peak {extra / 1e6:.1f} MB of a model of {total / 1e6:.1f} MB"
