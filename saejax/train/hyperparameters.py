"""What a compiled step is told instead of holding it, so that SAEs of equal shape share one."""

import dataclasses

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from saejax.base import sharding
from saejax.config import Config
from saejax.config.recipes import WITH_K


@struct.dataclass
class Hyperparameters:
    """Arguments of a step besides state and rows (float32 scalars): peak learning rate, lambda, L0 to aim at."""

    lr: jax.Array | np.float32
    penalty: jax.Array | np.float32
    target_l0: jax.Array | np.float32

    @classmethod
    def of(cls, config: Config) -> "Hyperparameters":
        """Those of a config, in host memory."""
        target = config.sae.k if config.train.target_l0 is None else config.train.target_l0
        return cls(*map(np.float32, (config.train.lr, config.sae.penalty_coef, target)))

    def on(self, mesh: Mesh) -> "Hyperparameters":
        """On every device of a mesh."""
        return jax.tree.map(lambda value: sharding.place(value, sharding.sharding(mesh)), self)


def alike(config: Config) -> Config:
    """What of a config is part of a compiled step, the defaults for the rest: equal for SAEs that share one."""
    # Of a hookpoint the width is part of the `SAESpec`; of a target, whether there is one is part of the step.
    sae = dataclasses.replace(config.sae, penalty_coef=1.0, hookpoint="")
    train = dataclasses.replace(config.train, lr=1.0, target_l0=None if config.train.target_l0 is None else 1.0)
    if sae.kind not in WITH_K:
        sae = dataclasses.replace(sae, k=1)
    return Config(sae=sae, train=train)
