"""OpenMOSS (lm-saes) and Llama Scope.

New: `config.json` with sae_type + `sae_weights.safetensors`: W_E [d, d_sae], b_E, W_D [d_sae, d], b_D,
activation_function.log_jumprelu_threshold, scalars dataset_average_activation_norm.<hook>. R1 distill: `config.json` +
`sae_weights.safetensors` with encoder.weight, decoder.weight and log_jumprelu_threshold. Old Llama Scope: `hyperparams.json` +
`checkpoints/final.safetensors`, one jump_relu_threshold.

The input is never centred. norm_activation "dataset-wise" (inputs times s = sqrt(d) / average norm) is folded, so that features
come out in raw units: b_E /= s_in, b_D /= s_out, W_D *= s_in / s_out, W_E unchanged. Learned thresholds are in units of scaled
inputs and are divided by s_in: the function as it was trained (lm-saes does so in its cross-layer transcoder; its SAE class
leaves them, which moves the gate by s_in). The one jump_relu_threshold of old Llama Scope is in raw units already. With
sparsity_include_decoder_norm the selection reads pre ||W_D|| and the value stays pre: the threshold becomes threshold /
||W_D||. For topk no per-feature threshold can say that: norms are folded there, features are pre ||W_D||.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from saejax.base.errors import FormatError
from saejax.base.keys import Keys
from saejax.base.records import UNKNOWN
from saejax.formats.arrays import ArrayFile
from saejax.formats.assembling import parts_of, read_params, under
from saejax.formats.keys import file_keys, json_object
from saejax.formats.safetensors_file import open_safetensors
from saejax.sae import SAEParams
from saejax.sae.folding import decoder_norms, scale_features, to_raw_units
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.row_norm import CONSTANT_NORM, NONE

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
OLD_CONFIG, OLD_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NEEDS = f"{CONFIG} + {WEIGHTS}, or {OLD_CONFIG} + {OLD_WEIGHTS}"
_NEW = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D", "threshold": "activation_function.log_jumprelu_threshold"}
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias",
           "threshold": "log_jumprelu_threshold"}
_AVERAGE = "dataset_average_activation_norm."
_KINDS = {"relu": "relu", "topk": "topk", "jumprelu": "jumprelu"}
# Keys that change nothing at inference: kernels, initialisation, training, where it was computed.
_KNOWN = ("use_triton_kernel", "sparsity_threshold_for_triton_spmm_kernel", "sparsity_threshold_for_csr",
          "jumprelu_threshold_window", "dtype", "device", "seed", "sae_pretrained_name_or_path",
          "init_encoder_with_decoder_transpose", "decoder_exactly_fixed_norm", "init_decoder_norm", "init_encoder_norm",
          "l1_coefficient", "lp", "d_sae", "strict_loading", "n_devices", "promote_act_fn_dtype", "force_unit_decoder_norm",
          "decoder_exactly_unit_norm", "use_ghost_grads", "norm_activation_by_token", "init_log_jumprelu_threshold_value",
          "model_name", "version", "use_auxk", "k_aux", "k_aux_schedule", "init_search",
          "init_encoder_with_decoder_transpose_factor", "state", "tp_size", "ddp_size", "l1_coefficient_warmup_steps",
          "initial_k", "k_warmup_steps", "remove_gradient_parallel_to_decoder_directions", "decoder_bias_init_method")


@dataclass(frozen=True)
class _Folds:
    """read, written: factors of inputs and outputs that the dataset-wise normalisation multiplies with."""

    read: float
    written: float
    log_threshold: bool
    by_norm: str   # "", "threshold" or "features": how a selection by activation x decoder norm is expressed

    def apply(self, params: SAEParams) -> SAEParams:
        norms = decoder_norms(params)
        threshold = params.per_feature.get("threshold")
        if self.log_threshold:
            threshold = jnp.exp(threshold) / self.read
        if self.by_norm == "threshold":
            threshold = threshold / norms
        params = to_raw_units(params.replace(per_feature={}), self.read, self.written)
        if self.by_norm == "features":
            params = scale_features(params, decoder_norms(params))
        return params if threshold is None else params.replace(per_feature={"threshold": threshold})


def recognise(path: Path) -> bool:
    if (path / OLD_CONFIG).is_file():
        return True
    config = json_object(path / CONFIG)
    return (path / WEIGHTS).is_file() and ("sae_type" in config or "hook_point_in" in config)


def read(path: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of a directory of either layout. Raises `FormatError` naming file and key or tensor."""
    old = (path / OLD_CONFIG).is_file()
    keys = file_keys(path / (OLD_CONFIG if old else CONFIG))
    file = open_safetensors(path / (OLD_WEIGHTS if old else WEIGHTS))
    keys.one_of("sae_type", ("sae",), "sae")
    for name in ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder", "tied"):
        keys.one_of(name, (False,), False)
    kind = _KINDS[keys.one_of("act_fn", _KINDS, "jumprelu")]
    linear = "encoder.weight" in file.entries
    names = dict(_LINEAR if linear else _NEW)
    d_in, d_sae = _sizes(keys, file, names, linear)
    norm = keys.one_of("norm_activation", ("dataset-wise", "token-wise", "inference"), "dataset-wise")
    scales, ignored = _scales(keys, file, d_in, norm)
    k = keys.get("top_k", int, 0)
    kind_k = k if kind == "topk" else 0
    if kind == "topk" and not 0 < k <= d_sae:
        raise FormatError(f"{keys.source}: top_k={k} of {d_sae} features")
    cfg = SAEConfig(kind=kind, d_in=d_in, d_sae=d_sae, k=kind_k, pre_bias=False, model=_model(path, keys),
                    hookpoints=(keys.get("hook_point_in", str, None) or UNKNOWN,), **_output(keys, file, names, linear),
                    input_norm=CONSTANT_NORM if norm == "token-wise" else NONE)
    fills = {} if keys.get("use_decoder_bias", bool, True) else {"b_dec": 0.0}
    threshold = keys.number("jump_relu_threshold", None)
    if kind == "jumprelu" and names["threshold"] not in file.entries:
        fills["threshold"] = _one_threshold(keys, threshold)
    include = keys.get("sparsity_include_decoder_norm", bool, False)
    by_norm = ("" if not include or kind == "relu" else "features" if kind == "topk" else "threshold")
    keys.ignore(*_KNOWN)
    keys.finish()
    params = read_params(file, cfg.spec, parts_of(cfg.spec, names, ("W_dec",) if linear else ("W_enc",), fills), mesh, ignored)
    folds = _Folds(*scales, kind == "jumprelu" and "threshold" not in fills, by_norm)
    cfg.metadata.update(_metadata(norm, folds))
    return SAE(under(mesh, folds.apply, params), cfg, mesh)


def _sizes(keys: Keys, file: ArrayFile, names: dict, linear: bool) -> tuple[int, int]:
    d_in, d_sae = file.shape(names["W_enc"], 2)[::-1 if linear else 1]
    factor = keys.number("expansion_factor", None)
    written = keys.get("d_sae", int, None) or (round(keys.size("d_model") * factor) if factor else d_sae)
    if keys.size("d_model") != d_in or written != d_sae:
        raise FormatError(f"{keys.source}: d_model={keys.values['d_model']} and {written} features, but {file.path} has W_enc "
                          f"for {d_in} and {d_sae}")
    return d_in, d_sae


def _output(keys: Keys, file: ArrayFile, names: dict, linear: bool) -> dict:
    """Target and width of a transcoder, whose two hook points differ."""
    read, written = keys.values.get("hook_point_in"), keys.get("hook_point_out", str, None)
    if written in (None, read):
        return {}
    return {"target": written, "d_out": file.shape(names["W_dec"], 2)[0 if linear else 1]}


def _scales(keys: Keys, file: ArrayFile, d_in: int, norm: str) -> tuple[tuple[float, float], tuple[str, ...]]:
    """((factor of inputs, of outputs), tensors that held them)."""
    held = tuple(name for name in file.entries if name.startswith(_AVERAGE))
    averages = {name.removeprefix(_AVERAGE): file.scalar(name) for name in held} if norm == "dataset-wise" else {}
    written = keys.get(_AVERAGE[:-1], dict, {}) or {}
    if norm != "dataset-wise":
        return (1.0, 1.0), held
    averages |= {name: value for name, value in written.items() if type(value) in (int, float)}
    read = keys.values.get("hook_point_in")
    found = [averages.get(a, averages.get(b)) for a, b in ((read, "in"), (keys.values.get("hook_point_out") or read, "out"))]
    found[1] = found[1] if found[1] is not None or keys.values.get("hook_point_out") not in (None, read) else found[0]
    if any(value is None or not 0 < value < math.inf for value in found):
        raise FormatError(f"{keys.source}: norm_activation='dataset-wise' and no {_AVERAGE[:-1]} for hook_point_in and "
                          "hook_point_out "
                          f"(found {', '.join(averages) or 'none'})")
    return (d_in ** 0.5 / found[0], d_in ** 0.5 / found[1]), held


def _one_threshold(keys: Keys, value: float | None) -> float:
    if value is None or not value >= 0:
        raise FormatError(f"{keys.source}: act_fn='jumprelu', but neither a tensor of thresholds nor jump_relu_threshold "
                          f"({value})")
    return value


def _model(path: Path, keys: Keys) -> str:
    return "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in str(path.resolve()) else keys.get("model_name", str, None) or UNKNOWN


def _metadata(norm: str, folds: _Folds) -> dict:
    units = "raw" if norm == "dataset-wise" else "normalised rows" if norm == "token-wise" else "as stored"
    return {"source": {"format": "openmoss"}, "normalization": norm, "folding": {"read": folds.read, "written": folds.written},
            "units": units + (", times decoder norms" if folds.by_norm == "features" else "")}
