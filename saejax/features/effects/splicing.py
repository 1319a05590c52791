"""The language model with an SAE in its place: the reconstruction goes on instead of the value.

    x' = SAE(x), or with the error SAE(x) + (x - SAE(x)) = x, whose gradients still pass through the features
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from saejax.base.errors import SteeringError
from saejax.features.effects.prompting import check_one_place, check_place
from saejax.lm import LM
from saejax.sae.inference import SAE, SAEConfig


def plan(lm_: LM, sae: SAE, *, error: bool = False) -> Partial:
    """A `Partial` that makes the taps of a model in which the SAE stands; the first token, which it has not seen, stays.

    error: what the SAE misses is added. Raises `SteeringError` for a crosscoder, an SAE split over devices or one that does not
    fit the model, `HookpointError`.
    """
    check_place(lm_, sae)
    check_one_place(sae)
    if sae.mesh is not None and sae.mesh.size > 1:
        raise SteeringError("the SAE is split over devices: open it with mesh=None to run it inside the model")
    return Partial(_maker(sae.cfg, error), sae.params)


@functools.lru_cache(maxsize=64)
def _maker(cfg: SAEConfig, error: bool):
    def make(params) -> dict:
        sae, seen = SAE(params, cfg), []

        def keep(x_BTD: Array) -> Array:
            seen[:] = [x_BTD]
            return x_BTD

        def change(x_BTD: Array, positions_BT: Array) -> Array:
            clean = x_BTD.astype(jnp.float32)
            recon = sae((seen[0] if cfg.target else x_BTD).astype(jnp.float32))
            recon = recon + jax.lax.stop_gradient(clean - recon) if error else recon
            return jnp.where((positions_BT > 0)[..., None], recon, clean).astype(x_BTD.dtype)

        return {cfg.hookpoints[0]: keep, cfg.target: change} if cfg.target else {cfg.targets[0]: change}

    return make
