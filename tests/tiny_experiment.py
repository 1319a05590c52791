"""A whole experiment in seconds: a random Llama with a character tokenizer, a folder of text files, a small config."""

import string
from pathlib import Path

import numpy as np

from saejax.config import Config, default_config, resolve
from tests.lm import tiny_llama

HOOKPOINT, D_IN, D_SAE = "blocks.1.hook_resid_post", 48, 64

SETTINGS = {
    "name": "tiny", "text.context": 32, "text.holdout": 0.3, "harvest.hookpoints": (HOOKPOINT,), "sae.hookpoint": HOOKPOINT,
    "sae.d_sae": D_SAE, "sae.k": 8, "sae.aux_k": 16, "sae.dead_tokens": 512,
    "harvest.tokens": 4096, "harvest.shard_bytes": 32 * 32 * 2 * D_IN, "stream.window_rows": 1024,
    "train.batch": 64, "train.tokens": 2048, "train.lr": 1e-3, "checkpoint.every_tokens": 1024,
    "eval.contexts": 8, "lm.batch_contexts": 4, "log.every_steps": 4, "log.progress": False,
}


def tokenizer_backend():
    """Characters a-z, blank and full stop; ids 1 and 2 are BOS and EOS."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    letters = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " ", "."]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def write_model(folder: Path, config: dict = tiny_llama.CONFIG) -> Path:
    """A Hugging Face directory: config, safetensors, tokenizer."""
    tiny_llama.write(folder, config)
    tokenizer_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return folder


def write_text(folder: Path) -> Path:
    """200 files of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(200):
        words = ["".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 8))) for _ in range(20)]
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".")
    return folder


def _values(model: Path, text: Path, run_dir: Path) -> dict:
    return SETTINGS | {"lm.model": str(model), "text.source": (str(text),), "run_dir": str(run_dir)}


def make_config(model: Path, text: Path, run_dir: Path, **overrides) -> Config:
    """The resolved config; overrides are {"section.key": value}."""
    c = default_config("topk")
    c.update_from_flattened_dict(_values(model, text, run_dir) | overrides)
    return resolve(c)


def write_config(file: Path, model: Path, text: Path, run_dir: Path, extra: str = "") -> Path:
    """A config file for `--config=`; `extra` are lines that change `c`."""
    lines = [f"c.{key} = {value!r}" for key, value in _values(model, text, run_dir).items()] + extra.splitlines()
    body = "\n".join(f"    {line}" for line in lines)
    file.write_text("from saejax.config import default_config\n\n\ndef get_config():\n    c = default_config('topk')\n"
                    f"{body}\n    return c\n")
    return file
