"""One small index that most tests read: a store of the tiny model, an SAE of 40 features, two of them dead."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.data.harvest import harvest
from saejax.features.index import corpus
from saejax.features.index.build import BuildOptions, build
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig
from tests import tiny_experiment as tiny

FEATURES, DEAD = 40, (7, 39)


def make_sae(mesh=None, seed: int = 0, kind: str = "topk") -> SAE:
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((FEATURES, tiny.D_IN)).astype(np.float32) / tiny.D_IN**0.5
    b_enc = np.where(np.isin(np.arange(FEATURES), DEAD), -1e6, 0 if kind == "topk" else -1).astype(np.float32)
    params = SAEParams(W_enc=jnp.asarray(W), b_enc=jnp.asarray(b_enc), W_dec=jnp.asarray(W), b_dec=jnp.zeros(tiny.D_IN))
    return SAE(params, SAEConfig(kind, tiny.D_IN, FEATURES, 8 if kind == "topk" else 0, False, (tiny.HOOKPOINT,), "tiny"), mesh)


@pytest.fixture(scope="session")
def lm_(model_and_text):
    from saejax.lm import load
    return load(str(model_and_text[0]))


@pytest.fixture(scope="session")
def config(model_and_text, tmp_path_factory):
    return tiny.make_config(*model_and_text, tmp_path_factory.mktemp("features") / "run")


@pytest.fixture(scope="session")
def store(config, lm_):
    return harvest(config, lm_)


@pytest.fixture(scope="session")
def words(store):
    return corpus.from_store(store, (tiny.HOOKPOINT,))


@pytest.fixture(scope="session")
def sae():
    return make_sae(sharding.single_device_mesh())


@pytest.fixture(scope="session")
def index(sae, words, lm_, tmp_path_factory):
    return build(tmp_path_factory.mktemp("index") / "features", sae, words, lm_, BuildOptions(rows=512, progress=False))


def other_lm(lm_):
    return dataclasses.replace(lm_, digest="0" * 64)
