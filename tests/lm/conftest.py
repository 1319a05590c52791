import functools

import jax.numpy as jnp
import pytest

from saejax import lm
from saejax.base.errors import AssetError
from saejax.lm import hf_config, weights
from tests.lm import families, tiny_llama


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M, float32."""
    try:
        return lm.load("smollm2-135m")
    except AssetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Directory of the tiny Llama: config.json and model.safetensors, no tokenizer."""
    return tiny_llama.write(tmp_path_factory.mktemp("lm") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """Decoder of the tiny Llama, float32."""
    return weights.from_safetensors(hf_config.from_hf(tiny_llama.CONFIG), tiny_folder, dtype=jnp.float32)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory):
    """label -> directory of the tiny random model of that family, written at the first call."""
    root = tmp_path_factory.mktemp("families")
    return functools.cache(lambda label: families.write(root / label, families.CONFIGS[label]))


@pytest.fixture(scope="session")
def family_model(family_folder):
    """label -> decoder of the tiny random model of that family, float32, loaded at the first call."""

    @functools.cache
    def load(label):
        cfg = hf_config.from_hf(families.CONFIGS[label])
        return weights.from_safetensors(cfg, family_folder(label), dtype=jnp.float32)

    return load


@pytest.fixture(scope="session")
def tokens_BT():
    return jnp.asarray(tiny_llama.tokens())
