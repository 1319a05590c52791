"""Configs to plan for, without store and language model: the width is given."""

from saejax.config import Config, default_config, resolve
from saejax.config.recipes import WITH_K


def make_config(kind: str = "topk", **overrides) -> Config:
    """A config of a recipe; overrides are {"section.key": value} with dots as double underscores."""
    c = default_config(kind)
    c.lm.model = "somebody/some-model"  # nothing here knows it
    c.sae.d_in, c.sae.d_sae, c.train.batch, c.mesh.data = 512, 8192, 512, 1
    if c.sae.kind in WITH_K:
        c.sae.k, c.sae.aux_k = 16, 0
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return resolve(c)


def wide() -> Config:
    """4 million features of a model 4,096 wide: the plan that is kept as golden.json."""
    return make_config(name="wide", sae__d_in=4096, sae__d_sae=2**22, sae__k=64, train__batch=16_384, train__tokens=8_000_000_000,
                       train__compute_dtype="bfloat16", harvest__tokens=2_000_000_000)
