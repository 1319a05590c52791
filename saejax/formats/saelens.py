"""The release directory: `cfg.json` + `sae_weights.safetensors` with SAELens' names and layout, so that both libraries read it.

Tensors (float32): W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; gated has b_gate, r_mag and b_mag
[d_sae] instead of b_enc, jumprelu has threshold [d_sae], a skip transcoder W_skip [d_out, d_in]. SAELens knows plain SAEs of
every kind, and transcoders of kind relu and jumprelu; the other shapes follow the same pattern under names that it refuses.
Normalisation and, except for topk, decoder norms are folded, so raw activations go in: pre = (x - b_dec if apply_b_dec_to_input)
W_enc + b_enc. `model_name` is what other libraries load: of a preset the published model; `metadata.saejax.lm` says what it is.

Above `FILE_BYTES` the weights are in several files, `sae_weights-00001-of-00004.safetensors` and so on, each with the tensors of
its own range of features; what has no feature axis (b_dec, W_skip) is in all of them. `metadata.saejax.files` lists them:
`file`, `first` and `last` feature, `sha256`. SAELens reads one file only: `saejax convert` to saelens writes that.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from saejax.base import distributed
from saejax.base.assets import MODELS, provenance, published
from saejax.base.errors import FormatError
from saejax.base.logs import Progress, say
from saejax.base.ranges import Range, ranges
from saejax.base.storage import check_room, file_sha256, is_writer, replacing, together, write_json
from saejax.base.version import __version__
from saejax.formats import streamed
from saejax.formats.assembling import Part, parts_of
from saejax.formats.keys import json_object
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.row_norm import CENTER, NONE

SCHEMA_VERSION = 1
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
FILE_BYTES = 4_000_000_000  # of weights in one file; beyond, a release has several
SHARD = "sae_weights-{:05d}-of-{:05d}.safetensors"
_SHARD = re.compile(r"sae_weights-\d{5}-of-\d{5}\.safetensors")
_PLAIN = {"relu": "standard", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}
_SHAPES = {"transcoder": "transcoder", "skip transcoder": "skip_transcoder", "crosscoder": "crosscoder"}
ARCHITECTURES = {(kind, "sae"): name for kind, name in _PLAIN.items()} | {
    (kind, shape): ("" if kind == "relu" else f"{kind}_") + name for kind in _PLAIN for shape, name in _SHAPES.items()}
KNOWN_TO_SAELENS = (*_PLAIN.values(), "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
TRANSPOSED = ("W_enc", "W_skip")  # stored here the other way round
NAMES = {"gated": {"b_enc": "b_gate"}}  # tensors that are called otherwise than the parameters of a kind
DIGESTS = ("weights_sha256", "files")  # in metadata.saejax: of one file, of several
SAELENS_VERSION = "6.54.12"  # the reader that releases are checked against; readers treat < 6 as an older layout


def _begins_rows(bos: str | None) -> bool:
    """Of `config.text.bos`."""
    return bos is not None and bos.partition(":")[0] not in ("none", "doc")


def _centred(cfg: SAEConfig, theirs: dict) -> dict:
    """How a reader is told that rows are centred."""
    if cfg.input_norm != CENTER:
        return {}
    return {"model_from_pretrained_kwargs": (theirs.get("model_from_pretrained_kwargs") or {}) | {"center_writing_weights": True}}


def listed(path: Path) -> list | None:
    """The entries of `metadata.saejax.files` of a release in several files; None for others. Nothing is checked."""
    found = json_object(path / CONFIG)
    for key in ("metadata", "saejax", "files"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, list) else None


def is_release(path: Path) -> bool:
    """True for a directory that holds a `cfg.json` and weights beside it, or names the several files that hold them."""
    return (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or listed(path) is not None)


def weights(cfg: SAEConfig) -> list[str]:
    """The files that hold the weights of a release that was read."""
    return [entry["file"] for entry in cfg.metadata.get("files", [])] or [WEIGHTS]


def write(directory: Path, sae: SAE, *, single: bool = False) -> None:
    """Writes the weights and `cfg.json`; the weights are whole on disk before `cfg.json` names them.

    single: into the one file that SAELens reads, whatever its size. Every process must call it. Each writes whole files of
    features that its own devices hold, block by block. Raises `DiskError` before it begins where the room is not there.
    """
    source = streamed.of_params(sae.params)
    files = [Range(0, sae.cfg.d_sae)] if single else _files(sae.cfg, source)
    if len(files) == 1 and not all(0 in processes for _, _, processes in source.shards):
        source = streamed.gathered(sae.params)
    write_from(directory, sae.cfg, source, files)


def write_from(directory: Path, cfg: SAEConfig, source: streamed.Source, files: Sequence[Range]) -> None:
    """`write` of what need not be in the memory of devices. files: the features of each."""
    names = [WEIGHTS] if len(files) == 1 else [SHARD.format(n, len(files)) for n in range(1, len(files) + 1)]
    total = sum(streamed.tensor_bytes(cfg.spec, of.stop - of.first) for of in files)
    architecture(cfg)
    with together("saejax_release"):
        if is_writer():
            check_room(directory, total)
    digests = _write_weights(directory, cfg, source, dict(zip(names, files, strict=True)))
    if total > FILE_BYTES:
        say(f"{directory}: {total:,} bytes of weights in {len(files)} file{'s' * (len(files) > 1)}")
    if not is_writer():
        return
    written = {"weights_sha256": digests[0]} if len(files) == 1 else {"files": [
        {"file": name, "first": of.first, "last": of.stop - 1, "sha256": digest}
        for name, of, digest in zip(names, files, digests, strict=True)]}
    write_json(directory / CONFIG, _to_cfg(cfg, written))
    for name in os.listdir(directory):  # of a release that was here before
        if (name == WEIGHTS or _SHARD.fullmatch(name)) and name not in names:
            (directory / name).unlink()


def parts_for(cfg: SAEConfig) -> dict[str, Part]:
    """How the parameters lie in a file."""
    return parts_of(cfg.spec, NAMES.get(cfg.kind, {}), TRANSPOSED)


def _files(cfg: SAEConfig, source: streamed.Source) -> list[Range]:
    shared, one = (streamed.tensor_bytes(cfg.spec, n) for n in (0, 1))
    if shared + (one - shared) * cfg.d_sae <= FILE_BYTES:
        return [Range(0, cfg.d_sae)]
    return ranges(source.shards, max(1, (FILE_BYTES - shared) // (one - shared)))


def _write_weights(directory: Path, cfg: SAEConfig, source: streamed.Source, files: Mapping[str, Range]) -> list[str]:
    """The digests of all files. They are whole under other names before the first takes its place: of a release that was there
    nothing is lost till then.
    """
    here, digests = jax.process_index(), np.zeros((len(files), 32), np.uint8)
    sizes = {name: streamed.tensor_bytes(cfg.spec, of.stop - of.first) for name, of in files.items()}
    own = sum(sizes[name] for name, of in files.items() if of.process == here)
    with together("saejax_release"), contextlib.ExitStack() as stack:
        with together("saejax_release"), Progress("write", own, unit="B", enabled=sum(sizes.values()) > FILE_BYTES) as bar:
            for number, (name, of) in enumerate(files.items()):
                if of.process == here:
                    f = stack.enter_context(replacing(directory / name))
                    streamed.write_file(f, directory / name, source, cfg.spec, parts_for(cfg), of, bar.advance)
                    digests[number] = np.frombuffer(bytes.fromhex(file_sha256(f.name)), np.uint8)
    return [row.tobytes().hex() for row in distributed.summed_over_processes(digests)]


def architecture(cfg: SAEConfig) -> str:
    """What `cfg.json` calls an SAE of this kind and shape. Raises `FormatError` for a kind that the layout cannot express."""
    if (cfg.kind, cfg.spec.shape) not in ARCHITECTURES:
        raise FormatError(f"a {cfg.kind} {cfg.spec.shape} cannot be written in SAELens' layout: it has no architecture that "
                          "computes it")
    return ARCHITECTURES[cfg.kind, cfg.spec.shape]


def _to_cfg(cfg: SAEConfig, written: dict) -> dict:
    """written: the digests of the weights."""
    text = cfg.metadata.get("text", {})
    theirs = cfg.metadata.get("saelens", {})  # of a file of SAELens that was read
    own = {name: value for name, value in cfg.metadata.items() if name not in ("saelens", *DIGESTS)}
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
                     "saejax": {**own, "schema_version": SCHEMA_VERSION, "saejax_version": __version__, **written}},
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
