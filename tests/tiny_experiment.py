"""A whole experiment in seconds: a random Llama with a character tokenizer, a folder of text files, a small config."""

import string
from pathlib import Path

import numpy as np

from tests.lm import tiny_llama

HOOKPOINT, D_IN, D_SAE = "blocks.1.hook_resid_post", 48, 64


def tokenizer_backend():
    """Characters a-z, blank and full stop; ids 1 and 2 are BOS and EOS."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    letters = ["<unk>", "<s>", "</s>", *string.ascii_lowercase, " ", "."]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def write_model(folder: Path) -> Path:
    """A Hugging Face directory: config, safetensors, tokenizer."""
    tiny_llama.write(folder)
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


def write_config(file: Path, model: Path, text: Path, run_dir: Path, extra: str = "") -> Path:
    """A config file for `--config=`; `extra` are lines that change `c`."""
    lines = [f"c.name, c.run_dir = 'tiny', {str(run_dir)!r}", f"c.lm.model = {str(model)!r}",
             f"c.text.source = ({str(text)!r},)",
             "c.text.context, c.text.holdout = 32, 0.3", f"c.harvest.hookpoints = ({HOOKPOINT!r},)",
             f"c.sae.hookpoint = {HOOKPOINT!r}", f"c.sae.d_sae, c.sae.k, c.sae.aux_k = {D_SAE}, 8, 16",
             "c.harvest.tokens, c.harvest.shard_contexts, c.harvest.chunk_rows = 4096, 32, 32",
             "c.stream.window_rows, c.train.init_rows = 1024, 512",
             "c.train.batch, c.train.tokens, c.train.lr = 64, 2048, 1e-3",
             "c.sae.dead_tokens, c.checkpoint.every_tokens, c.log.every_steps = 512, 1024, 4",
             "c.eval.contexts, c.eval.batch_contexts, c.log.progress = 8, 4, False", *extra.splitlines()]
    body = "\n".join(f"    {line}" for line in lines)
    file.write_text("from saejax.config import default_config\n\n\ndef get_config():\n    c = default_config('topk')\n"
                    f"{body}\n    return c\n")
    return file
