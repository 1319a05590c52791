"""Running values that steer a run: the batch threshold, and the factor that brings a penalty's L0 to `train.target_l0`.

The controller is proportional-integral on e = log(L0 / target), L0 smoothed over about 20 steps:
penalty = lambda exp(P e + I sum e). L0 follows a change of the penalty after some hundred steps, so the integral is slow (it
moves by 10 e over a run, at most 0.02 e per step); the proportional part damps.
"""

import jax
import jax.numpy as jnp

from saejax.config import Config
from saejax.recipes import WITH_K

PROPORTIONAL, INTEGRAL, FASTEST, SMOOTHING = 1.0, 10.0, 0.02, 0.95
FOLLOW = 0.05  # how fast topk's threshold follows, in the logarithm per step


def initial(config: Config) -> dict[str, jax.Array]:
    """The running values that a kind has, at step 0 (float32 scalars).

    threshold (topk, batchtopk): what a release as jumprelu uses. log_l0, log_penalty: state of the controller.
    """
    names = ("threshold",) if config.sae.kind in WITH_K else ("log_l0", "log_penalty") if controlled(config) else ()
    return {name: jnp.zeros((), jnp.float32) for name in names}


def controlled(config: Config) -> bool:
    """True where the penalty is steered; kinds with k are given `train.target_l0` as k, and one jumprelu objective has it inside.
    """
    return bool(config.train.target_l0) and config.sae.kind not in WITH_K and not (
        config.sae.kind == "jumprelu" and config.sae.objective == "target_l0")


def penalty_factor(moving: dict[str, jax.Array], target_l0: jax.Array, step: jax.Array) -> jax.Array:
    """What lambda is multiplied by at this step; 1 without a controller."""
    if "log_penalty" not in moving:
        return jnp.float32(1.0)
    error = jnp.where(step == 0, 0.0, _error(moving["log_l0"], target_l0))
    return jnp.exp(PROPORTIONAL * error + moving["log_penalty"])


def _error(log_l0: jax.Array, target_l0: jax.Array) -> jax.Array:
    return jnp.clip(log_l0 - jnp.log(target_l0), -1.0, 1.0)


def moved(config: Config, moving: dict[str, jax.Array], seen, step: jax.Array, target_l0: jax.Array,
          total_steps: int) -> dict[str, jax.Array]:
    """The running values after a step; seen: the batch's `LossParts`."""
    if "log_penalty" in moving:
        log_l0 = jnp.log(jnp.maximum(seen.l0, 0.01))
        smoothing = jnp.minimum(SMOOTHING, step / (step + 1))
        log_l0 = smoothing * moving["log_l0"] + (1 - smoothing) * log_l0
        gain = min(INTEGRAL / total_steps, FASTEST)
        return {"log_l0": log_l0, "log_penalty": jnp.clip(moving["log_penalty"] + gain * _error(log_l0, target_l0), -12.0, 12.0)}
    if "threshold" not in moving:
        return moving
    if config.sae.kind == "topk":
        return {"threshold": followed(moving["threshold"], seen, config.sae.k)}
    return {"threshold": mean_of_least(moving["threshold"], seen.least, step, config.sae.threshold_beta)}


def mean_of_least(threshold: jax.Array, least: jax.Array, step: jax.Array, beta: float) -> jax.Array:
    """Exponential mean of `least`, the smallest kept activation of each batch (Bussmann et al. 2024); plain mean at first.

    beta grows as step / (step + 1) up to its final value, so that the first steps do not weigh more than later ones. A batch
    without any positive activation leaves the mean alone.
    """
    beta = jnp.minimum(beta, step / (step + 1))
    return jnp.where(jnp.isfinite(least), beta * threshold + (1 - beta) * least, threshold)


def followed(threshold: jax.Array, seen, k: int) -> jax.Array:
    """The value that k pre-activations per row exceed on average: it goes up while more do, down while fewer do.

    topk keeps k of each row, so no single value separates them; this one gives a jumprelu SAE of the same mean L0. It starts at
    the smallest kept activation.
    """
    started = jnp.where(jnp.isfinite(seen.least), jnp.maximum(seen.least, 1e-6), 1e-6)
    ratio = (seen.above + 1) / (k + 1)
    return jnp.where(threshold == 0, started, threshold * jnp.exp(FOLLOW * jnp.clip(jnp.log(ratio), -2.0, 2.0)))
