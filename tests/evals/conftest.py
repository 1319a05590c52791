"""A tiny random Llama with a character tokenizer and a text file: the whole evaluation runs on it in seconds."""

import importlib.util
import string
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.config import default_config, resolve

HOOKPOINT = "blocks.1.hook_resid_post"
D_IN = 48


def _tiny_llama():
    file = Path(__file__).parents[1] / "lm" / "tiny_llama.py"
    spec = importlib.util.spec_from_file_location("tiny_llama_for_evals", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tokenizer():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    from saejax.lm import Tokenizer
    letters = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " ", "."]
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer(backend, frozenset({1, 2}), 1, 2, None)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    from saejax.lm import LM, arch, weights
    tiny = _tiny_llama()
    folder = tiny.write(tmp_path_factory.mktemp("tiny_llama"))
    cfg = arch.from_hf(tiny.CONFIG)
    return LM(weights.from_safetensors(cfg, folder, dtype=jnp.float32), cfg, _tokenizer(), "tiny", "0" * 64)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """200 small text files: with holdout=0.3 some 60 are held out."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(200):
        words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 8))) for _ in range(20)]
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".")
    return folder


@pytest.fixture
def config(text_files, tmp_path):
    c = default_config("topk")
    c.run_dir, c.text.source, c.text.context, c.text.holdout = str(tmp_path / "run"), (str(text_files),), 32, 0.3
    c.harvest.hookpoints, c.sae.hookpoint, c.sae.d_sae, c.sae.k = (HOOKPOINT,), HOOKPOINT, 64, 8
    c.harvest.chunk_rows, c.log.progress = 32, False
    c.eval.contexts, c.eval.batch_contexts = 10, 4
    return resolve(c)
