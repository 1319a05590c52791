"""Reading SAELens' directories: releases of either library, files of SAELens before 6.0, and training checkpoints."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.assets import MODELS, published
from saejax.base.errors import FormatError
from saejax.base.keys import Keys
from saejax.base.ranges import Range
from saejax.base.records import UNKNOWN
from saejax.base.storage import file_sha256, together
from saejax.formats import saelens_model, streamed
from saejax.formats.arrays import FLOATS
from saejax.formats.assembling import Part, Tensors, expected_shapes, parts_of, read_params, under
from saejax.formats.keys import file_keys
from saejax.formats.ranges import FeatureFiles, Held, named
from saejax.formats.saelens import ARCHITECTURES, CONFIG, DIGESTS, NAMES, SCHEMA_VERSION, SHARD, TRANSPOSED, WEIGHTS
from saejax.formats.safetensors_file import open_safetensors
from saejax.sae import SAEParams, param_shapes, tensors
from saejax.sae.folding import decoder_norms, fold_input_scale, scale_features
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.row_norm import CONSTANT_NORM, LAYER_NORM, NONE

SCALER = "activation_scaler.json"
AVERAGE = "expected_average_only_in"
# Saved by the training classes; at inference one threshold, as SAELens exports them.
WITH_TOPK_THRESHOLD = ("batchtopk", "matryoshka_batchtopk")
# Keys that change nothing at inference: how it was trained, where it was computed.
_TRAINING_KEYS = (
    "device", "dtype", "decoder_init_norm", "l1_coefficient", "l1_warm_up_steps", "lp_norm", "aux_loss_coefficient",
    "use_sparse_activations", "jumprelu_bandwidth", "jumprelu_init_threshold", "jumprelu_sparsity_loss_mode",
    "jumprelu_ste_to_input", "jumprelu_tanh_scale", "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient",
    "target_l0", "topk_threshold_lr", "matryoshka_widths", "use_matryoshka_aux_loss")
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_METADATA = ("model_name", "hook_name", "hook_name_out", "hook_head_index", "context_size", "prepend_bos", "seqpos_slice",
             "dataset_path", "model_from_pretrained_kwargs", "neuronpedia_id", "sae_lens_training_version")


@dataclass(frozen=True)
class _Folds:
    """What is folded into the weights at loading, so that raw activations give the peer's own feature values."""

    log_threshold: bool = False
    scale: float = 1.0              # of the inputs, from activation_scaler.json
    decoder_norms: bool = False     # selection by activation x decoder norm
    threshold: float | None = None  # of all features, in the units after folding

    def apply(self, params: SAEParams) -> SAEParams:
        if self.log_threshold:
            params = replace(params, per_feature={"threshold": jnp.exp(params.per_feature["threshold"])})
        params = fold_input_scale(params, self.scale) if self.scale != 1.0 else params
        params = scale_features(params, decoder_norms(params)) if self.decoder_norms else params
        if self.threshold is not None:
            params = replace(params, per_feature={"threshold": jnp.full_like(params.b_enc, self.threshold)})
        return params


@dataclass(frozen=True)
class Opened:
    """A directory whose config is read and whose weights are found: what it takes to read them. dtypes: those that are read."""

    cfg: SAEConfig
    file: Tensors
    parts: dict[str, Part]
    folds: _Folds
    ignored: tuple[str, ...]
    dtypes: tuple[str, ...]

    def check(self) -> None:
        """Raises `FormatError` for wrong tensors, before any is read."""
        self.file.check(expected_shapes(self.cfg.spec, self.parts), self.ignored, self.dtypes)

    def source(self) -> streamed.Source:
        """Its parameters as they lie there, block by block."""
        self.check()
        return streamed.of_files(self.file, self.cfg.spec, self.parts)


def read(directory: Path, mesh: Mesh | None = None, features: range | slice | None = None) -> SAE:
    """The SAE of a directory with `cfg.json` and `sae_weights.safetensors`, or the several files that a large release has; each
    device reads its own slice of the files.

    Feature activations are SAELens' own. A training checkpoint (`activation_scaler.json`, `topk_threshold`, `log_threshold`)
    comes out as what SAELens would export. features: only these, without looking at other bytes, so that no digest is verified;
    not of topk, which compares all features of a row. Raises `FormatError` naming file and key or tensor.
    """
    spanning = mesh is not None and mesh.is_multi_process
    with together("saejax_load") if spanning else contextlib.nullcontext():
        found = opened(directory, mesh, features)
    params = read_params(found.file, found.cfg.spec, found.parts, mesh, found.ignored, found.dtypes)
    if found.folds != _Folds():
        params = under(mesh, found.folds.apply, params)
        found.cfg.metadata["folding"] = {"scaling_factor": found.folds.scale, "decoder_norms": found.folds.decoder_norms}
    return SAE(params, found.cfg, mesh)


def opened(directory: Path, mesh: Mesh | None = None, features: range | slice | None = None) -> Opened:
    """What `read` reads. The digests of the files that this process reads for the mesh are verified."""
    directory = Path(directory)
    keys = file_keys(directory / CONFIG)
    own = _own(keys)
    if "sae_lens_version" not in keys.section("metadata", {}).values and not own:
        keys = Keys(_modern(keys), keys.source, FormatError)
    cfg, rescaled = _config(keys, own)
    if features is None:
        file = _verified(directory, cfg, own, mesh)
    else:
        file, cfg = _part(directory, cfg, own, _range(features, cfg, keys.source))
    folds, names, ignored = _folds(directory, keys, cfg, file, rescaled)
    fills = {} if folds.threshold is None else {"threshold": folds.threshold}
    parts = parts_of(cfg.spec, names, TRANSPOSED, fills)
    return Opened(cfg, file, parts, folds, ignored, ("F32",) if own else FLOATS)


def verify(directory: Path, advance: Callable[[int], object] = lambda _: None) -> SAEConfig:
    """What the SAE is, once every byte of its weights is read, block by block. Raises `FormatError`, as `read` does."""
    found = opened(directory)
    source = found.source()
    for name, shape in tensors(param_shapes(found.cfg.spec, folded=True)).items():
        for first, stop in streamed.blocks(shape):
            advance(source.rows(name, first, stop).nbytes)
    return found.cfg


def _weights(directory: Path, cfg: SAEConfig, own: dict) -> dict[str, tuple[Range, str | None]]:
    """{file: (its features, sha256)}"""
    if "files" not in own:
        return {WEIGHTS: (Range(0, cfg.d_sae), own.get("weights_sha256"))}
    if not isinstance(own["files"], list):
        raise FormatError(f"{directory / CONFIG}: metadata.saejax.files is not a list; release it again")
    return named(directory, own["files"], cfg.d_sae, SHARD)


def _verified(directory: Path, cfg: SAEConfig, own: dict, mesh: Mesh | None) -> Tensors:
    weights = _weights(directory, cfg, own)
    _present(directory, weights)
    here = [(0, cfg.d_sae)]
    if mesh is not None and len(weights) > 1:
        sharding.check_features(cfg.d_sae, mesh)
        where = sharding.sharding(mesh, "features").addressable_devices_indices_map((cfg.d_sae,))
        here = [index[0].indices(cfg.d_sae)[:2] for index in where.values()]
    for number, (name, (of, digest)) in enumerate(weights.items()):
        read_here = number == 0 or any(of.first < stop and first < of.stop for first, stop in here)
        if digest is not None and read_here and file_sha256(directory / name) != digest:
            raise FormatError(f"{directory / name}: altered since cfg.json was written (sha256 differs); copy or release it "
                              "again")
    held = [Held(open_safetensors(directory / name), of.first, of.stop) for name, (of, _) in weights.items()]
    return held[0].file if len(held) == 1 else FeatureFiles(held, range(cfg.d_sae), TRANSPOSED)


def _part(directory: Path, cfg: SAEConfig, own: dict, features: range) -> tuple[Tensors, SAEConfig]:
    """(the tensors of these features, the SAE of them)"""
    weights = {name: of for name, (of, _) in _weights(directory, cfg, own).items()
               if of.first < features.stop and features.start < of.stop}
    _present(directory, weights)
    held = [Held(open_safetensors(directory / name), of.first, of.stop) for name, of in weights.items()]
    metadata = {name: value for name, value in cfg.metadata.items() if name not in DIGESTS}
    metadata["features"] = {"first": features.start, "last": features.stop - 1, "of": cfg.d_sae}
    return FeatureFiles(held, features, TRANSPOSED), replace(cfg, d_sae=len(features), metadata=metadata)


def _range(features: range | slice, cfg: SAEConfig, source: Path) -> range:
    if cfg.kind == "topk":
        raise FormatError(f"{source}: features={features} of a topk SAE: which features are active depends on all of them; load "
                          "it whole, or release it as jumprelu, with one threshold (an option of saejax release)")
    if isinstance(features, slice):
        start, stop, step = features.start or 0, cfg.d_sae if features.stop is None else features.stop, features.step or 1
    else:
        start, stop, step = features.start, features.stop, features.step
    if step != 1 or not 0 <= start < stop <= cfg.d_sae:
        raise FormatError(f"{source}: features={features}: expected neighbours, at least one, from 0 to {cfg.d_sae}")
    return range(start, stop)


def _present(directory: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FormatError(f"{directory / missing[0]}: missing{f', and {len(missing) - 1} more' if missing[1:] else ''}; copy the "
                          "whole release again")


def _own(keys: Keys) -> dict:
    """What saejax itself wrote into the metadata; {} in files of others."""
    own = keys.section("metadata", {}).get("saejax", dict, {})
    if own.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise FormatError(f"{keys.source}: release schema version {own['schema_version']}, this saejax reads {SCHEMA_VERSION}")
    return own


def _config(keys: Keys, own: dict) -> tuple[SAEConfig, bool]:
    """(what the SAE is, whether it selects by activation x decoder norm)."""
    architectures = {name: kind_and_shape for kind_and_shape, name in ARCHITECTURES.items()}
    architectures |= dict.fromkeys(WITH_TOPK_THRESHOLD, ("jumprelu", "sae"))
    name = keys.one_of("architecture", architectures)
    kind, shape = architectures[name]
    transcoder = shape.endswith("transcoder")
    norm = keys.one_of("normalize_activations", (NONE, LAYER_NORM, CONSTANT_NORM, AVERAGE), NONE)
    if norm == AVERAGE and transcoder:
        raise FormatError(f"{keys.source}: normalize_activations={norm!r} in a transcoder: the scale of its output is not known")
    reshape = keys.one_of("reshape_activations", ("none", "hook_z"), "none")
    pre_bias = keys.get("apply_b_dec_to_input", bool, True)
    if transcoder and pre_bias and not own:
        raise FormatError(f"{keys.source}: apply_b_dec_to_input=True in a transcoder, whose b_dec has the width of its output")
    written = keys.section("metadata")
    k, hookpoints, model = _k(keys, name), _hookpoints(written, shape), _model(written, own)
    kwargs = written.get(saelens_model.KEY, dict, {})
    rows = saelens_model.input_norm(kwargs, model, hookpoints, NONE if norm == AVERAGE else norm, keys.source)
    cfg = SAEConfig(
        kind=kind, d_in=keys.size("d_in"), d_sae=keys.size("d_sae"), k=k if kind == "topk" else 0, pre_bias=pre_bias,
        model=model, hookpoints=hookpoints,
        target=(written.get("hook_name_out", str, None) or UNKNOWN) if transcoder else "",
        d_out=keys.size("d_out") if transcoder else None, skip=shape == "skip transcoder",
        layers=tuple(map(int, keys.get("layers", list))) if shape == "crosscoder" else (),
        input_norm=rows, metadata=own or _metadata(written.values, name, norm, reshape, k))
    rescaled = keys.get("rescale_acts_by_decoder_norm", bool, False)
    keys.ignore(*_TRAINING_KEYS)
    keys.finish()
    return cfg, rescaled


def _model(written: Keys, own: dict) -> str:
    """The model's name: of a preset, which is written by the name of the published model, the preset's."""
    named = written.get("model_name", str, None) or UNKNOWN
    preset = own["lm"].get("model") if isinstance(own.get("lm"), dict) else None
    return preset if isinstance(preset, str) and preset in MODELS and named == published(preset) else named


def _k(keys: Keys, architecture: str) -> int | float:
    """k of topk; of batchtopk, where it need not be whole, only for the record."""
    if architecture in WITH_TOPK_THRESHOLD:
        return keys.number("k", 0.0)
    k = keys.size("k") if architecture.startswith("topk") else 0
    if k > keys.size("d_sae"):
        raise FormatError(f"{keys.source}: k={k} of {keys.size('d_sae')} features")
    return k


def _hookpoints(written: Keys, shape: str) -> tuple[str, ...]:
    if shape == "crosscoder":
        return tuple(map(str, written.get("hook_names", list)))
    return (written.get("hook_name", str, None) or UNKNOWN,)


def _metadata(written: Mapping, architecture: str, norm: str, reshape: str, k) -> dict:
    bos = {True: "row", False: "none"}.get(written.get("prepend_bos"))
    return {"source": {"format": "saelens", "architecture": architecture, "version": written.get("sae_lens_version"), "k": k},
            "text": {"context": written.get("context_size"), "bos": bos}, "normalization": norm, "reshape": reshape,
            "units": "scaled inputs" if norm == AVERAGE else "normalised rows" if norm != "none" else "as stored",
            "saelens": dict(written)}


def _folds(directory: Path, keys: Keys, cfg: SAEConfig, file: Tensors, rescaled: bool) -> tuple[_Folds, dict, tuple[str, ...]]:
    """(what to fold, names of tensors that differ from the parameters', tensors that are read elsewhere)."""
    names, ignored, threshold, log = NAMES.get(cfg.kind, {}), _ones(file, cfg), None, False
    scale = _scale(directory, keys)
    if keys.values["architecture"] in WITH_TOPK_THRESHOLD:
        ignored = (*ignored, "topk_threshold")
        if "topk_threshold" not in file.entries:
            raise FormatError(f"{file.path}: topk_threshold: missing; without it a {keys.values['architecture']} SAE has no "
                              "threshold")
        threshold = file.scalar("topk_threshold") / (scale if rescaled else 1.0)
    elif cfg.kind == "jumprelu" and "log_threshold" in file.entries and "threshold" not in file.entries:
        names, log = {"threshold": "log_threshold"}, True
    if rescaled and cfg.kind not in ("topk", "jumprelu"):
        raise FormatError(f"{keys.source}: rescale_acts_by_decoder_norm=True with architecture {keys.values['architecture']!r}")
    return _Folds(log, scale, rescaled, threshold), names, ignored


def _ones(file: Tensors, cfg: SAEConfig) -> tuple[str, ...]:
    """`scaling_factor`, which files from before 6.0 hold: factors on the activations after finetuning; read where all are 1."""
    if "scaling_factor" not in file.entries:
        return ()
    if file.shape("scaling_factor", 1) != (cfg.d_sae,) or not (file.read("scaling_factor") == 1).all():
        raise FormatError(f"{file.path}: scaling_factor is not 1 for all features; let SAELens fold it and save again")
    return ("scaling_factor",)


def _scale(directory: Path, keys: Keys) -> float:
    """The factor on the inputs that a training checkpoint keeps beside its weights."""
    norm = keys.values.get("normalize_activations")
    path = directory / SCALER
    if not path.is_file():
        if norm == AVERAGE:
            raise FormatError(f"{keys.source}: normalize_activations={norm!r} and no {SCALER} beside it: the factor is not "
                              "known. Fold it "
                              f"with SAELens and save again, or write {SCALER} with "
                              f"{{\"scaling_factor\": sqrt(d_in) / mean norm}}")
        return 1.0
    scaler = file_keys(path)
    factor = scaler.number("scaling_factor", None)
    if scaler.get("has_whitening", bool, False):
        raise FormatError(f"{path}: has_whitening=True: whitened inputs are not read; let SAELens fold them and save again")
    scaler.finish()
    if factor is None:
        if norm == AVERAGE:
            raise FormatError(f"{path}: scaling_factor is null, but cfg.json has normalize_activations={norm!r}")
        return 1.0
    if norm != AVERAGE:
        raise FormatError(f"{path}: scaling_factor={factor} beside normalize_activations={norm!r}: folded already or not is "
                          f"not known; remove {SCALER} if it is folded")
    if not (np.isfinite(factor) and factor > 0):
        raise FormatError(f"{path}: scaling_factor={factor}")
    return factor


def _modern(keys: Keys) -> dict:
    """cfg.json of SAELens before 6.0, which is flat, as one of 6.0. What changed the function there is read or refused."""
    old = {_RENAMED.get(name, name): value for name, value in keys.values.items() if name != "metadata"}
    kwargs = old.get("activation_fn_kwargs") or {}
    function = old.get("activation_fn", "relu")
    architecture = old.get("architecture", "standard")
    if function == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    elif function != "relu":
        raise FormatError(f"{keys.source}: activation_fn={function!r} with architecture {architecture!r} is not relu or topk")
    if old.get("finetuning_scaling_factor"):
        raise FormatError(f"{keys.source}: finetuning_scaling_factor=True is not read; let SAELens fold it")
    norm = old.get("normalize_activations") or "none"
    hook = str(old.get("hook_name"))
    new = {"architecture": architecture, "d_in": old.get("d_in"), "d_sae": old.get("d_sae"),
           "apply_b_dec_to_input": old.get("apply_b_dec_to_input", True),
           "normalize_activations": AVERAGE if norm is True else norm,
           "reshape_activations": old.get("reshape_activations", "hook_z" if "hook_z" in hook else "none"),
           "metadata": {name: old[name] for name in _METADATA if name in old} | {"prepend_bos": old.get("prepend_bos", True)}}
    new |= {"k": old.get("k", kwargs.get("k"))} if architecture == "topk" else {}
    return new | ({"d_out": old["d_out"]} if "d_out" in old else {})
