"""What a config has in common with other runs of a scaling study, and what is its own."""

import json

from saejax import config as config_lib
from saejax.config import Config
from saejax.config.options import NEUTRAL
from saejax.config.recipes import WITH_K

_RECIPE = ("sae.", "train.", "stream.")  # sections that every run of a fit has in common, but for:
_OWN = {"sae.d_sae", "train.tokens", "train.batch", "train.lr", *NEUTRAL}


def sizes(config: Config) -> dict:
    """What a point tells of its config by itself."""
    k = config.sae.k if config.sae.kind in WITH_K else None
    return {"features": config.sae.d_sae, "batch": config.train.batch, "k": k, "lr": config.train.lr}


def recipe(config: Config) -> dict:
    """What runs of one fit have in common, but for the store. Not the seed: of runs that differ in it the mean counts."""
    own = _OWN | ({"sae.k"} if config.sae.kind in WITH_K else set())
    found = {key: value for key, value in config_lib.flat(config).items() if key.startswith(_RECIPE) and key not in own}
    return json.loads(json.dumps(found | {"data_seed": config.seed_of_data, "lm.model": config.lm.model}))
