"""EleutherAI sparsify: `<hookpoint>/cfg.json` + `sae.safetensors`; the run's `config.json` is one level up.

Tensors: encoder.weight [d_sae, d_in], encoder.bias [d_sae], W_dec [d_sae, d_out], b_dec [d_out], W_skip [d_out, d_in] with a
skip connection. pre = relu((x - b_dec) W^T + b); a transcoder (`transcode`) reads x as it is. activation: "topk" keeps the k
largest, "groupmax" the largest of each of k groups. multi_topk is a training loss: encode keeps k, as everywhere else here,
while the peer's `forward` returns the reconstruction from 4k.
"""

from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.records import UNKNOWN
from saejax.base.storage import is_writer, write_bytes, write_json
from saejax.formats.assembling import parts_of, read_params
from saejax.formats.keys import file_keys, json_object
from saejax.formats.safetensors_file import open_safetensors
from saejax.sae import tensors
from saejax.sae.folding import with_pre_bias
from saejax.sae.inference import SAE, SAEConfig

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NEEDS = f"{CONFIG} + {WEIGHTS}"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
_KINDS = ("topk", "groupmax")


def recognise(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, mesh: Mesh | None = None) -> SAE:
    """The sparse coder of one hookpoint's directory. Raises `FormatError` naming file and key or tensor."""
    keys = file_keys(path / CONFIG)
    file = open_safetensors(path / WEIGHTS)
    d_in = keys.size("d_in")
    d_sae = keys.get("num_latents", int, 0) or d_in * keys.size("expansion_factor")
    kind, k = keys.one_of("activation", _KINDS, "topk"), keys.size("k")
    transcode, skip = keys.get("transcode", bool, False), keys.get("skip_connection", bool, False)
    if keys.get("signed", bool, False):
        raise FormatError(f"{keys.source}: signed=True: negative activations are not computed here")
    if k > d_sae or kind == "groupmax" and d_sae % k:
        raise FormatError(f"{keys.source}: k={k} does not fit {d_sae} latents with activation {kind!r}")
    kept = {name: keys.values[name] for name in ("expansion_factor", "normalize_decoder", "multi_topk") if name in keys.values}
    keys.ignore("expansion_factor", "normalize_decoder", "multi_topk")
    keys.finish()
    if skip and not transcode:
        raise FormatError(f"{keys.source}: skip_connection=True without transcode=True: a skip that copies the input is not read")
    hookpoint = path.resolve().name
    cfg = SAEConfig(
        kind=kind, d_in=d_in, d_sae=d_sae, k=k, pre_bias=not transcode, hookpoints=(hookpoint,), **_run(path),
        target=hookpoint if transcode else "", d_out=file.shape("W_dec", 2)[1] if transcode else None, skip=skip)
    cfg.metadata.update({"source": {"format": "sparsify"}, "units": "as stored", "normalization": "none", "sparsify": kept})
    params = read_params(file, cfg.spec, parts_of(cfg.spec, _NAMES, ("W_skip",)), mesh)
    return SAE(params, cfg, mesh)


def _run(path: Path) -> dict:
    """Model and context from the run's config, where it is there."""
    run = json_object(path.resolve().parent / "config.json")
    model, context = run.get("model"), run.get("ctx_len")
    return {"model": model if isinstance(model, str) else UNKNOWN,
            "metadata": {"text": {"context": context if isinstance(context, int) else None, "bos": None}}}


def write(directory: Path, sae: SAE) -> None:
    """Writes a topk or groupmax SAE or transcoder. Raises `FormatError` with the reason for what sparsify does not compute."""
    c = sae.cfg
    if c.kind not in _KINDS:
        raise FormatError(f"a {c.kind} SAE cannot be written for sparsify, which keeps k features (topk or groupmax)")
    if c.input_norm != "none":
        raise FormatError(f"input_norm={c.input_norm!r} cannot be written for sparsify, which reads rows as they are")
    if c.layers:
        raise FormatError("a crosscoder cannot be written for sparsify, which has one hookpoint per coder")
    if c.d_out not in (None, c.d_in):
        raise FormatError(f"a transcoder from width {c.d_in} to {c.d_out} cannot be written for sparsify, which has one width")
    params = with_pre_bias(sae.params, c.pre_bias, c.d_out is None)
    arrays = {name: sharding.to_host(value) for name, value in tensors(params).items()}
    arrays = {_NAMES.get(name, name): np.ascontiguousarray(v.T) if name == "W_skip" else v for name, v in arrays.items()}
    values = {"activation": c.kind, "expansion_factor": max(1, c.d_sae // c.d_in), "normalize_decoder": False,
              "num_latents": c.d_sae, "k": c.k, "multi_topk": False, "skip_connection": c.skip,
              "transcode": c.d_out is not None, "d_in": c.d_in}
    if is_writer():
        write_bytes(directory / WEIGHTS, save(arrays))
        write_json(directory / CONFIG, values | c.metadata.get("sparsify", {}))
