"""The release directory: `cfg.json` + `sae_weights.safetensors` with SAELens' names and layout, so that both libraries read it.

Tensors (float32): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; gated has b_gate, r_mag and b_mag
[d_sae] instead of b_enc, jumprelu has threshold [d_sae], a skip transcoder W_skip [d_out, d_in]. SAELens knows plain SAEs of
every kind, and transcoders of kind relu and jumprelu; the other shapes follow the same pattern under names that it refuses.
Normalisation and, except for topk, decoder norms are folded, so raw activations go in: pre = (x - b_dec if apply_b_dec_to_input)
W_enc + b_enc.
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
from saejax.sae import from_tensors, param_shapes, param_shardings, tensors
from saejax.sae.inference import SAE, SAEConfig
from saejax.storage import file_sha256, is_writer, read_json, write_bytes, write_json

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_PLAIN = {"relu": "standard", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
_SHAPES = {"transcoder": "transcoder", "skip transcoder": "skip_transcoder", "crosscoder": "crosscoder"}
ARCHITECTURES = {(kind, "sae"): name for kind, name in _PLAIN.items()} | {
    (kind, shape): ("" if kind == "relu" else f"{kind}_") + name for kind in _PLAIN for shape, name in _SHAPES.items()}
KNOWN_TO_SAELENS = (*_PLAIN.values(), "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRANSPOSED = ("W_enc", "W_skip")  # stored here the other way round
SAELENS_VERSION = "6.54.12"  # the reader that releases are checked against; readers treat < 6 as an older layout


def is_release(path: Path) -> bool:
    """True for a directory that holds both files of a release."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def write(directory: Path, sae: SAE) -> None:
    """Writes `cfg.json` and the weights; the weights are whole on disk before `cfg.json` names them.

    Every process must call it; one writes. The arrays pass through host memory whole.
    """
    arrays = {name: sharding.to_host(value) for name, value in tensors(sae.params).items()}
    arrays = {_tensor(sae.cfg.kind, name): np.ascontiguousarray(value.T) if name in _TRANSPOSED else value
              for name, value in arrays.items()}
    bad = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if bad:
        raise FormatError(f"{directory}: not released, {', '.join(bad)} hold NaN or Inf")
    if is_writer():
        weights = save(arrays, metadata={"format": "pt"})
        write_bytes(directory / WEIGHTS, weights)
        write_json(directory / CONFIG, _to_cfg(sae.cfg, hashlib.sha256(weights).hexdigest()))


def architecture(cfg: SAEConfig) -> str:
    """What `cfg.json` calls an SAE of this kind and shape."""
    return ARCHITECTURES[cfg.kind, cfg.spec.shape]


def _tensor(kind: str, name: str) -> str:
    """The tensor of a file that holds a parameter."""
    return "b_gate" if (kind, name) == ("gated", "b_enc") else name


def _to_cfg(cfg: SAEConfig, weights_sha256: str) -> dict:
    text = cfg.metadata.get("text", {})
    out = {
        "architecture": architecture(cfg), "d_in": cfg.d_in, "d_sae": cfg.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": cfg.pre_bias, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "model_name": cfg.model, "hook_name": cfg.hookpoint,
                     "hook_head_index": None, "context_size": text.get("context"), "prepend_bos": text.get("bos") == "row",
                     "saejax": {**cfg.metadata, "schema_version": SCHEMA_VERSION, "saejax_version": saejax.__version__,
                                "weights_sha256": weights_sha256}},
    }
    if cfg.kind == "topk":
        out |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if cfg.target:
        out |= {"d_out": cfg.d_out}
        out["metadata"]["hook_name_out"] = cfg.target
    if cfg.layers:
        out |= {"layers": list(cfg.layers)}
        out["metadata"]["hook_names"] = list(cfg.hookpoints)
    return out


def read(directory: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of a release directory; with a mesh each device reads its own slice of the file.

    Raises `FormatError` naming file and tensor.
    """
    cfg = _from_cfg(directory / CONFIG, read_json(directory / CONFIG, FormatError))
    path = directory / WEIGHTS
    _check_digest(path, cfg.metadata.get("weights_sha256"))
    shapes = tensors(param_shapes(cfg.spec, folded=True))
    expected = {_tensor(cfg.kind, name): shape[::-1] if name in _TRANSPOSED else shape for name, shape in shapes.items()}
    try:
        with safe_open(path, framework="numpy") as f:
            _check_tensors(path, f, expected)
            if mesh is not None:
                sharding.check_features(cfg.d_sae, mesh)
            where = tensors(param_shardings(mesh, shapes)) if mesh is not None else dict.fromkeys(shapes)
            values = {name: _load(f, _tensor(cfg.kind, name), where[name], transposed=name in _TRANSPOSED) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: not a readable safetensors file ({error})") from error
    for name, value in values.items():
        if not np.isfinite(np.asarray(jax.device_get(abs(value).max()))):
            raise FormatError(f"{path}: tensor {_tensor(cfg.kind, name)} holds NaN or Inf")
    return SAE(from_tensors(values), cfg, mesh)


def _from_cfg(path: Path, values: dict) -> SAEConfig:
    kinds = {name: kind_and_shape for kind_and_shape, name in ARCHITECTURES.items()}
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
        kind, shape = kinds[values["architecture"]]
        written = values["metadata"]
        transcoder = shape.endswith("transcoder")
        return SAEConfig(
            kind=kind, d_in=int(values["d_in"]), d_sae=int(values["d_sae"]), k=int(values["k"]) if kind == "topk" else 0,
            pre_bias=bool(values["apply_b_dec_to_input"]), model=str(written.get("model_name")),
            hookpoints=tuple(map(str, written["hook_names"] if shape == "crosscoder" else [written.get("hook_name")])),
            target=str(written.get("hook_name_out")) if transcoder else "", d_out=int(values["d_out"]) if transcoder else None,
            skip=shape == "skip transcoder", layers=tuple(map(int, values["layers"])) if shape == "crosscoder" else (),
            metadata=own)
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
