"""What a config's activations are before any is harvested: widths of hookpoints, and what a token costs the language model."""

import json
from dataclasses import dataclass
from pathlib import Path

from saejax import lm
from saejax.base import assets
from saejax.base.errors import ConfigError, LMError
from saejax.base.logs import one_line_of_retries
from saejax.config import Config
from saejax.data.store import Store, is_complete
from saejax.lm.gguf_config import from_gguf
from saejax.lm.gguf_file import GGUFFile
from saejax.lm.hf_config import from_hf


@dataclass(frozen=True)
class Source:
    """widths: of the hookpoints that the SAE names. lm_flops, lm_params: per token, and of the matrices, up to the highest
    hookpoint that is harvested; None where the architecture is not known here.
    """

    widths: dict[str, int]
    lm_flops: float | None
    lm_params: int | None


def find(config: Config) -> Source:
    """Widths from `config.sae.d_in` (of a crosscoder an equal part each), the finished store or the language model's config.

    Nothing is downloaded but, for a hub id of which nothing else tells the width, its config.json. Raises `ConfigError` when none
    of them knows.
    """
    names = config.sae.hookpoints
    known = config.sae.d_in is not None or is_complete(config.harvest.store)
    cfg, reason = _architecture(config, offline=known)
    params = None if cfg is None else _params(cfg, config.harvest.hookpoints)
    flops = None if cfg is None else flops_per_token(cfg, config.harvest.hookpoints, config.text.context)
    if config.sae.d_in is not None:
        widths = dict.fromkeys(names, config.sae.d_in // len(config.sae.sources))
    elif is_complete(config.harvest.store):
        store = Store.open(config.harvest.store)
        widths = {name: store.width(name) for name in names}
    elif cfg is not None:
        widths = {name: lm.width_of(cfg, name) for name in names}
    else:
        raise ConfigError(f"config.sae.d_in: the width of {', '.join(names)} is not known here ({reason}); give it")
    return Source(widths, flops, params)


def _architecture(config: Config, offline: bool) -> tuple[lm.LMConfig | None, str]:
    """The language model's shape, or why it is not to be had; weights are not read."""
    name = config.lm.model
    path = Path(name).expanduser()
    try:
        if name in assets.MODELS:
            file = assets.cache_dir() / "models" / assets.MODELS[name].filename
            return (_of_gguf(file), "") if file.is_file() else (None, f"{name} is not in {assets.cache_dir()}")
        if path.suffix == ".gguf":
            return (_of_gguf(path), "") if path.is_file() else (None, f"{name}: there is no such file")
        file = path / "config.json" if path.is_dir() else _downloaded(name, config.lm.revision, offline)
        return from_hf(json.loads(file.read_text(encoding="utf-8"))), ""
    except (OSError, ValueError, LMError) as error:
        return None, " ".join(str(error).split())[:160]


def _of_gguf(path: Path) -> lm.LMConfig:
    file = GGUFFile(path)
    return from_gguf(file.fields(), file.shapes(), file.read)


def _downloaded(name: str, revision: str | None, offline: bool) -> Path:
    """config.json of a hub id; offline: only if it was downloaded before. Raises `OSError` or `ValueError`."""
    from huggingface_hub import hf_hub_download

    with one_line_of_retries(name):
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))


def flops_per_token(cfg: lm.LMConfig, hookpoints: tuple[str, ...], context: int) -> float:
    """Of a forward pass up to the highest hookpoint, the unembedding not among them."""
    return 2.0 * _params(cfg, hookpoints) + 4.0 * _layers(cfg, hookpoints) * context * cfg.d_model


def _layers(cfg: lm.LMConfig, hookpoints: tuple[str, ...]) -> int:
    """Layers that are computed for these hookpoints."""
    known = [lm.layer_of(name) for name in hookpoints]
    return max(0 if name == "hook_embed" else cfg.n_layers if layer is None else min(layer + 1, cfg.n_layers)
               for name, layer in zip(hookpoints, known, strict=True))


def _params(cfg: lm.LMConfig, hookpoints: tuple[str, ...]) -> int:
    """Weights of the matrices that a token is multiplied with, up to the highest hookpoint."""
    attention = cfg.d_model * cfg.head_dim * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
    mlp = cfg.d_model * cfg.d_mlp * (3 if cfg.gated else 2)
    return _layers(cfg, hookpoints) * (attention + mlp)
