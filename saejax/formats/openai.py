"""OpenAI sparse_autoencoder: one `.pt` file per layer.

pre_bias [d], encoder.weight [d_sae, d], latent_bias [d_sae], decoder.weight [d, d_sae]; three vectors of statistics; "activation"
("ReLU" or "TopK") and "activation_state_dict" {k, postact_fn}. pre = (x - pre_bias) W^T + latent_bias; with TopK every row is
normalised first, (x - mean) / (std + 1e-5) with the unbiased std, and the reconstruction is scaled back.
"""

from pathlib import Path

from jax.sharding import Mesh

from saejax.base.errors import FormatError
from saejax.base.records import UNKNOWN
from saejax.formats.archives import open_torch
from saejax.formats.arrays import ArrayFile
from saejax.formats.assembling import parts_of, read_params
from saejax.formats.torch_files import keys_of, only_torch_file
from saejax.sae.inference import SAE, SAEConfig
from saejax.sae.row_norm import LAYER_NORM, NONE

NEEDS = "one .pt file with pre_bias and latent_bias"
_NAMES = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_STATE = "activation_state_dict."
_POSTACT = ("ReLU", "relu")


def recognise(path: Path) -> bool:
    return {"pre_bias", "latent_bias"} <= keys_of(path)


def read(path: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of a file, or of a directory that holds one. Raises `FormatError` naming file and key or tensor."""
    file = open_torch(only_torch_file(path))
    d_sae, d_in = file.shape(_NAMES["W_enc"], 2)
    activation = file.values.pop("activation", "ReLU")
    state = {name.removeprefix(_STATE): file.values.pop(name) for name in list(file.values) if name.startswith(_STATE)}
    if not file.values.pop("activation_state_dict", {}) == {} or file.values:
        raise FormatError(f"{file.path}: unknown key {', '.join(file.values) or 'activation_state_dict'}; what it changes is "
                          "not known")
    k = _k(file, activation, state, d_sae)
    norm = LAYER_NORM if k else NONE
    metadata = {"source": {"format": "openai", "activation": activation}, "units": "normalised rows" if k else "as stored",
                "normalization": norm}
    cfg = SAEConfig(kind="topk" if k else "relu", d_in=d_in, d_sae=d_sae, k=k, pre_bias=True, hookpoints=(UNKNOWN,),
                    model=UNKNOWN, input_norm=norm, metadata=metadata)
    return SAE(read_params(file, cfg.spec, parts_of(cfg.spec, _NAMES, ("W_dec",)), mesh, _STATISTICS), cfg, mesh)


def _k(file: ArrayFile, activation, state: dict, d_sae: int) -> int:
    """k of TopK, 0 for ReLU."""
    if activation == "ReLU" and not state:
        return 0
    k, after = state.pop("k", None), state.pop("postact_fn", "ReLU")
    if activation != "TopK" or state:
        raise FormatError(f"{file.path}: activation={activation!r:.60} with {', '.join(state) or 'no further state'} is not "
                          "ReLU or TopK")
    if after not in _POSTACT:
        raise FormatError(f"{file.path}: activation_state_dict.postact_fn={after!r:.60}: only ReLU after the selection is "
                          "computed here")
    if type(k) is not int or not 0 < k <= d_sae:
        raise FormatError(f"{file.path}: activation_state_dict.k={k!r:.60} of {d_sae} latents")
    return k
