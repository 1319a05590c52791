"""dictionary_learning (saprmarks): `ae.pt` + `config.json` {"trainer": {...}, "buffer": {...}}.

The class is told by tensor names, since the config writes "AutoEncoder" for two of them; only topk and batchtopk share their
names and are told by `dict_class`. Feature values are those of the stored weights: `AutoEncoder.from_pretrained` makes decoder
rows unit by default, `saejax.sae.folding.fold_decoder_norms` does the same. All subtract their bias from the input but
AutoEncoderNew and JumpReLU. Files are folded to raw units when they are saved; a backup made in mid-run (`ae` and `norm_factor`
inside) is folded here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.keys import Keys
from saejax.base.records import UNKNOWN
from saejax.base.storage import is_writer, write_bytes, write_json
from saejax.formats.archives import open_torch
from saejax.formats.arrays import ArrayFile
from saejax.formats.assembling import parts_of, read_params, under
from saejax.formats.keys import file_keys, json_object
from saejax.formats.torch_files import keys_of
from saejax.formats.torch_write import torch_file
from saejax.sae import tensors
from saejax.sae.folding import to_raw_units, with_pre_bias
from saejax.sae.inference import SAE, SAEConfig

CONFIG, WEIGHTS = "config.json", "ae.pt"
NEEDS = f"{CONFIG} + {WEIGHTS}, or a .pt file of one of its classes"
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_OWN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_BACKUP = "ae."
_BESIDE_BACKUP = ("step", "optimizer", "config", "norm_factor")
UNSET = -1.0


@dataclass(frozen=True)
class Layout:
    """Names of one class's tensors. linear: torch's Linear orientation ([out, in]); scalars: tensors of one number or few."""

    kind: str
    names: Mapping[str, str]
    pre_bias: bool
    linear: bool = True
    scalars: tuple[str, ...] = ()

    @property
    def transposed(self) -> tuple[str, ...]:
        return ("W_dec",) if self.linear else ("W_enc",)

    @property
    def tensors(self) -> set[str]:
        return set(self.names.values()) | set(self.scalars)


LAYOUTS = {
    "AutoEncoder": Layout("relu", _LINEAR | {"b_dec": "bias"}, True),
    "AutoEncoderNew": Layout("relu", _LINEAR | {"b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": Layout("gated", {"W_enc": "encoder.weight", "b_enc": "gate_bias", "W_dec": "decoder.weight",
                                         "b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias"}, True),
    "JumpReluAutoEncoder": Layout("jumprelu", _OWN | {"threshold": "threshold"}, False, False),
    "AutoEncoderTopK": Layout("topk", _LINEAR | {"b_dec": "b_dec"}, True, scalars=("k", "threshold")),
    "BatchTopKSAE": Layout("jumprelu", _LINEAR | {"b_dec": "b_dec"}, True, scalars=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": Layout("jumprelu", _OWN, True, False,
                                     ("k", "threshold", "group_sizes")),
}


def recognise(path: Path) -> bool:
    if (path / WEIGHTS).is_file():
        return True
    names = keys_of(path)
    return any(layout.tensors == names for layout in LAYOUTS.values()) or {"ae.encoder.weight", "norm_factor"} <= names


def weights_file(path: Path) -> Path:
    return path if path.is_file() else path / WEIGHTS


def read(path: Path, mesh: Mesh | None = None) -> SAE:
    """The dictionary of a trainer's directory, or of one of its `.pt` files. Raises `FormatError` naming file and key or
    tensor.
    """
    file = open_torch(weights_file(path))
    norm_factor = 1.0
    if any(name.startswith(_BACKUP) for name in file.entries):
        file, norm_factor = _backup(file)
    directory = path.parent if path.is_file() else path
    directory = directory.parent if directory.name == "checkpoints" else directory
    config = directory / CONFIG
    trainer = file_keys(config).section("trainer", {}) if config.is_file() else Keys({}, config, FormatError)
    name = _class_of(file, trainer)
    layout = LAYOUTS[name]
    d_sae, d_in = file.shape(layout.names["W_enc"], 2)[::1 if layout.linear else -1]
    k, threshold = _scalars(file, name, layout, trainer, d_sae)
    cfg = SAEConfig(kind=layout.kind, d_in=d_in, d_sae=d_sae, k=k if layout.kind == "topk" else 0, pre_bias=layout.pre_bias,
                    **_origin(trainer), metadata=_metadata(directory, name, k, threshold, norm_factor))
    kept = {key: value for key, value in trainer.values.items() if key in ("layer", "submodule_name")}
    cfg.metadata["dictionary_learning"] |= kept
    single = layout.kind == "jumprelu" and "threshold" in layout.scalars
    parts = parts_of(cfg.spec, layout.names, layout.transposed, {"threshold": threshold} if single else None)
    params = read_params(file, cfg.spec, parts, mesh, layout.scalars)
    if "group_sizes" in layout.scalars:
        cfg.metadata["dictionary_learning"]["group_sizes"] = [int(n) for n in file.read("group_sizes")]
    if norm_factor != 1.0:
        params = under(mesh, to_raw_units, params, 1 / norm_factor)
    return SAE(params, cfg, mesh)


def _backup(file: ArrayFile) -> tuple[ArrayFile, float]:
    """(the dictionary, norm_factor) of a mid-run backup: it reads activations divided by norm_factor."""
    factor = file.values.get("norm_factor")
    if "norm_factor" in file.entries:
        factor = file.scalar("norm_factor")
    unknown = {name.split(".")[0] for name in (*file.entries, *file.values)} - {"ae", *_BESIDE_BACKUP}
    if unknown:
        raise FormatError(f"{file.path}: unknown key {', '.join(sorted(unknown)[:8])} beside the dictionary of a backup")
    if factor is None:
        factor = 1.0
    if type(factor) not in (int, float) or not 0 < factor < float("inf"):
        raise FormatError(f"{file.path}: norm_factor={factor!r:.60}; expected a positive number")
    return file.subset(_BACKUP), float(factor)


def _class_of(file: ArrayFile, trainer: Keys) -> str:
    if file.values:
        raise FormatError(f"{file.path}: unknown key {', '.join(list(file.values)[:8])}: a state dict has tensors only")
    fits = [name for name, layout in LAYOUTS.items() if layout.tensors == set(file.entries)]
    if LAYOUTS["AutoEncoderTopK"].tensors - {"threshold"} == set(file.entries):  # before it kept one
        return "AutoEncoderTopK"
    if not fits:
        raise FormatError(f"{file.path}: its tensors ({', '.join(sorted(file.entries)[:12])}) are those of none of "
                          f"{', '.join(LAYOUTS)}")
    if len(fits) == 1:
        return fits[0]
    named = trainer.get("dict_class", str, None)
    if named not in fits:
        raise FormatError(f"{trainer.source}: trainer.dict_class={named!r:.60}; these tensors can be {' or '.join(fits)}, which "
                          "select features differently")
    return named


def _scalars(file: ArrayFile, name: str, layout: Layout, trainer: Keys, d_sae: int) -> tuple[int, float | None]:
    """(k, the one threshold of all features) of the classes that have them."""
    if not layout.scalars:
        return 0, None
    k = file.scalar("k")
    written = trainer.get("k", int, None)
    if k != int(k) or not 0 < k <= d_sae or written not in (None, int(k)):
        raise FormatError(f"{file.path}: k={k:g} of {d_sae} features, trainer.k={written}")
    threshold = file.scalar("threshold") if "threshold" in file.entries else None
    if layout.kind == "jumprelu" and threshold < 0:
        raise FormatError(f"{file.path}: threshold={threshold:g}: {name} encodes by a threshold that was never set (-1); train "
                          "it longer, or set it with dictionary_learning")
    return int(k), threshold


def _origin(trainer: Keys) -> dict:
    layer, submodule = trainer.get("layer", int, None), trainer.get("submodule_name", str, None)
    plain = (submodule or "").removesuffix(f"_layer_{layer}")
    known = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}
    hookpoint = f"blocks.{layer}.{known[plain]}" if layer is not None and plain in known else submodule or UNKNOWN
    return {"hookpoints": (hookpoint,), "model": trainer.get("lm_name", str, None) or UNKNOWN}


def _metadata(directory: Path, name: str, k: int, threshold: float | None, norm_factor: float) -> dict:
    config = json_object(directory / CONFIG)
    buffer = config.get("buffer") if isinstance(config.get("buffer"), dict) else {}
    out = {"source": {"format": "dictionary_learning", "dict_class": name}, "units": "as stored (raw)", "normalization": "none",
           "text": {"context": buffer.get("ctx_len"), "bos": None}, "dictionary_learning": {"k": k, "threshold": threshold}}
    return out | ({"folding": {"norm_factor": norm_factor}} if norm_factor != 1.0 else {})


def write(directory: Path, sae: SAE) -> None:
    """Writes `ae.pt` and `config.json` of the class that computes this SAE. Raises `FormatError` with the reason where none
    does.
    """
    c = sae.cfg
    if c.d_out is not None or c.layers or c.input_norm != "none":
        raise FormatError(f"a {c.spec.shape} with input_norm={c.input_norm!r} cannot be written for dictionary_learning, whose "
                          "dictionaries reconstruct what they read, without normalisation")
    own = c.metadata.get("dictionary_learning", {})
    name = _class_for(sae)
    layout = LAYOUTS[name]
    values = tensors(with_pre_bias(sae.params, c.pre_bias, layout.pre_bias))
    arrays = {file_name: sharding.to_host(values[parameter]) for parameter, file_name in layout.names.items()}
    for parameter in layout.transposed:
        arrays[layout.names[parameter]] = np.ascontiguousarray(arrays[layout.names[parameter]].T)
    if layout.scalars:
        threshold = own.get("threshold", UNSET) if layout.kind == "topk" else sharding.to_host(values["threshold"])[0]
        threshold = UNSET if threshold is None else threshold
        arrays |= {"k": np.array(c.k or own["k"], np.int32), "threshold": np.array(threshold, np.float32)}
    if "group_sizes" in layout.scalars:
        arrays["group_sizes"] = np.array(own["group_sizes"], np.int64)
    trainer = {"dict_class": name, "trainer_class": "saejax", "activation_dim": c.d_in, "dict_size": c.d_sae, "device": "cpu",
               "layer": own.get("layer"), "lm_name": c.model, "submodule_name": own.get("submodule_name", c.hookpoint)}
    trainer |= {"k": int(arrays["k"])} if "k" in arrays else {}
    if is_writer():
        write_bytes(directory / WEIGHTS, torch_file(arrays))
        write_json(directory / CONFIG, {"trainer": trainer, "buffer": {"ctx_len": c.metadata.get("text", {}).get("context")}})


def _class_for(sae: SAE) -> str:
    """The class that computes an SAE; the one it was read from where that fits."""
    c = sae.cfg
    came_from = c.metadata.get("source", {}).get("dict_class")
    if came_from in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE") and c.kind == "jumprelu" and c.pre_bias:
        threshold = sharding.to_host(sae.params.per_feature["threshold"])
        if (threshold == threshold[0]).all():
            return came_from
    classes = {"relu": "AutoEncoder" if c.pre_bias else "AutoEncoderNew", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK",
               "jumprelu": "JumpReluAutoEncoder"}
    if c.kind not in classes:
        raise FormatError(f"a {c.kind} SAE cannot be written for dictionary_learning, which has no class that computes it")
    return classes[c.kind]
