"""Goodfire: one `.pt` / `.pth` file with encoder_linear.weight [d_sae, d_in], encoder_linear.bias, decoder_linear.weight
[d_in, d_sae], decoder_linear.bias. acts = relu(x W^T + b); nothing is subtracted, nothing normalised. Model and hookpoint are
not in the file.
"""

from pathlib import Path

from jax.sharding import Mesh

from saejax.base.records import UNKNOWN
from saejax.formats.archives import open_torch
from saejax.formats.assembling import parts_of, read_params
from saejax.formats.torch_files import keys_of, only_torch_file
from saejax.sae.inference import SAE, SAEConfig

NEEDS = "one .pt or .pth file with encoder_linear.weight"
_NAMES = {"W_enc": "encoder_linear.weight", "b_enc": "encoder_linear.bias", "W_dec": "decoder_linear.weight",
          "b_dec": "decoder_linear.bias"}


def recognise(path: Path) -> bool:
    return "encoder_linear.weight" in keys_of(path)


def read(path: Path, mesh: Mesh | None = None) -> SAE:
    """The SAE of a file, or of a directory that holds one. Raises `FormatError` naming file and tensor."""
    file = open_torch(only_torch_file(path))
    d_sae, d_in = file.shape(_NAMES["W_enc"], 2)
    cfg = SAEConfig(kind="relu", d_in=d_in, d_sae=d_sae, k=0, pre_bias=False, hookpoints=(UNKNOWN,), model=UNKNOWN,
                    metadata={"source": {"format": "goodfire"}, "units": "as stored", "normalization": "none"})
    return SAE(read_params(file, cfg.spec, parts_of(cfg.spec, _NAMES, ("W_dec",)), mesh), cfg, mesh)
