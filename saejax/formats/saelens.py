"""The release directory: `cfg.json` + `sae_weights.safetensors` with SAELens' names and layout, so that both libraries read it.

Tensors (float32): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; gated has b_gate, r_mag and b_mag
[d_sae] instead of b_enc, jumprelu has threshold [d_sae], a skip transcoder W_skip [d_out, d_in]. SAELens knows plain SAEs of
every kind, and transcoders of kind relu and jumprelu; the other shapes follow the same pattern under names that it refuses.
Normalisation and, except for topk, decoder norms are folded, so raw activations go in: pre = (x - b_dec if apply_b_dec_to_input)
W_enc + b_enc. `model_name` is what other libraries load: of a preset the published model; `metadata.saejax.lm` says what it is.
"""

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from saejax.base import sharding
from saejax.base.assets import MODELS, provenance, published
from saejax.base.errors import FormatError
from saejax.base.storage import is_writer, write_bytes, write_json
from saejax.base.version import __version__
from saejax.sae import tensors
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.row_norm import CENTER, NONE

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_PLAIN = {"relu": "standard", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
_SHAPES = {"transcoder": "transcoder", "skip transcoder": "skip_transcoder", "crosscoder": "crosscoder"}
ARCHITECTURES = {(kind, "sae"): name for kind, name in _PLAIN.items()} | {
    (kind, shape): ("" if kind == "relu" else f"{kind}_") + name for kind in _PLAIN for shape, name in _SHAPES.items()}
KNOWN_TO_SAELENS = (*_PLAIN.values(), "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TRANSPOSED = ("W_enc", "W_skip")  # stored here the other way round
SAELENS_VERSION = "6.54.12"  # the reader that releases are checked against; readers treat < 6 as an older layout


def _begins_rows(bos: str | None) -> bool:
    """Of `config.text.bos`."""
    return bos is not None and bos.partition(":")[0] not in ("none", "doc")


def _centred(cfg: SAEConfig, theirs: dict) -> dict:
    """How a reader is told that rows are centred."""
    if cfg.input_norm != CENTER:
        return {}
    return {"model_from_pretrained_kwargs": (theirs.get("model_from_pretrained_kwargs") or {}) | {"center_writing_weights": True}}


def is_release(path: Path) -> bool:
    """True for a directory that holds both files of a release."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write(directory: Path, sae: SAE) -> None:
    """Writes `cfg.json` and the weights; the weights are whole on disk before `cfg.json` names them.

    Every process must call it; one writes. The arrays pass through host memory whole.
    """
    arrays = {name: sharding.to_host(value) for name, value in tensors(sae.params).items()}
    arrays = {_tensor(sae.cfg.kind, name): np.ascontiguousarray(value.T) if name in TRANSPOSED else value
              for name, value in arrays.items()}
    bad = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if bad:
        raise FormatError(f"{directory}: not released, {', '.join(bad)} hold NaN or Inf")
    if is_writer():
        weights = save(arrays, metadata={"format": "pt"})
        write_bytes(directory / WEIGHTS, weights)
        write_json(directory / CONFIG, _to_cfg(sae.cfg, hashlib.sha256(weights).hexdigest()))


def architecture(cfg: SAEConfig) -> str:
    """What `cfg.json` calls an SAE of this kind and shape. Raises `FormatError` for a kind that the layout cannot express."""
    if (cfg.kind, cfg.spec.shape) not in ARCHITECTURES:
        raise FormatError(f"a {cfg.kind} {cfg.spec.shape} cannot be written in SAELens' layout: it has no architecture that "
                          "computes it")
    return ARCHITECTURES[cfg.kind, cfg.spec.shape]


def _tensor(kind: str, name: str) -> str:
    """The tensor of a file that holds a parameter."""
    return "b_gate" if (kind, name) == ("gated", "b_enc") else name


def _to_cfg(cfg: SAEConfig, weights_sha256: str) -> dict:
    text = cfg.metadata.get("text", {})
    theirs = cfg.metadata.get("saelens", {})  # of a file of SAELens that was read
    own = {name: value for name, value in cfg.metadata.items() if name != "saelens"}
    if cfg.model in MODELS:
        own |= {"lm": own.get("lm", {}) | provenance(cfg.model)}
    out = {
        "architecture": architecture(cfg), "d_in": cfg.d_in, "d_sae": cfg.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": cfg.pre_bias, "normalize_activations": NONE if cfg.input_norm == CENTER else cfg.input_norm,
        "reshape_activations": cfg.metadata.get("reshape", "none"),
        "metadata": {**theirs, "sae_lens_version": SAELENS_VERSION, "model_name": published(cfg.model),
                     "hook_name": cfg.hookpoint,
                     "hook_head_index": None, "context_size": text.get("context"),
                     "prepend_bos": _begins_rows(text.get("bos")), **_centred(cfg, theirs),
                     "saejax": {**own, "schema_version": SCHEMA_VERSION, "saejax_version": __version__,
                                "weights_sha256": weights_sha256}},
    }
    if cfg.kind == "topk":
        out |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if cfg.d_out is not None:
        out |= {"d_out": cfg.d_out}
        out["metadata"]["hook_name_out"] = cfg.target
    if cfg.layers:
        out |= {"layers": list(cfg.layers)}
        out["metadata"]["hook_names"] = list(cfg.hookpoints)
    return out
