import importlib
import re

import pytest

from saejax import lm
from saejax.base.errors import LMError
from saejax.lm.model_names import _TABLE, hub_id
from tests.lm import tiny_llama
from tests.lm.test_load import write_tokenizer

# `saejax.lm.load` is the function of that name.
load = importlib.import_module("saejax.lm.load")


@pytest.mark.parametrize(
    "name, repository",
    [
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2", "openai-community/gpt2"),
        ("distil-gpt2", "distilbert/distilgpt2"),
        ("stanford-gpt2-small-e", "stanford-crfm/expanse-gpt2-small-x777"),
        ("gpt2-stanford-medium-a", "stanford-crfm/arwen-gpt2-medium-x21"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("pythia-19m", "EleutherAI/pythia-70m"),
        ("pythia-13b-deduped-v0", "EleutherAI/pythia-12b-deduped-v0"),
        ("pythia-125m-seed2", "EleutherAI/pythia-160m-seed2"),
        ("neox", "EleutherAI/gpt-neox-20b"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("meta-llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("qwen3-0.6b-base", "Qwen/Qwen3-0.6B-Base"),
        ("olmo-2-1b", "allenai/OLMo-2-0425-1B"),
        ("phi-3", "microsoft/Phi-3-mini-4k-instruct"),
        ("SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M"),
    ],
)
def test_names_of_transformer_lens(name, repository):
    assert hub_id(name) == hub_id(name.upper()) == repository


@pytest.mark.parametrize(
    "name", ["", "gemma-2b-it", "mixtral", "gpt-j", "opt-125m", "phi-2", "gpt-oss-20b", "olmoe", "google/gemma-2-2b", "x/gpt2"]
)
def test_other_names_stay(name):
    assert hub_id(name) == name


def test_every_id_is_one_of_the_hub():
    assert all(re.fullmatch(r"[\w\-]+/[\w.\-]+", repository) for repository in _TABLE.values())
    assert all(name == name.lower() and "/" not in name for name in _TABLE)


def test_load_asks_the_hub_for_the_repository(tmp_path, monkeypatch):
    folder = tiny_llama.write(tmp_path / "0123abcd")
    write_tokenizer(folder, 97)
    asked = []
    monkeypatch.setattr(load, "_download", lambda model, revision: asked.append((model, revision)) or folder)
    monkeypatch.chdir(tmp_path)
    found = lm.load("Gemma-2-2B", revision="main")
    assert asked == [("google/gemma-2-2b", "main")]
    assert (found.name, found.revision) == ("google/gemma-2-2b", "0123abcd")


def test_a_directory_of_that_name_wins(tmp_path, monkeypatch):
    write_tokenizer(tiny_llama.write(tmp_path / "gpt2-small"), 97)
    monkeypatch.setattr(load, "_download", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    found = lm.load("gpt2-small")
    assert (found.name, found.revision, found.cfg.family) == ("gpt2-small", None, "llama")


def test_a_preset_of_that_name_wins(monkeypatch):
    assert hub_id("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M"
    monkeypatch.setattr(load, "_download", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.setattr(load.assets, "model_path", lambda name: name)
    monkeypatch.setattr(load, "_gguf", lambda path, name: name)
    assert lm.files("smollm2-135m") == "smollm2-135m"


def test_a_model_that_is_not_computed_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_download", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LMError, match="'mixtral' is not a preset .*a TransformerLens name"):
        lm.load("mixtral")
