"""`load`: a language model by preset name, GGUF file, Hugging Face directory, hub id or TransformerLens name."""

import contextlib
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial

from saejax.base import assets
from saejax.base.errors import HookpointError, LMError
from saejax.base.known_files import sha256_of
from saejax.base.logs import one_line_of_retries
from saejax.lm import prompts, tokenizer, weights
from saejax.lm.arch import LMConfig
from saejax.lm.gguf_config import from_gguf
from saejax.lm.gguf_file import GGUFFile
from saejax.lm.hf_config import from_hf
from saejax.lm.hookpoints import check_hookpoint, hookpoint_of
from saejax.lm.model import DTYPES, Decoder
from saejax.lm.model_names import hub_id
from saejax.lm.tokenizer import Tokenizer

_HUB_FILES = [
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
]
# Many repositories hold the weights once more: in Meta's format, or for other runtimes in subfolders ("*" matches "/").
_NOT_HUB_FILES = ["consolidated*", "*/*"]


_TAPS: ContextVar[Partial | None] = ContextVar("taps", default=None)  # of `LM.__call__`


@dataclass(frozen=True)
class LM:
    """A loaded language model.

    `digest` is sha256 over the weight files' bytes and the config, the same on every machine; `revision` is the hub
    commit, None for local files and presets.
    """

    model: Decoder = field(repr=False)
    cfg: LMConfig = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    name: str
    digest: str
    revision: str | None = None
    card: Callable[["LM"], str] | None = field(default=None, repr=False, compare=False)  # HTML for notebooks, where one draws it

    @functools.cached_property
    def known_V(self) -> np.ndarray:
        """bool [V]: which rows of the embedding belong to a token: models have rows beyond their tokenizer."""
        return np.array(self.tokenizer.known(self.cfg.vocab_size))

    def tokens(self, text: prompts.Text) -> np.ndarray:
        """Token ids int32 [T] of a text, or these ids, with BOS before them, once, where the model has one.

        Raises `PromptError`: empty, longer than the context, ids that the model does not have.
        """
        tokens_T = prompts.tokens_of(self.cfg, self.tokenizer, text)
        prompts.check_ids(self.cfg, tokens_T)
        return tokens_T

    def capture(self, text, hookpoints: str | Sequence[str]):
        """Values float32 [T, D] at a hookpoint of a text (or token ids), BOS included; compiled once for each shape.

        Several hookpoints: a dictionary of them. A list of texts: a list of results. Nothing above the highest hookpoint is
        computed. Raises `HookpointError` and `PromptError`.
        """
        if not isinstance(hookpoints, str | Sequence):
            raise HookpointError(f"hookpoint {hookpoints!r}: expected a name, or a list of names")
        names = [hookpoint_of(name, self.cfg) for name in ([hookpoints] if isinstance(hookpoints, str) else hookpoints)]
        for name in names:
            check_hookpoint(self.cfg, name)
        rows, several = self._rows(text)
        found = prompts.values(self.model, prompts.padded(self.cfg, rows), tuple(names))
        each = [{name: found[name][b, :len(row)] for name in names} for b, row in enumerate(rows)]
        out = [one[names[0]] for one in each] if isinstance(hookpoints, str) else each
        return out if several else out[0]

    def __call__(self, text):
        """Logits float32 [T, V] of the next token at every position of a text (or token ids); a list of texts gives a list.

        Inside `spliced` the model goes on with what that puts into it. Raises `PromptError`.
        """
        rows, several = self._rows(text)
        logits_BTV = prompts.logits(self.model, prompts.padded(self.cfg, rows), _TAPS.get())
        out = [logits_BTV[b, :len(row)] for b, row in enumerate(rows)]
        return out if several else out[0]

    def _rows(self, text) -> tuple[list[np.ndarray], bool]:
        several = isinstance(text, list | tuple) and len(text) > 0 and not isinstance(text[0], int | np.integer)
        return [self.tokens(one) for one in (text if several else [text])], several

    def __repr__(self) -> str:
        cfg = self.cfg
        name = self.name if len(self.name) <= 80 else f"...{self.name[-77:]}"
        return f"LM({name!r}, {cfg.n_layers} layers, d_model={cfg.d_model}, vocab={cfg.vocab_size})"

    def _repr_html_(self) -> str | None:
        return None if self.card is None else self.card(self)


@contextlib.contextmanager
def tapped(taps: Partial):
    """Within it, calls of language models have these taps: a `Partial` that makes the mapping `Decoder` takes."""
    token = _TAPS.set(taps)
    try:
        yield
    finally:
        _TAPS.reset(token)


@dataclass(frozen=True)
class Files:
    """The files of a language model, found and described, its weights not loaded. `digest`, `revision`: as of `LM`."""

    name: str
    cfg: LMConfig
    tokenizer: Tokenizer
    weights: tuple[Path, ...]
    read: Callable[..., Decoder] = field(repr=False)  # (dtype=, mesh=)
    revision: str | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Of weights and config; reads the weight files once."""
        return _digest(self.cfg, self.weights)


def load(model: str, *, revision: str | None = None, dtype: str = "float32", mesh: Mesh | None = None) -> LM:
    """Loads `model`: a preset of `saejax.base.assets`, a `.gguf` file, a Hugging Face directory, a hub id `owner/name`, or a
    name that TransformerLens has for a hub id (`gpt2-small`), in this order.

    `dtype` is "float32" or "bfloat16". With a `mesh`, weights are replicated over it, or split over its "model" axis
    if it has one. Raises LMError (unknown model, config not computed), WeightsError (all tensor problems at once),
    TokenizerError, AssetError.
    """
    if dtype not in DTYPES:
        raise LMError(f"lm.dtype={dtype!r} is not supported: use one of {', '.join(DTYPES)}")
    found = files(model, revision)
    return LM(found.read(dtype=DTYPES[dtype], mesh=mesh), found.cfg, found.tokenizer, found.name, found.digest, found.revision)


def files(model: str, revision: str | None = None) -> Files:
    """What `load` would load. Raises LMError, TokenizerError, AssetError."""
    if model in assets.MODELS:
        return _gguf(assets.model_path(model), model)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise LMError(f"config.lm.model={model!r}: there is no such GGUF file")
        return _gguf(path, path.stem)
    if model and path.is_dir():
        return _folder(path, path.resolve().name, None)
    repository = hub_id(model)
    if re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository):
        folder = _download(repository, revision)
        return _folder(folder, repository, folder.name)
    presets = ", ".join(assets.MODELS)
    raise LMError(
        f"config.lm.model={model!r} is not a preset ({presets}), a .gguf file, a directory, a hub id owner/name or a "
        "TransformerLens name of a model that is computed here"
    )


def _gguf(path: Path, name: str) -> Files:
    file = GGUFFile(path)
    cfg = from_gguf(file.fields(), file.shapes(), file.read)
    tok = replace(tokenizer.from_gguf(file), rows=cfg.vocab_size)
    return Files(name, cfg, tok, (path,), functools.partial(weights.from_gguf_file, cfg, file))


def _folder(folder: Path, name: str, revision: str | None) -> Files:
    config = folder / "config.json"
    try:
        raw = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LMError(f"{config}: no readable model config ({error})") from None
    if not isinstance(raw, dict):
        raise LMError(f"{config}: a model config is a JSON object, this is {type(raw).__name__}")
    cfg = from_hf(raw)
    tok = replace(tokenizer.from_pretrained(folder), rows=cfg.vocab_size)
    read = functools.partial(weights.from_safetensors, cfg, folder)
    return Files(name, cfg, tok, tuple(weights.weight_files(folder)), read, revision)


def _download(model: str, revision: str | None) -> Path:
    above = Path(model).expanduser().parent
    if above.is_dir():  # a misspelt path, which the hub need not be asked about
        near = difflib.get_close_matches(Path(model).name, [p.name for p in above.iterdir()], n=1)
        hint = f"; did you mean {above / near[0]}?" if near else ""
        raise LMError(f"config.lm.model={model!r}: there is no such file or directory in {above}{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with one_line_of_retries(model):
            return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LMError(
            f"config.lm.model={model!r}, revision={revision!r}: no download ({reason}); use a local directory"
        ) from None


def _digest(cfg: LMConfig, files: Iterable[Path]) -> str:
    """Only what differs from the defaults counts, so that a new kind of field leaves old digests as they are."""
    total = hashlib.sha256(json.dumps(_non_default(cfg), sort_keys=True).encode())
    for path in files:
        total.update(bytes.fromhex(sha256_of(path)))
    return total.hexdigest()


def _non_default(value: object) -> object:
    if isinstance(value, tuple):
        return [_non_default(item) for item in value]
    if not is_dataclass(value):
        return value
    return {
        item.name: _non_default(getattr(value, item.name))
        for item in fields(value)
        if getattr(value, item.name) != item.default
    }
