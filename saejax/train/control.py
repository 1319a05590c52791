"""Running values that steer a run: the batch threshold, and the factor that brings L0 to `train.target_l0`.

A proportional-integral controller on the logarithm of lambda: with e = log(L0 / goal) in [-1, 1], L0 a running mean,

    lambda = penalty_coef exp(PROPORTIONAL e + I),    I <- I + INTEGRAL e / steps of the run.

The goal moves from the first L0 to the target over the first half of the steps, evenly in the logarithm: a penalty that pulls at
once kills features. Gains are per run and not per step: lambda answers as fast in a run of 300 steps as in one of 300,000, in
shares of the run.
"""

import jax
import jax.numpy as jnp

from saejax.config import Config

PROPORTIONAL, INTEGRAL, APPROACH = 3.0, 10.0, 0.5  # APPROACH: the share of the run in which the goal moves
MEMORY = 0.02  # share of a run that the running mean of log L0 remembers


def initial(config: Config) -> dict[str, jax.Array]:
    """The running values that a kind has, at step 0 (float32 scalars).

    threshold (batchtopk): what a release uses. log_l0, log_l0_first, log_penalty: state of the controller.
    """
    names = ("threshold",) if config.sae.kind == "batchtopk" else ()
    if controlled(config):
        names = ("log_l0", "log_l0_first", "log_penalty")
    return {name: jnp.zeros((), jnp.float32) for name in names}


def controlled(config: Config) -> bool:
    """True where the penalty is steered."""
    return config.train.target_l0 is not None


def penalty_factor(moving: dict[str, jax.Array], target_l0: jax.Array, step: jax.Array, total_steps: int) -> jax.Array:
    """What lambda is multiplied by at this step; 1 without a controller."""
    if "log_penalty" not in moving:
        return jnp.float32(1.0)
    error = jnp.where(step == 0, 0.0, _error(moving, target_l0, step / total_steps))
    return jnp.exp(PROPORTIONAL * error + moving["log_penalty"])


def _error(moving: dict[str, jax.Array], target_l0: jax.Array, share: jax.Array) -> jax.Array:
    """e after a share of the run."""
    remaining = jnp.clip(1 - share / APPROACH, 0.0, 1.0)
    log_goal = jnp.log(target_l0) + remaining * (moving["log_l0_first"] - jnp.log(target_l0))
    return jnp.clip(moving["log_l0"] - log_goal, -1.0, 1.0)


def moved(moving: dict[str, jax.Array], seen, step: jax.Array, target_l0: jax.Array,
          total_steps: int) -> dict[str, jax.Array]:
    """The running values after a step; seen: the batch's `LossParts`."""
    if "log_penalty" in moving:
        log_l0 = jnp.log(jnp.maximum(seen.l0, 0.01))
        memory = jnp.minimum(1 - 1 / max(MEMORY * total_steps, 2.0), step / (step + 1))
        first = jnp.where(step == 0, log_l0, moving["log_l0_first"])
        moving = moving | {"log_l0": memory * moving["log_l0"] + (1 - memory) * log_l0, "log_l0_first": first}
        error = _error(moving, target_l0, step / total_steps)
        return moving | {"log_penalty": jnp.clip(moving["log_penalty"] + INTEGRAL / total_steps * error, -12.0, 12.0)}
    if "threshold" not in moving:
        return moving
    return {"threshold": mean_of_least(moving["threshold"], seen.least, step)}


def mean_of_least(threshold: jax.Array, least: jax.Array, step: jax.Array) -> jax.Array:
    """Exponential mean of `least`, the smallest kept activation of each batch (Bussmann et al. 2024); plain mean at first.

    Its memory is 0.99; published is 0.999, which lags behind the falling learning rate in runs of some thousand steps. It grows
    as step / (step + 1) up to that, so that the first steps do not weigh more than later ones. A batch without any positive
    activation leaves the mean alone.
    """
    beta = jnp.minimum(0.99, step / (step + 1))
    return jnp.where(jnp.isfinite(least), beta * threshold + (1 - beta) * least, threshold)
