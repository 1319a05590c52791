"""The release directory: `cfg.json` + `sae_weights.safetensors` with SAELens' names and layout, so that both libraries read it.

Tensors (float32): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]; gated has b_gate, r_mag and b_mag
[d_sae] instead of b_enc, jumprelu has threshold [d_sae]. Normalisation and, except for topk, decoder norms are folded, so raw
activations go in: pre = (x - b_dec if apply_b_dec_to_input) W_enc + b_enc.
"""

import hashlib
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

import saejax
from saejax import sharding
from saejax.errors import FormatError
from saejax.sae import SAEParams, param_shapes, param_shardings
from saejax.sae.inference import SAE, SAEConfig
from saejax.storage import file_sha256, is_writer, read_json, write_bytes, write_json

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
ARCHITECTURES = {"relu": "standard", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
COMMON = ("W_enc", "b_enc", "W_dec", "b_dec")
SAELENS_VERSION = "6.54.12"  # the reader that releases are checked against; readers treat < 6 as an older layout


def is_release(path: Path) -> bool:
    """True for a directory that holds both files of a release."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write(directory: Path, sae: SAE) -> None:
    """Writes `cfg.json` and the weights; the weights are whole on disk before `cfg.json` names them.

    Every process must call it; one writes. The arrays pass through host memory whole.
    """
    values = {name: getattr(sae.params, name) for name in COMMON} | sae.params.per_feature
    tensors = {_tensor(sae.cfg.kind, name): sharding.to_host(value) for name, value in values.items()}
    tensors["W_enc"] = np.ascontiguousarray(tensors["W_enc"].T)
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise FormatError(f"{directory}: not released, {', '.join(bad)} hold NaN or Inf")
    if is_writer():
        weights = save(tensors, metadata={"format": "pt"})
        write_bytes(directory / WEIGHTS, weights)
        write_json(directory / CONFIG, _to_cfg(sae.cfg, hashlib.sha256(weights).hexdigest()))


def _tensor(kind: str, name: str) -> str:
    """The tensor of a file that holds a parameter."""
    return "b_gate" if (kind, name) == ("gated", "b_enc") else name


def _to_cfg(cfg: SAEConfig, weights_sha256: str) -> dict:
    text = cfg.metadata.get("text", {})
    out = {
        "architecture": ARCHITECTURES[cfg.kind], "d_in": cfg.d_in, "d_sae": cfg.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": cfg.pre_bias, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "model_name": cfg.model, "hook_name": cfg.hookpoint,
                     "hook_head_index": None, "context_size": text.get("context"), "prepend_bos": text.get("bos") == "row",
                     "saejax": {**cfg.metadata, "schema_version": SCHEMA_VERSION, "saejax_version": saejax.__version__,
                                "weights_sha256": weights_sha256}},
    }
    if cfg.kind == "topk":
        out |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    return out


def read(directory: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of a release directory; with a mesh each device reads its own slice of the file.

    Raises `FormatError` naming file and tensor.
    """
    cfg = _from_cfg(directory / CONFIG, read_json(directory / CONFIG, FormatError))
    path = directory / WEIGHTS
    _check_digest(path, cfg.metadata.get("weights_sha256"))
    shapes = param_shapes(cfg.spec, folded=True)
    names = shapes.per_feature.keys()
    expected = {_tensor(cfg.kind, name): getattr(shapes, name) for name in COMMON} | shapes.per_feature
    expected["W_enc"] = (cfg.d_in, cfg.d_sae)
    try:
        with safe_open(path, framework="numpy") as f:
            _check_tensors(path, f, expected)
            if mesh is not None:
                sharding.check_features(cfg.d_sae, mesh)
            where = param_shardings(mesh, names) if mesh is not None else SAEParams(None, None, None, None, dict.fromkeys(names))
            common = {name: _load(f, _tensor(cfg.kind, name), getattr(where, name), transposed=name == "W_enc")
                      for name in COMMON}
            params = SAEParams(**common, per_feature={name: _load(f, name, where.per_feature[name]) for name in names})
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
    for name, value in ({name: getattr(params, name) for name in COMMON} | params.per_feature).items():
        if not np.isfinite(np.asarray(jax.device_get(abs(value).max()))):
            raise FormatError(f"{path}: tensor {_tensor(cfg.kind, name)} holds NaN or Inf")
    return SAE(params, cfg, mesh)


def _from_cfg(path: Path, values: dict) -> SAEConfig:
    kinds = {architecture: kind for kind, architecture in ARCHITECTURES.items()}
    try:
        own = values["metadata"].get("saejax", {})
        if own.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
            raise FormatError(f"{path}: release schema version {own['schema_version']}, this saejax reads {SCHEMA_VERSION}")
        if values["architecture"] not in kinds:
            raise FormatError(f"{path}: architecture {values['architecture']!r} is not one of {', '.join(kinds)}")
        rescaled = values.get("rescale_acts_by_decoder_norm")
        if values["normalize_activations"] != "none" or rescaled:
            raise FormatError(f"{path}: normalize_activations={values['normalize_activations']!r}, rescale_acts_by_decoder_norm="
                              f"{rescaled}: only folded SAEs can be read")
        return SAEConfig(
            kind=kinds[values["architecture"]], d_in=int(values["d_in"]), d_sae=int(values["d_sae"]), k=int(values.get("k", 0)),
            pre_bias=bool(values["apply_b_dec_to_input"]), hookpoint=str(values["metadata"].get("hook_name")),
            model=str(values["metadata"].get("model_name")), metadata=own)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: missing or malformed key ({type(error).__name__}: {error})") from error


def _check_digest(path: Path, expected: str | None) -> None:
    """Releases written by saejax name their weights; those of others have no digest to compare."""
    if expected is not None and file_sha256(path) != expected:
        raise FormatError(f"{path}: altered since cfg.json was written (sha256 differs); copy or release it again")


def _check_tensors(path: Path, f, expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: (tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype()) for name in f.keys()}
    wrong = [f"{name}: missing" for name in expected if name not in found]
    wrong += [f"{name}: unexpected" for name in found if name not in expected]
    wrong += [f"{name}: {found[name][1]} {found[name][0]}, expected F32 {shape}" for name, shape in expected.items()
              if name in found and found[name] != (shape, "F32")]
    if wrong:
        raise FormatError(f"{path}: {'; '.join(wrong)}")


def _load(f, name: str, where: NamedSharding | None, transposed: bool = False) -> jax.Array:
    view = f.get_slice(name)
    shape = tuple(view.get_shape())
    if where is None:
        value = f.get_tensor(name)
        return jax.numpy.asarray(value.T if transposed else value)
    if not transposed:
        return jax.make_array_from_callback(shape, where, lambda index: view[index])
    return jax.make_array_from_callback(shape[::-1], where, lambda index: view[index[1], index[0]].T)
