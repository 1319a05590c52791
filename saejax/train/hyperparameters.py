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
        penalty = config.sae.sparsity if config.sae.kind == "jumprelu" else config.sae.l1
        return cls(*map(np.float32, (config.train.lr, penalty, config.train.target_l0)))

    def on(self, mesh: Mesh) -> "Hyperparameters":
        """On every device of a mesh."""
        return jax.tree.map(lambda value: sharding.place(value, sharding.sharding(mesh)), self)


def alike(config: Config) -> Config:
    """What of a config is part of a compiled step, the defaults for the rest: equal for SAEs that share one."""
    sae, train = config.sae, dataclasses.replace(config.train, lr=1.0)
    sae = dataclasses.replace(sae, sparsity=1.0) if sae.kind == "jumprelu" else dataclasses.replace(sae, l1=1.0)
    if train.target_l0 and sae.kind not in WITH_K:  # whether there is a target is part of the step
        train = dataclasses.replace(train, target_l0=1.0)
    sae = dataclasses.replace(sae, hookpoint="")  # its width is part of the `SAESpec`
    return Config(sae=sae, train=train)
