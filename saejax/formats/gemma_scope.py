"""Gemma Scope. 1: `params.npz`, no config. 2: `config.json` + `params.safetensors`, names in lower case.

Tensors: W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_enc, b_dec, threshold [d_sae]; 2 may have affine_skip_connection [d_in,
d_out]. acts = relu(pre) 1[pre > threshold], pre = x W_enc + b_enc: b_dec is not subtracted, no normalisation at run time (it is
folded). A transcoder of 1 has the same file as an SAE: its place in the repository says which (a folder or repository named
transcoder). Attention SAEs take the concatenated heads (z).
"""

import io
import math
import re
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.keys import Keys
from saejax.base.records import UNKNOWN
from saejax.base.storage import is_writer, write_bytes
from saejax.formats.archives import open_npz
from saejax.formats.arrays import ArrayFile
from saejax.formats.assembling import parts_of, read_params, under
from saejax.formats.keys import file_keys
from saejax.formats.safetensors_file import open_safetensors
from saejax.sae import SAEParams, tensors
from saejax.sae.folding import fold_input_scale, with_pre_bias
from saejax.sae.inference import SAE, SAEConfig

NPZ, CONFIG, WEIGHTS = "params.npz", "config.json", "params.safetensors"
NEEDS = f"{NPZ}, or {CONFIG} + {WEIGHTS}"
_LOWER = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
_KNOWN = ("architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out", "affine_connection", "width", "l0", "type")


def recognise(path: Path) -> bool:
    return _npz(path).is_file() or (path / WEIGHTS).is_file()


def read(path: Path, mesh: Mesh | None = None, origin: str = "") -> SAE:
    """The SAE or transcoder of a directory (or of the `.npz` itself). origin: where the files come from, as "repo:path/in/repo"
    (default: the path); model, hookpoint, and of 1 whether it is a transcoder, are read off it. Raises `FormatError`.
    """
    origin = origin or _place(path)
    return _read_first(_npz(path), mesh, origin) if _npz(path).is_file() else _read_second(path, mesh, origin)


def _place(path: Path) -> str:
    """The last four components: repository, layer, width, L0. Folders above them say nothing of the files."""
    return "/".join((path.parent if path.suffix == ".npz" else path).resolve().parts[-4:])


def _npz(path: Path) -> Path:
    return path if path.suffix == ".npz" else path / NPZ


def _read_first(path: Path, mesh: Mesh | None, origin: str) -> SAE:
    file = open_npz(path)
    upper = {name: "W_" + name[2:] if name.startswith("w_") else name for name in file.entries}
    file = ArrayFile(path, {upper[name]: entry for name, entry in file.entries.items()})
    cfg = _config(file, origin, "W_enc", "W_dec", transcoder="transcoder" in origin)
    params = read_params(file, cfg.spec, parts_of(cfg.spec, {}, ("W_enc",)), mesh)
    if "embedding" in origin and "layer_" not in origin:
        # Trained on the embeddings themselves; hook_embed is behind Gemma's factor of sqrt(d).
        params = under(mesh, _fold_embedding, params)
        cfg.metadata["folding"] = {"embedding": "W_enc / sqrt(d_in), W_dec x sqrt(d_in)"}
    return SAE(params, cfg, mesh)


def _fold_embedding(params: SAEParams) -> SAEParams:
    """W_enc / sqrt(d), W_dec * sqrt(d); b_dec stays, as SAELens leaves it."""
    return fold_input_scale(params, 1 / math.sqrt(params.W_enc.shape[1])).replace(b_dec=params.b_dec)


def _read_second(path: Path, mesh: Mesh | None, origin: str) -> SAE:
    file = open_safetensors(path / WEIGHTS)
    config = path / CONFIG
    keys = file_keys(config) if config.is_file() else Keys({"architecture": "jump_relu"}, config, FormatError)
    keys.one_of("architecture", ("jump_relu", "jumprelu"))
    skip = "affine_skip_connection" in file.entries
    affine = keys.get("affine_connection", bool, skip)
    if affine != skip:
        raise FormatError(f"{keys.source}: affine_connection={affine}, but {path / WEIGHTS} {'has' if skip else 'lacks'} "
                          "affine_skip_connection")
    kind = keys.get("type", str, "") + origin
    transcoder = skip or bool(re.search("transcoder|clt", kind))
    cfg = _config(file, origin, "w_enc", "w_dec", transcoder, skip, keys.get("model_name", str, None))
    cfg.metadata["gemma_scope"] = {name: value for name, value in keys.values.items() if isinstance(value, (str, int, float))}
    keys.ignore(*_KNOWN)
    keys.finish()
    return SAE(read_params(file, cfg.spec, parts_of(cfg.spec, _LOWER, ("W_enc",)), mesh), cfg, mesh)


def _config(file: ArrayFile, origin: str, w_enc: str, w_dec: str, transcoder: bool, skip: bool = False,
            model: str | None = None) -> SAEConfig:
    d_in, d_sae = file.shape(w_enc, 2)
    d_out = file.shape(w_dec, 2)[1]
    if d_out != d_in and not transcoder:
        raise FormatError(f"{file.path}: {w_dec} has {d_out} columns and {w_enc} {d_in} rows: a transcoder, but nothing in its "
                          f"place ({origin[-80:]}) says so")
    read, written = _hookpoints(origin, transcoder)
    metadata = {"source": {"format": "gemma_scope"}, "units": "as stored", "normalization": "none",
                "text": {"context": 1024, "bos": "row"}}
    return SAEConfig(kind="jumprelu", d_in=d_in, d_sae=d_sae, k=0, pre_bias=False, hookpoints=(read,), target=written,
                     d_out=d_out if transcoder else None, skip=skip, model=model or _model(origin), metadata=metadata)


def _model(origin: str) -> str:
    second = re.search(r"gemma-scope-2-(\w+)-(pt|it)", origin)
    first = re.search(r"gemma-scope-(\w+)-(pt|it)", origin)
    if second:
        return f"google/gemma-3-{second[1]}-{second[2]}"
    return f"google/gemma-2-{first[1]}{'-it' if first[2] == 'it' else ''}" if first else UNKNOWN


def _hookpoints(origin: str, transcoder: bool) -> tuple[str, str]:
    """(read, predicted) in TransformerLens names, from the layer and the site that the place of the files names."""
    layer = re.search(r"layer_(\d+)", origin)
    if layer is None:
        return ("hook_embed" if "embedding" in origin else UNKNOWN), UNKNOWN if transcoder else ""
    block = f"blocks.{layer[1]}."
    if transcoder:
        second = "gemma-scope-2" in origin
        return block + ("hook_mlp_in" if second else "ln2.hook_normalized"), block + "hook_mlp_out"
    sites = {"resid_post": "hook_resid_post", "-res": "hook_resid_post", "attn_out": "attn.hook_z", "-att": "attn.hook_z",
             "mlp_out": "hook_mlp_out", "-mlp": "hook_mlp_out"}
    return next((block + name for site, name in sites.items() if site in origin), UNKNOWN), ""


def write(directory: Path, sae: SAE) -> None:
    """Writes `params.npz` of Gemma Scope 1. Kinds relu and jumprelu only; raises `FormatError` with the reason for others."""
    c = sae.cfg
    if c.kind not in ("relu", "jumprelu"):
        raise FormatError(f"a {c.kind} SAE cannot be written for Gemma Scope, which has one threshold per feature"
                          + ("; a topk SAE can be written with one threshold (approximate)" if c.kind == "topk" else ""))
    if c.input_norm != "none" or c.skip or c.layers:
        raise FormatError(f"a {c.spec.shape} with input_norm={c.input_norm!r} cannot be written for Gemma Scope 1, which has "
                          "neither row normalisation nor skip connections nor crosscoders")
    if c.d_out is not None and "transcoder" not in _place(directory):
        raise FormatError(f"{directory}: a transcoder is told from an SAE only by its place in Gemma Scope 1; write it to a "
                          "directory with "
                          "'transcoder' in its name")
    params = with_pre_bias(sae.params, c.pre_bias, False)
    arrays = {name: sharding.to_host(value) for name, value in tensors(params).items()}
    arrays["W_enc"] = np.ascontiguousarray(arrays["W_enc"].T)
    arrays.setdefault("threshold", np.zeros(c.d_sae, np.float32))  # relu(pre) = relu(pre) 1[pre > 0]
    if is_writer():
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_bytes(directory / NPZ, buffer.getvalue())
